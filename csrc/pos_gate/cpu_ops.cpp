// The `cpu` overloads of the two ops: outputs and workspace, threads, and the registration.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "cpu.h"

namespace posmlp::cpu {
namespace {

constexpr int64_t kUnits = 64;             // of a backward: enough to keep many cores busy
constexpr int64_t kFewColumns = 384;       // the fewest for which packing P costs little beside its use
constexpr int64_t kFewClasses = 4;         // of windows: packing P for so many costs little too
constexpr int64_t kPanelColumns = 48;      // the widest panel's
constexpr int64_t kNearBytes = 160 << 10;  // of x: of shares so large the second-level cache holds two
constexpr int64_t kNormBlocks = 64;

Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::BFloat16: return Storage::bfloat16;
    default: return Storage::float16;
  }
}

// Into how many shares the columns of each group are cut.

int64_t columns_of_group(const Shape& shape) {
  return divide_up(shape.batch * shape.map_tokens(), shape.window_tokens()) * shape.group_channels();
}

struct Division {
  int64_t splits, blocks;
};

// Of a forward, whose results do not depend on it. A thread packs P of a group once, whatever the number of shares. They
// are as small as the caches like them, for the groups' channels lie in the same cache lines and pages. But where there
// are few columns, or classes of windows for each of which P is packed, a thread had better keep to a block of the groups,
// if these can be dealt out evenly.
Division forward_division(const Shape& shape, int64_t bytes, int64_t threads) {
  const int64_t columns = columns_of_group(shape), busy = divide_up(4 * threads, shape.groups);
  if (!keeps_groups(shape)) return {std::clamp<int64_t>(columns / (2 * kFewColumns), 1, busy), 1};
  const int64_t classes = int64_t(window_classes(shape).size());
  const bool few = columns < kFewColumns * threads * divide_up(classes, kFewClasses);
  if (few && shape.groups % threads != 0) return {std::clamp<int64_t>(columns / (4 * kPanelColumns), 1, busy), 1};
  const int64_t panels = divide_up(columns, kPanelColumns), near = std::max<int64_t>(1, kNearBytes * panels / bytes);
  return {std::clamp<int64_t>(divide_up(panels, near), few ? 1 : busy, panels), few ? threads : 1};
}

// Whether a forward asks for whole shares ahead: where they are near, tokens lie side by side, and a small window leaves it
// waiting for memory. In half precision there is less to wait for.
bool streams(const Arguments& a, int64_t bytes, const Division& division) {
  constexpr int64_t kFewTokens = 64;
  return division.blocks == 1 && division.splits > 1 && bytes <= kNearBytes * division.splits &&
         a.shape.window_tokens() <= kFewTokens && a.x.element_size() >= 4 &&
         view_of(a.x).map[kRank - 1] == 2 * a.shape.channels;
}

// Of a backward, where sums cross units: a function of the shape alone. Few units are dealt out unevenly, and half as large
// ones are worth it then.
int64_t backward_splits(const Shape& shape) {
  const int64_t columns = columns_of_group(shape), even = std::min(columns / kFewColumns, divide_up(kUnits / 2, shape.groups));
  return std::clamp<int64_t>(std::max(columns / (2 * kFewColumns), even), 1, divide_up(kUnits, shape.groups));
}

Call call_of(const Arguments& a, const Division& division) {
  Call call{};
  call.shape = a.shape;
  call.storage = storage_of(a.x.scalar_type());
  call.softmax = a.softmax;
  call.activation = a.activation;
  call.eps = a.eps;
  call.x = a.x.const_data_ptr();
  call.x_view = view_of(a.x);
  call.table = a.data(a.table);
  call.bias = a.data(a.bias);
  call.matrix = a.data(a.matrix);
  call.matrix_per_group = a.matrix_per_group;
  call.norm_weight = a.data(a.norm_weight);
  call.norm_bias = a.data(a.norm_bias);
  call.splits = division.splits;
  call.blocks = division.blocks;
  call.norm_blocks = std::clamp<int64_t>(a.shape.batch * a.shape.map_tokens(), 1, kNormBlocks);
  return call;
}

// The means and inverse deviations of X1's tokens, kept alive by the caller.
Tensor norm_statistics(const Arguments& a, Call& call, const Kernels& kernels) {
  const int64_t tokens = call.shape.batch * call.shape.map_tokens();
  Tensor statistics = a.workspace({call.norm_weight ? 2 * tokens : 0});
  if (!call.norm_weight) return statistics;
  char* data = static_cast<char*>(statistics.mutable_data_ptr());
  call.norm_mean = data;
  call.norm_rstd = data + tokens * int64_t(call.storage == Storage::float64 ? sizeof(double) : sizeof(float));
  torch::stable::parallel_for(0, tokens, 64, [&](int64_t first, int64_t last) { kernels.statistics(call, first, last); });
  return statistics;
}

// Runs a kernel on all units of a call, so many times, in as many threads as there are. Where parallel_for, inside of
// another, has one thread alone, that takes all of them.
void deal_out(Call& call, size_t times, void (*kernel)(const Call&, int64_t thread)) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), call.units());
  std::vector<Deal> deals;
  for (size_t i = 0; i < times; ++i) deals.emplace_back(call.units(), threads);
  call.deals = deals.data();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) { kernel(call, first); });
}

