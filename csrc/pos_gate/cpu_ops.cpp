// The `cpu` overloads of the two ops: contract checks, outputs and workspace, threads, and the registration.
//
// The Python door (posmlp_kernels/problem.py) has checked what a user can get wrong; the checks here keep a caller of
// the bare ops from reading out of bounds. The parameters come in the accumulation type.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu.h"

namespace posmlp::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

constexpr int64_t kUnits = 64;            // of a backward: enough to keep many cores busy
constexpr int64_t kColumnsPerUnit = 768;  // enough for packing P to cost little beside its use
// A share of x that caches hold until all groups have had their channels of it, for a group's rows end amid cache lines.
constexpr int64_t kBytesPerSplit = 8 << 20;
constexpr int64_t kNormBlocks = 64;

struct Arguments {
  Tensor x;
  MaybeTensor table, bias, matrix, norm_weight, norm_bias;
  Call call{};
  ScalarType parameter_type;
};

Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: STD_TORCH_CHECK(false, "pos_gate: x must be float64, float32, bfloat16 or float16");
  }
}

View view_of(const Tensor& tensor) {
  View view;
  const int64_t rank = tensor.dim() - 2;
  view.batch = tensor.stride(0);
  for (int64_t d = 0; d < rank; ++d) view.map[kRank - rank + d] = tensor.stride(1 + d);
  return view;
}

Tensor with_contiguous_channels(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// A parameter's data, after its shape and type have been checked.
const void* data_of(MaybeTensor& tensor, const char* name, ScalarType type, int64_t count) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == type, "pos_gate: ", name, " must be in the accumulation type");
  STD_TORCH_CHECK(tensor->numel() == count, "pos_gate: ", name, " must have ", count, " elements, got ", tensor->numel());
  tensor = torch::stable::contiguous(*tensor);
  return tensor->const_data_ptr();
}

void read_shape(Arguments& a, const Sizes& window, const Sizes& shift) {
  Shape& shape = a.call.shape;
  const int64_t rank = a.x.dim() - 2;
  STD_TORCH_CHECK(rank >= 1 && rank <= kRank, "pos_gate: x must have a map of 1 to 3 dimensions, got ", rank);
  STD_TORCH_CHECK(int64_t(window.size()) == rank && int64_t(shift.size()) == rank,
                  "pos_gate: window and shift must have ", rank, " sizes");
  shape.batch = a.x.size(0);
  shape.channels = a.x.size(rank + 1) / 2;
  for (int64_t d = 0; d < rank; ++d) {
    const int64_t at = kRank - rank + d;
    shape.map[at] = a.x.size(1 + d);
    shape.window[at] = window[d];
    shape.shift[at] = shift[d];
    STD_TORCH_CHECK(window[d] >= 1 && shift[d] >= 0 && shift[d] < window[d], "pos_gate: need 0 <= shift < window");
  }
  shape.groups = a.table ? a.table->size(0) : a.matrix && a.matrix->dim() == 3 ? a.matrix->size(0) : 1;
  STD_TORCH_CHECK(a.table || a.matrix, "pos_gate: table or matrix must be given");
  STD_TORCH_CHECK(a.x.size(rank + 1) == 2 * shape.channels && shape.channels >= 1 && shape.groups >= 1 &&
                      shape.channels % shape.groups == 0,
                  "pos_gate: the groups must divide half of x's channels");
}

// Into how many shares the columns of each group are cut.
int64_t count_splits(const Shape& shape, int64_t bytes, int64_t least_units, int64_t most_units) {
  const int64_t columns = shape.batch * shape.map_tokens() / shape.window_tokens() * shape.group_channels();
  const int64_t wanted = std::max(divide_up(least_units, shape.groups), divide_up(bytes, kBytesPerSplit));
  return std::clamp<int64_t>(columns / kColumnsPerUnit, 1, std::min(wanted, 1 + (most_units - 1) / shape.groups));
}

