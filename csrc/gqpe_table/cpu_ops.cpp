// The `cpu` overloads of gqpe_table and its backward: contract checks, outputs, threads, and the registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "table.h"

namespace posmlp::gqpe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

constexpr int64_t kGrain = 32768;  // table entries, tens of microseconds: less is not worth waking a thread

Sizes sizes_of(const Tensor& tensor) { return Sizes(tensor.sizes().begin(), tensor.sizes().end()); }

struct Arguments {
  Tensor center, factor;
  int rank;
  int64_t groups, entries = 1;
  Sizes table_sizes;
  Group group;  // its rank and window are every group's

  Arguments(const Tensor& c, const Tensor& m, const Sizes& window)
      : center(torch::stable::contiguous(c)), factor(torch::stable::contiguous(m)), rank(int(window.size())) {
    STD_TORCH_CHECK(rank >= 1 && rank <= kRank, "gqpe_table: window must have 1 to 3 sizes, got ", rank);
    STD_TORCH_CHECK(center.dim() == 2 && center.size(1) == rank, "gqpe_table: center must be [S, ", rank, "]");
    group.rank = rank;
    groups = center.size(0);
    STD_TORCH_CHECK(sizes_of(factor) == (Sizes{groups, rank, rank}), "gqpe_table: factor must be [S, d, d]");
    STD_TORCH_CHECK(center.is_cpu() && factor.is_cpu() && center.scalar_type() == factor.scalar_type(),
                    "gqpe_table: center and factor must share a dtype, on the CPU");
    table_sizes.push_back(groups);
    for (int d = 0; d < rank; ++d) {
      STD_TORCH_CHECK(window[d] >= 1, "gqpe_table: window must be at least 1 in every dimension, got ", window[d]);
      group.window[kRank - rank + d] = window[d];
      table_sizes.push_back(2 * window[d] - 1);
      entries *= table_sizes.back();
    }
  }

  // Calls work(parameters, g) for every group g. A group is a unit of work: no result depends on the threads.
  template <typename T, typename Work>
  void for_each_group(Work work) const {
    const T *c = static_cast<const T*>(center.const_data_ptr()), *m = static_cast<const T*>(factor.const_data_ptr());
    torch::stable::parallel_for(0, groups, std::max<int64_t>(1, kGrain / entries), [&](int64_t first, int64_t last) {
      Group parameters = group;
      const int skipped = kRank - rank;
      for (int64_t g = first; g < last; ++g) {
        for (int a = 0; a < rank; ++a) {
          parameters.center[skipped + a] = double(c[g * rank + a]);
          for (int k = 0; k < rank; ++k)
            parameters.factor[skipped + a][skipped + k] = double(m[(g * rank + a) * rank + k]);
        }
        work(parameters, g);
      }
    });
  }
};

// Calls run(T()) with the parameters' type.
template <typename Run>
void dispatch(const Tensor& tensor, Run run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(float());
    case ScalarType::Double: return run(double());
    default: STD_TORCH_CHECK(false, "gqpe_table: center must be float32 or float64");
  }
}

Tensor forward(const Tensor& center, const Tensor& factor, const Sizes& window) {
  const Arguments a(center, factor, window);
  Tensor result = torch::stable::new_empty(a.center, a.table_sizes);
  dispatch(a.center, [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(result.mutable_data_ptr());
    a.for_each_group<T>([&](const Group& group, int64_t g) { table(group, out + g * a.entries); });
  });
  return result;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dtable, const Tensor& center, const Tensor& factor,
                                    const Sizes& window) {
  const Arguments a(center, factor, window);
  STD_TORCH_CHECK(
      dtable.is_cpu() && sizes_of(dtable) == a.table_sizes && dtable.scalar_type() == a.center.scalar_type(),
      "gqpe_table_backward: dtable must have the table's shape, dtype and device");
  const Tensor gradient = torch::stable::contiguous(dtable);
  Tensor dcenter = torch::stable::new_empty(a.center, sizes_of(center));
  Tensor dfactor = torch::stable::new_empty(a.center, sizes_of(factor));
  dispatch(a.center, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(gradient.const_data_ptr());
    T *dc = static_cast<T*>(dcenter.mutable_data_ptr()), *dm = static_cast<T*>(dfactor.mutable_data_ptr());
    a.for_each_group<T>([&](const Group& group, int64_t g) {
      double c[kRank] = {}, m[kRank][kRank] = {};
      table_backward(group, in + g * a.entries, c, m);
      const int rank = a.rank, skipped = kRank - rank;
      for (int i = 0; i < rank; ++i) {
        dc[g * rank + i] = T(c[skipped + i]);
        for (int k = 0; k < rank; ++k) dm[(g * rank + i) * rank + k] = T(m[skipped + i][skipped + k]);
      }
    });
  });
  return {dcenter, dfactor};
}

}  // namespace

// The schemas of posmlp_kernels/gqpe_table/ops.py; here too so that a C++ program needs no Python.
STABLE_TORCH_LIBRARY_FRAGMENT(posmlp_kernels, m) {
  m.def("gqpe_table.cpu(Tensor center, Tensor factor, int[] window) -> Tensor");
  m.def("gqpe_table_backward.cpu(Tensor dtable, Tensor center, Tensor factor, int[] window) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(posmlp_kernels, CPU, m) {
  m.impl("gqpe_table.cpu", TORCH_BOX(&forward));
  m.impl("gqpe_table_backward.cpu", TORCH_BOX(&backward));
}

}  // namespace posmlp::gqpe
