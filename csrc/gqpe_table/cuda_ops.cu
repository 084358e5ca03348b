// The `cuda` overloads of gqpe_table and its backward: outputs, launches, and the registration.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda_launch.h"
#include "arguments.h"
#include "cuda_table.cuh"

namespace posmlp::cuda {
namespace {

template <class A>
TableCall<A> call_of(const gqpe::Arguments& a) {
  TableCall<A> call{};
  call.window = a.group;
  call.center = static_cast<const A*>(a.center.const_data_ptr());
  call.factor = static_cast<const A*>(a.factor.const_data_ptr());
  call.groups = a.groups;
  return call;
}

template <class Kernel>
void run(const gqpe::Arguments& a, const char* op, const typename Kernel::Arguments& call) {
  if (a.groups > 0) Launcher(a.center, op).launch<Kernel>(call, Kernel::grid(call), Kernel::kSharedBytes);
}

template <class A>
void run_forward(const gqpe::Arguments& a, const Tensor& table) {
  TableCall<A> call = call_of<A>(a);
  call.table = static_cast<A*>(table.mutable_data_ptr());
  run<QuadraticTableKernel<A>>(a, "gqpe_table", call);
}

template <class A>
void run_backward(const gqpe::Arguments& a, const Tensor& dtable, const Tensor& dcenter, const Tensor& dfactor) {
  TableCall<A> call = call_of<A>(a);
  call.dtable = static_cast<const A*>(dtable.const_data_ptr());
  call.dcenter = static_cast<A*>(dcenter.mutable_data_ptr());
  call.dfactor = static_cast<A*>(dfactor.mutable_data_ptr());
  run<QuadraticTableBackwardKernel<A>>(a, "gqpe_table_backward", call);
}

Tensor gqpe_table(const Tensor& center, const Tensor& factor, const Sizes& window) {
  const gqpe::Arguments a(center, factor, window);
  const Tensor table = new_tensor(a.center, a.table_sizes);
  a.is_double ? run_forward<double>(a, table) : run_forward<float>(a, table);
  return table;
}

std::tuple<Tensor, Tensor> gqpe_table_backward(const Tensor& dtable, const Tensor& center, const Tensor& factor,
                                               const Sizes& window) {
  const gqpe::Arguments a(center, factor, window);
  const Tensor gradient = a.gradient(dtable);
  const Tensor dcenter = new_tensor(a.center, sizes_of(center));
  const Tensor dfactor = new_tensor(a.center, sizes_of(factor));
  a.is_double ? run_backward<double>(a, gradient, dcenter, dfactor)
              : run_backward<float>(a, gradient, dcenter, dfactor);
  return {dcenter, dfactor};
}

}  // namespace

// The schemas of posmlp_kernels/gqpe_table/ops.py; here too so that a C++ program needs no Python.
STABLE_TORCH_LIBRARY_FRAGMENT(posmlp_kernels, m) {
  m.def("gqpe_table.cuda(Tensor center, Tensor factor, int[] window) -> Tensor");
  m.def("gqpe_table_backward.cuda(Tensor dtable, Tensor center, Tensor factor, int[] window) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(posmlp_kernels, CUDA, m) {
  m.impl("gqpe_table.cuda", TORCH_BOX(&gqpe_table));
  m.impl("gqpe_table_backward.cuda", TORCH_BOX(&gqpe_table_backward));
}

}  // namespace posmlp::cuda