Arguments read(const Tensor& x, const MaybeTensor& table, const MaybeTensor& bias, const MaybeTensor& matrix,
               const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Sizes& window, const Sizes& shift,
               bool softmax, int64_t activation, double eps, int64_t least_units, int64_t most_units) {
  Arguments a{with_contiguous_channels(x), table, bias, matrix, norm_weight, norm_bias, {}, ScalarType::Float};
  read_shape(a, window, shift);
  Call& call = a.call;
  const Shape& shape = call.shape;
  const int64_t n = shape.window_tokens();
  call.storage = storage_of(x.scalar_type());
  a.parameter_type = call.storage == Storage::float64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "pos_gate: activation must be 0, 1 or 2, got ", activation);
  STD_TORCH_CHECK(bool(a.norm_weight) == bool(a.norm_bias), "pos_gate: norm needs both of its parameters");
  call.softmax = softmax;
  call.activation = Activation(activation);
  call.eps = eps;
  call.x = a.x.const_data_ptr();
  call.x_view = view_of(a.x);
  call.matrix_per_group = a.matrix && a.matrix->dim() == 3;
  call.table = data_of(a.table, "table", a.parameter_type, shape.groups * shape.table_size());
  call.bias = data_of(a.bias, "bias", a.parameter_type, n);
  call.matrix = data_of(a.matrix, "matrix", a.parameter_type, (call.matrix_per_group ? shape.groups : 1) * n * n);
  call.norm_weight = data_of(a.norm_weight, "norm_weight", a.parameter_type, shape.channels);
  call.norm_bias = data_of(a.norm_bias, "norm_bias", a.parameter_type, shape.channels);
  call.splits = count_splits(shape, x.numel() * x.element_size(), least_units, most_units);
  call.norm_blocks = std::clamp<int64_t>(shape.batch * shape.map_tokens(), 1, kNormBlocks);
  return a;
}

// An output of x's type. Fresh memory costs a page fault for every 4 KB: large
// outputs ask for huge pages, as NumPy's arrays do.
Tensor output(const Arguments& a, const Sizes& sizes) {
  Tensor tensor = torch::stable::new_empty(a.x, sizes);
#ifdef MADV_HUGEPAGE
  constexpr size_t kLarge = size_t(4) << 20, kPage = 4096;
  const size_t bytes = size_t(tensor.numel()) * size_t(tensor.element_size());
  if (bytes >= kLarge) {
    char* data = static_cast<char*>(tensor.mutable_data_ptr());
    const size_t skipped = (kPage - size_t(data) % kPage) % kPage;
    madvise(data + skipped, bytes - skipped, MADV_HUGEPAGE);  // a hint: nothing depends on its success
  }
#endif
  return tensor;
}

Tensor workspace(const Arguments& a, const Sizes& sizes) {
  return torch::stable::new_empty(a.x, sizes, std::make_optional(a.parameter_type));
}

// The means and inverse deviations of X1's tokens, kept alive by the caller.
Tensor norm_statistics(Arguments& a, const Kernels& kernels) {
  const int64_t tokens = a.call.shape.batch * a.call.shape.map_tokens();
  Tensor statistics = workspace(a, {a.call.norm_weight ? 2 * tokens : 0});
  if (!a.call.norm_weight) return statistics;
  char* data = static_cast<char*>(statistics.mutable_data_ptr());
  a.call.norm_mean = data;
  a.call.norm_rstd = data + tokens * int64_t(a.call.storage == Storage::float64 ? sizeof(double) : sizeof(float));
  torch::stable::parallel_for(0, tokens, 64, [&](int64_t first, int64_t last) { kernels.statistics(a.call, first, last); });
  return statistics;
}

Tensor forward(const Tensor& x, const MaybeTensor& table, const MaybeTensor& bias, const MaybeTensor& matrix,
               const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Sizes& window, const Sizes& shift,
               bool softmax, int64_t activation, double eps) {
  // No result depends on the number of units here: as few as keep the threads busy and the caches useful.
  const int64_t units = 4 * int64_t(torch::stable::get_num_threads());
  Arguments a = read(x, table, bias, matrix, norm_weight, norm_bias, window, shift, softmax, activation, eps, units,
                     std::numeric_limits<int64_t>::max());
  Sizes sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = a.call.shape.channels;
  Tensor z = output(a, sizes);
  if (z.numel() == 0) return z;
  const Kernels& kernels = choose_kernels();
  a.call.z = z.mutable_data_ptr();
  const Tensor statistics = norm_statistics(a, kernels);
  torch::stable::parallel_for(0, a.call.units(), 1,
                              [&](int64_t first, int64_t last) { kernels.forward(a.call, first, last); });
  return z;
}

