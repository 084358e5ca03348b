// The `cuda` overloads of the two ops: outputs, workspace, launches, and the registration.
//
// Nothing is read back, and nothing is allocated but the outputs and one workspace, both by torch: a call can be
// captured in a CUDA graph, and runs on the current stream of x's device.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda_launch.h"
#include "arguments.h"
#include "cuda_gate.h"

namespace posmlp::cuda {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, name, device);
  STD_TORCH_CHECK(error == cudaSuccess, "pos_gate: ", cudaGetErrorString(error));
  return value;
}

Chip chip_of(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  const int shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {attribute(cudaDevAttrMultiProcessorCount, device), shared_bytes, major * 10 + minor};
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    default: return "float16";
  }
}

std::string describe(const char* op, const Tensor& x) {
  std::string text = std::string(op) + " on x [";
  for (int64_t d = 0; d < x.dim(); ++d) text += (d ? ", " : "") + std::to_string(x.size(d));
  return text + "] of " + name_of(x.scalar_type());
}

template <class T>
Call<T> call_of(const Arguments& a) {
  using A = Accumulation<T>;
  Call<T> call{};
  call.shape = a.shape;
  call.softmax = a.softmax;
  call.matrix_per_group = a.matrix_per_group;
  call.activation = a.activation;
  call.eps = A(a.eps);
  call.x = static_cast<const T*>(a.x.const_data_ptr());
  call.x_view = view_of(a.x);
  call.table = static_cast<const A*>(a.data(a.table));
  call.matrix = static_cast<const A*>(a.data(a.matrix));
  call.bias = static_cast<const A*>(a.data(a.bias));
  call.norm_weight = static_cast<const A*>(a.data(a.norm_weight));
  call.norm_bias = static_cast<const A*>(a.data(a.norm_bias));
  return call;
}

template <class A>
A* values_of(const Tensor& tensor) {
  return tensor.numel() ? static_cast<A*>(tensor.mutable_data_ptr()) : nullptr;
}

// The workspace of a call, whose parts are placed in it.
template <class T>
Tensor lay_out_new(const Arguments& a, Call<T>& call, const Chip& chip, bool backward, bool mixing_grad) {
  const int64_t bytes = lay_out(call, chip, backward, mixing_grad, nullptr);
  Tensor workspace = torch::stable::new_empty(a.x, Sizes{bytes}, std::make_optional(ScalarType::Byte));
  lay_out(call, chip, backward, mixing_grad, static_cast<char*>(workspace.mutable_data_ptr()));
  return workspace;
}

// The gradients of the parameters, and dx.
struct Outputs {
  Tensor dx, dtable, dbias, dmatrix, dnorm_weight, dnorm_bias;
};

template <class T>
void run_forward(const Arguments& a, const Tensor& z) {
  Launcher launcher(a.x, describe("pos_gate", a.x));
  const Chip chip = chip_of(a.x.get_device_index());
  Call<T> call = call_of<T>(a);
  call.z = static_cast<T*>(z.mutable_data_ptr());
  call.z_view = a.shape.contiguous(a.shape.channels);
  plan(call, chip);
  const Tensor workspace = lay_out_new(a, call, chip, false, false);
  forward(launcher, call, chip);
}

template <class T>
void run_backward(const Arguments& a, const Tensor& dz, const Outputs& out, bool mixing_grad) {
  using A = Accumulation<T>;
  Launcher launcher(a.x, describe("pos_gate_backward", a.x));
  const Chip chip = chip_of(a.x.get_device_index());
  Call<T> call = call_of<T>(a);
  call.dz = static_cast<const T*>(dz.const_data_ptr());
  call.dz_view = view_of(dz);
  call.dx = static_cast<T*>(out.dx.mutable_data_ptr());
  call.dx_view = a.shape.contiguous(2 * a.shape.channels);
  call.dtable = values_of<A>(out.dtable);
  call.dbias = values_of<A>(out.dbias);
  call.dmatrix = values_of<A>(out.dmatrix);
  call.dnorm_weight = values_of<A>(out.dnorm_weight);
  call.dnorm_bias = values_of<A>(out.dnorm_bias);
  plan(call, chip);
  const Tensor workspace = lay_out_new(a, call, chip, true, mixing_grad);
  backward(launcher, call, chip);
}

