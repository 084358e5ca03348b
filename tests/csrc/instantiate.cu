// All kernels of the CUDA back end for all types, by way of its host part: for nvcc to compile, not to be run.
#include "cuda_gate.h"

using namespace posmlp::cuda;

struct Launcher {
  template <class Kernel>
  void launch(const typename Kernel::Arguments& arguments, int64_t grid, int64_t shared_bytes) {
    enter<Kernel><<<unsigned(grid), Kernel::kThreads, size_t(shared_bytes)>>>(arguments);
  }
};

#define POSMLP_INSTANTIATE(T)                               \
  template void posmlp::cuda::plan(Call<T>&, const Chip&);  \
  template void posmlp::cuda::forward(Launcher&, const Call<T>&); \
  template void posmlp::cuda::backward(Launcher&, const Call<T>&);
POSMLP_INSTANTIATE(double)
POSMLP_INSTANTIATE(float)
POSMLP_INSTANTIATE(Bf16)
POSMLP_INSTANTIATE(Half)
