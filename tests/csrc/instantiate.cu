// The kernels of the CUDA back end, by way of its host part: for nvcc to compile, not to be run.
#include "cuda_gate.h"

using namespace posmlp::cuda;

struct Launcher {
  template <class Kernel>
  void launch(const typename Kernel::Arguments& arguments, int64_t grid, int64_t shared_bytes,
              int threads = Kernel::kThreads) {
    enter<Kernel><<<unsigned(grid), unsigned(threads), size_t(shared_bytes)>>>(arguments);
  }
};

#define POSMLP_INSTANTIATE(T)                                                  \
  template void posmlp::cuda::forward(Launcher&, const Call<T>&, const Chip&); \
  template void posmlp::cuda::backward(Launcher&, const Call<T>&, const Chip&);
POSMLP_INSTANTIATE(double)
POSMLP_INSTANTIATE(float)
POSMLP_INSTANTIATE(Bf16)  // whose kernels are those of Half, but for the names of three instructions