Tensor pos_gate(const Tensor& x, const MaybeTensor& table, const MaybeTensor& bias, const MaybeTensor& matrix,
                const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Sizes& window, const Sizes& shift,
                bool softmax, int64_t activation, double eps) {
  const Arguments a(x, table, bias, matrix, norm_weight, norm_bias, window, shift, softmax, activation, eps);
  const Tensor z = torch::stable::new_empty(a.x, a.z_sizes());
  if (z.numel() == 0) return z;
  switch (x.scalar_type()) {
    case ScalarType::Double: run_forward<double>(a, z); break;
    case ScalarType::Float: run_forward<float>(a, z); break;
    case ScalarType::BFloat16: run_forward<Bf16>(a, z); break;
    default: run_forward<Half>(a, z);
  }
  return z;
}

// A gradient in its parameter's shape; without elements if it is not wanted, zeros if no kernel will write it.
Tensor gradient_of(const Arguments& a, const MaybeTensor& parameter, bool wanted, bool empty) {
  if (!parameter || !wanted) return a.workspace(Sizes{0});
  Tensor tensor = a.workspace(sizes_of(*parameter));
  return empty ? torch::stable::zero_(tensor) : tensor;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients pos_gate_backward(const Tensor& dz, const Tensor& x, const MaybeTensor& table, const MaybeTensor& bias,
                            const MaybeTensor& matrix, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                            const Sizes& window, const Sizes& shift, bool softmax, int64_t activation, double eps,
                            bool mixing_grad) {
  const Arguments a(x, table, bias, matrix, norm_weight, norm_bias, window, shift, softmax, activation, eps);
  const Tensor gradient = a.gradient(dz);
  const bool empty = x.numel() == 0;
  const Outputs out{torch::stable::new_empty(a.x, sizes_of(x)),       gradient_of(a, a.table, mixing_grad, empty),
                    gradient_of(a, a.bias, true, empty),              gradient_of(a, a.matrix, mixing_grad, empty),
                    gradient_of(a, a.norm_weight, true, empty),       gradient_of(a, a.norm_bias, true, empty)};
  if (!empty) {
    switch (x.scalar_type()) {
      case ScalarType::Double: run_backward<double>(a, gradient, out, mixing_grad); break;
      case ScalarType::Float: run_backward<float>(a, gradient, out, mixing_grad); break;
      case ScalarType::BFloat16: run_backward<Bf16>(a, gradient, out, mixing_grad); break;
      default: run_backward<Half>(a, gradient, out, mixing_grad);
    }
  }
  return {out.dx, out.dtable, out.dbias, out.dmatrix, out.dnorm_weight, out.dnorm_bias};
}

}  // namespace

// The schemas of posmlp_kernels/pos_gate/ops.py; here too so that a C++ program needs no Python.
STABLE_TORCH_LIBRARY_FRAGMENT(posmlp_kernels, m) {
  m.def(
      "pos_gate.cuda(Tensor x, Tensor? table, Tensor? bias, Tensor? matrix, Tensor? norm_weight, Tensor? norm_bias, "
      "int[] window, int[] shift, bool softmax, int activation, float eps) -> Tensor");
  m.def(
      "pos_gate_backward.cuda(Tensor dz, Tensor x, Tensor? table, Tensor? bias, Tensor? matrix, Tensor? norm_weight, "
      "Tensor? norm_bias, int[] window, int[] shift, bool softmax, int activation, float eps, bool mixing_grad) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(posmlp_kernels, CUDA, m) {
  m.impl("pos_gate.cuda", TORCH_BOX(&pos_gate));
  m.impl("pos_gate_backward.cuda", TORCH_BOX(&pos_gate_backward));
}

}  // namespace posmlp::cuda