// The sum of `parts` partial gradients, in the shape of the parameter; empty if it is not wanted.
Tensor sum_parts(const Arguments& a, const MaybeTensor& parameter, const std::optional<Tensor>& parts, int64_t groups) {
  if (!parts) return workspace(a, {0});
  const int64_t count = parts->size(0) / groups, size = parts->size(1);
  const std::vector<int64_t> dim{0};
  Tensor grouped = torch::stable::reshape(*parts, Sizes{count, groups, size});
  Tensor sums = torch::stable::sum(grouped, torch::headeronly::IntHeaderOnlyArrayRef(dim));
  return torch::stable::reshape(sums, Sizes(parameter->sizes().begin(), parameter->sizes().end()));
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& dz, const Tensor& x, const MaybeTensor& table, const MaybeTensor& bias,
                   const MaybeTensor& matrix, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                   const Sizes& window, const Sizes& shift, bool softmax, int64_t activation, double eps,
                   bool mixing_grad) {
  Arguments a =
      read(x, table, bias, matrix, norm_weight, norm_bias, window, shift, softmax, activation, eps, kUnits, kUnits);
  Call& call = a.call;
  const Shape& shape = call.shape;
  const int64_t n = shape.window_tokens(), part_count = call.units();
  STD_TORCH_CHECK(dz.dim() == x.dim() && dz.numel() == x.numel() / 2 && dz.scalar_type() == x.scalar_type(),
                  "pos_gate_backward: dz must have z's shape and x's type");
  const Tensor gradient = with_contiguous_channels(dz);
  call.dz = gradient.const_data_ptr();
  call.dz_view = view_of(gradient);
  Tensor dx = output(a, Sizes(x.sizes().begin(), x.sizes().end()));
  call.dx = dx.mutable_data_ptr();

  const auto parts = [&](bool wanted, int64_t count, int64_t size, void*& data) {
    std::optional<Tensor> tensor;
    if (wanted) {
      tensor = workspace(a, {count, size});
      data = tensor->mutable_data_ptr();
    }
    return tensor;
  };
  const auto dtable = parts(a.table && mixing_grad, part_count, shape.table_size(), call.dtable_parts);
  const auto dmatrix = parts(a.matrix && mixing_grad, part_count, n * n, call.dmatrix_parts);
  const auto dbias = parts(bool(a.bias), part_count, n, call.dbias_parts);
  const bool norm = call.norm_weight != nullptr;
  const auto dnorm_weight = parts(norm, call.norm_blocks, shape.channels, call.dnorm_weight_parts);
  const auto dnorm_bias = parts(norm, call.norm_blocks, shape.channels, call.dnorm_bias_parts);
  const auto dx_normed = parts(norm, shape.batch * shape.map_tokens(), shape.channels, call.dx_normed);

  const Kernels& kernels = choose_kernels();
  const Tensor statistics = norm_statistics(a, kernels);
  torch::stable::parallel_for(0, call.units(), 1,
                              [&](int64_t first, int64_t last) { kernels.backward(call, first, last); });
  if (norm)
    torch::stable::parallel_for(0, call.norm_blocks, 1,
                                [&](int64_t first, int64_t last) { kernels.norm_backward(call, first, last); });
  return {dx,
          sum_parts(a, a.table, dtable, shape.groups),
          sum_parts(a, a.bias, dbias, 1),
          sum_parts(a, a.matrix, dmatrix, call.matrix_per_group ? shape.groups : 1),
          sum_parts(a, a.norm_weight, dnorm_weight, 1),
          sum_parts(a, a.norm_bias, dnorm_bias, 1)};
}

}  // namespace

// The schemas of posmlp_kernels/pos_gate/ops.py; here too so that a C++ program needs no Python.
STABLE_TORCH_LIBRARY_FRAGMENT(posmlp_kernels, m) {
  m.def(
      "pos_gate.cpu(Tensor x, Tensor? table, Tensor? bias, Tensor? matrix, Tensor? norm_weight, Tensor? norm_bias, "
      "int[] window, int[] shift, bool softmax, int activation, float eps) -> Tensor");
  m.def(
      "pos_gate_backward.cpu(Tensor dz, Tensor x, Tensor? table, Tensor? bias, Tensor? matrix, Tensor? norm_weight, "
      "Tensor? norm_bias, int[] window, int[] shift, bool softmax, int activation, float eps, bool mixing_grad) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(posmlp_kernels, CPU, m) {
  m.impl("pos_gate.cpu", TORCH_BOX(&forward));
  m.impl("pos_gate_backward.cpu", TORCH_BOX(&backward));
}

}  // namespace posmlp::cpu
