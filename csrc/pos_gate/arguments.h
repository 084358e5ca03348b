// The arguments of the two ops as every compiled back end reads them: contract checks, geometry, pointers.
//
// The Python door (posmlp_kernels/problem.py) has checked what a user can get wrong; the checks here keep a caller of
// the bare ops from reading out of bounds. The parameters come in the accumulation type.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../tensors.h"
#include "shape.h"

namespace posmlp {

using MaybeTensor = std::optional<Tensor>;

inline View view_of(const Tensor& tensor) {
  View view;
  const int64_t rank = tensor.dim() - 2;
  view.batch = tensor.stride(0);
  for (int64_t d = 0; d < rank; ++d) view.map[kRank - rank + d] = tensor.stride(1 + d);
  return view;
}

inline Tensor with_contiguous_channels(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : as_contiguous(tensor);
}

class Arguments {
 public:
  Tensor x;
  MaybeTensor table, bias, matrix, norm_weight, norm_bias;
  Shape shape;
  bool softmax, matrix_per_group;
  Activation activation;
  double eps;
  ScalarType parameter_type;  // the accumulation type

  Arguments(const Tensor& x_, const MaybeTensor& table_, const MaybeTensor& bias_, const MaybeTensor& matrix_,
            const MaybeTensor& norm_weight_, const MaybeTensor& norm_bias_, const Sizes& window, const Sizes& shift,
            bool softmax_, int64_t activation_, double eps_)
      : x(with_contiguous_channels(x_)),
        table(table_),
        bias(bias_),
        matrix(matrix_),
        norm_weight(norm_weight_),
        norm_bias(norm_bias_),
        softmax(softmax_),
        activation(Activation(activation_)),
        eps(eps_) {
    switch (x.scalar_type()) {
      case ScalarType::Double: parameter_type = ScalarType::Double; break;
      case ScalarType::Float:
      case ScalarType::BFloat16:
      case ScalarType::Half: parameter_type = ScalarType::Float; break;
      default: STD_TORCH_CHECK(false, "pos_gate: x must be float64, float32, bfloat16 or float16");
    }
    STD_TORCH_CHECK(activation_ >= 0 && activation_ <= 2, "pos_gate: activation must be 0, 1 or 2, got ", activation_);
    STD_TORCH_CHECK(bool(norm_weight) == bool(norm_bias), "pos_gate: norm needs both of its parameters");
    read_shape(window, shift);
    const int64_t n = shape.window_tokens();
    matrix_per_group = matrix && matrix->dim() == 3;
    check(table, "table", shape.groups * shape.table_size());
    check(bias, "bias", n);
    check(matrix, "matrix", (matrix_per_group ? shape.groups : 1) * n * n);
    check(norm_weight, "norm_weight", shape.channels);
    check(norm_bias, "norm_bias", shape.channels);
  }

  // A parameter's values; null if it is absent.
  static const void* data(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

  // dz as the kernels read it.
  Tensor gradient(const Tensor& dz) const {
    STD_TORCH_CHECK(dz.dim() == x.dim() && dz.numel() == x.numel() / 2 && dz.scalar_type() == x.scalar_type(),
                    "pos_gate_backward: dz must have z's shape and x's type");
    return with_contiguous_channels(dz);
  }

  Sizes z_sizes() const {
    Sizes sizes = sizes_of(x);
    sizes.back() = shape.channels;
    return sizes;
  }

  Tensor workspace(const Sizes& sizes) const {
    return new_tensor(x, sizes, parameter_type == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  }

 private:
  void read_shape(const Sizes& window, const Sizes& shift) {
    const int64_t rank = x.dim() - 2;
    STD_TORCH_CHECK(rank >= 1 && rank <= kRank, "pos_gate: x must have a map of 1 to 3 dimensions, got ", rank);
    STD_TORCH_CHECK(int64_t(window.size()) == rank && int64_t(shift.size()) == rank,
                    "pos_gate: window and shift must have ", rank, " sizes");
    shape.batch = x.size(0);
    shape.channels = x.size(rank + 1) / 2;
    for (int64_t d = 0; d < rank; ++d) {
      const int64_t at = kRank - rank + d;
      shape.map[at] = x.size(1 + d);
      shape.window[at] = window[d];
      shape.shift[at] = shift[d];
      STD_TORCH_CHECK(window[d] >= 1 && shift[d] >= 0 && shift[d] < window[d], "pos_gate: need 0 <= shift < window");
    }
    STD_TORCH_CHECK(table || matrix, "pos_gate: table or matrix must be given");
    shape.groups = table ? table->size(0) : matrix->dim() == 3 ? matrix->size(0) : 1;
    STD_TORCH_CHECK(x.size(rank + 1) == 2 * shape.channels && shape.channels >= 1 && shape.groups >= 1 &&
                        shape.channels % shape.groups == 0,
                    "pos_gate: the groups must divide half of x's channels");
  }

  void check(MaybeTensor& tensor, const char* name, int64_t count) const {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->scalar_type() == parameter_type, "pos_gate: ", name, " must be in the accumulation type");
    STD_TORCH_CHECK(tensor->numel() == count, "pos_gate: ", name, " must have ", count, " elements, got ", tensor->numel());
    STD_TORCH_CHECK(tensor->device() == x.device(), "pos_gate: ", name, " must be on x's device");
    tensor = as_contiguous(*tensor);
  }
};

}  // namespace posmlp