Tensor forward(const Tensor& x, const MaybeTensor& table, const MaybeTensor& bias, const MaybeTensor& matrix,
               const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Sizes& window, const Sizes& shift,
               bool softmax, int64_t activation, double eps) {
  const Arguments a(x, table, bias, matrix, norm_weight, norm_bias, window, shift, softmax, activation, eps);
  Tensor z = new_tensor(a.x, a.z_sizes());
  if (z.numel() == 0) return z;  // there are no windows
  const int64_t threads = torch::stable::get_num_threads(), bytes = x.numel() * x.element_size();
  const Division division = forward_division(a.shape, bytes, threads);
  Call call = call_of(a, division);
  const Kernels& kernels = choose_kernels();
  call.streams = streams(a, bytes, division);
  call.z = z.mutable_data_ptr();
  const Tensor statistics = norm_statistics(a, call, kernels);
  deal_out(call, window_classes(a.shape).size(), kernels.forward);
  return z;
}

template <class A>
void add_parts(const Tensor& parts, Tensor& sums) {
  const int64_t size = sums.numel(), count = parts.numel() / size;
  const A* const from = static_cast<const A*>(parts.const_data_ptr());
  A* const to = static_cast<A*>(sums.mutable_data_ptr());
  constexpr int64_t kBlock = 256, kGrain = 1 << 16;  // numbers: of double sums at hand, and worth a thread
  torch::stable::parallel_for(0, size, std::max(kBlock, kGrain / count), [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += kBlock) {
      double block[kBlock] = {};
      const int64_t length = std::min(kBlock, last - i);
      for (int64_t part = 0; part < count; ++part)
        for (int64_t k = 0; k < length; ++k) block[k] += double(from[part * size + i + k]);
      for (int64_t k = 0; k < length; ++k) to[i + k] = A(block[k]);
    }
  });
}

// The sum of partial gradients, in the shape of the parameter; empty if it is not wanted.
Tensor sum_parts(const Arguments& a, const MaybeTensor& parameter, const std::optional<Tensor>& parts) {
  if (!parts) return a.workspace({0});
  if (parts->numel() == parameter->numel()) return *parts;  // a single one
  Tensor sums = a.workspace(sizes_of(*parameter));
  (a.parameter_type == ScalarType::Double ? add_parts<double> : add_parts<float>)(*parts, sums);
  return sums;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& dz, const Tensor& x, const MaybeTensor& table, const MaybeTensor& bias,
                   const MaybeTensor& matrix, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                   const Sizes& window, const Sizes& shift, bool softmax, int64_t activation, double eps,
                   bool mixing_grad) {
  const Arguments a(x, table, bias, matrix, norm_weight, norm_bias, window, shift, softmax, activation, eps);
  Call call = call_of(a, {backward_splits(a.shape), 1});
  const Shape& shape = call.shape;
  const int64_t n = shape.window_tokens(), part_count = call.units();
  const Tensor gradient = a.gradient(dz);
  call.dz = gradient.const_data_ptr();
  call.dz_view = view_of(gradient);
  Tensor dx = new_tensor(a.x, sizes_of(x));
  call.dx = dx.mutable_data_ptr();

  // A gradient's parts; in the shape of the parameter if they are its groups' and nothing has to be summed.
  const auto parts = [&](const MaybeTensor& parameter, bool wanted, int64_t count, int64_t size, void*& data) {
    std::optional<Tensor> tensor;
    if (parameter && wanted) {
      tensor = a.workspace(count * size == parameter->numel() ? sizes_of(*parameter) : Sizes{count, size});
      data = tensor->mutable_data_ptr();
    }
    return tensor;
  };
  const auto dtable = parts(a.table, mixing_grad, part_count, shape.table_size(), call.dtable_parts);
  const auto dmatrix = parts(a.matrix, mixing_grad, part_count, n * n, call.dmatrix_parts);
  const auto dbias = parts(a.bias, true, part_count, n, call.dbias_parts);
  const bool norm = call.norm_weight != nullptr;
  const auto dnorm_weight = parts(a.norm_weight, norm, call.norm_blocks, shape.channels, call.dnorm_weight_parts);
  const auto dnorm_bias = parts(a.norm_bias, norm, call.norm_blocks, shape.channels, call.dnorm_bias_parts);
  const Tensor dx_normed = a.workspace({norm ? shape.batch * shape.map_tokens() * shape.channels : 0});
  if (norm) call.dx_normed = dx_normed.mutable_data_ptr();

  const Kernels& kernels = choose_kernels();
  const Tensor statistics = norm_statistics(a, call, kernels);
  deal_out(call, 1, kernels.backward);
  if (norm)
    torch::stable::parallel_for(0, call.norm_blocks, 1,
                                [&](int64_t first, int64_t last) { kernels.norm_backward(call, first, last); });
  return {dx,
          sum_parts(a, a.table, dtable),
          sum_parts(a, a.bias, dbias),
          sum_parts(a, a.matrix, dmatrix),
          sum_parts(a, a.norm_weight, dnorm_weight),
          sum_parts(a, a.norm_bias, dnorm_bias)};
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
