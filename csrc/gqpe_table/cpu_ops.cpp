// The `cpu` overloads of gqpe_table and its backward: outputs, threads, and the registration.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "arguments.h"

namespace posmlp::gqpe {
namespace {

constexpr int64_t kGrain = 8192;  // table entries, some microseconds: less is not worth another thread

// Calls work(parameters, g) for every group g. A group is a unit of work: no result depends on the threads.
template <typename T, typename Work>
void for_each_group(const Arguments& a, Work work) {
  const T *c = static_cast<const T*>(a.center.const_data_ptr()), *m = static_cast<const T*>(a.factor.const_data_ptr());
  const int rank = a.rank, skipped = kRank - rank;
  torch::stable::parallel_for(0, a.groups, std::max<int64_t>(1, kGrain / a.entries), [&](int64_t first, int64_t last) {
    Group parameters = a.group;
    for (int64_t g = first; g < last; ++g) {
      for (int i = 0; i < rank; ++i) {
        parameters.center[skipped + i] = double(c[g * rank + i]);
        for (int k = 0; k < rank; ++k)
          parameters.factor[skipped + i][skipped + k] = double(m[(g * rank + i) * rank + k]);
      }
      work(parameters, g);
    }
  });
}

// Calls run(T()) with the parameters' type.
template <typename Run>
void dispatch(const Arguments& a, Run run) {
  a.is_double ? run(double()) : run(float());
}

Tensor forward(const Tensor& center, const Tensor& factor, const Sizes& window) {
  const Arguments a(center, factor, window);
  Tensor result = new_tensor(a.center, a.table_sizes);
  dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(result.mutable_data_ptr());
    for_each_group<T>(a, [&](const Group& group, int64_t g) { table(group, out + g * a.entries); });
  });
  return result;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dtable, const Tensor& center, const Tensor& factor,
                                    const Sizes& window) {
  const Arguments a(center, factor, window);
  const Tensor gradient = a.gradient(dtable);
  Tensor dcenter = new_tensor(a.center, sizes_of(center));
  Tensor dfactor = new_tensor(a.center, sizes_of(factor));
  dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(gradient.const_data_ptr());
    T *dc = static_cast<T*>(dcenter.mutable_data_ptr()), *dm = static_cast<T*>(dfactor.mutable_data_ptr());
    for_each_group<T>(a, [&](const Group& group, int64_t g) {
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
