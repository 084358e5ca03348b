// Launching kernels on the current stream of a tensor's device, every launch checked.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <utility>

#include "pos_gate/cuda_platform.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace posmlp::cuda {

class Launcher {
 public:
  // `what` is named in errors: the op with the shape and dtype of its call.
  Launcher(const torch::stable::Tensor& tensor, std::string what)
      : guard_(tensor.get_device_index()), what_(std::move(what)) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class Kernel>
  void launch(const typename Kernel::Arguments& arguments, int64_t grid, int64_t shared_bytes,
              int threads = Kernel::kThreads) {
    if (grid == 0) return;
    STD_TORCH_CHECK(grid < (int64_t(1) << 31), what_, ": ", grid, " blocks are more than a launch takes");
    if (shared_bytes > 48 << 10)
      check(cudaFuncSetAttribute(enter<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
            shared_bytes);
    enter<Kernel><<<unsigned(grid), unsigned(threads), size_t(shared_bytes), stream_>>>(arguments);
    check(cudaGetLastError(), shared_bytes);
  }

 private:
  void check(cudaError_t error, int64_t shared_bytes) const {
    STD_TORCH_CHECK(error == cudaSuccess, what_, ": ", cudaGetErrorString(error), " (", shared_bytes,
                    " bytes of shared memory)");
  }

  torch::stable::accelerator::DeviceGuard guard_;
  std::string what_;
  cudaStream_t stream_;
};

}  // namespace posmlp::cuda
