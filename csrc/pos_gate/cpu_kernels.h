// The kernels of one instruction set. The including file sets the target options, defines the constants kVectorBytes,
// kTileRows and kTileVectors of the micro-kernel, and kLeastRows, to which a tile may shrink, and names the table of what
// this makes; everything below has internal linkage, so that no two instruction sets share a function.

namespace {

#include "cpu_vector.h"

#include "cpu_storage.h"

#include "cpu_activation.h"

#include "cpu_columns.h"

#include "cpu_seats.h"

#include "cpu_wanted.h"

#include "cpu_packed.h"

#include "cpu_gemm.h"

#include "cpu_weights.h"

#ifdef POSMLP_AMX
#include "cpu_packing_amx.h"
#else
#include "cpu_packing.h"
#endif

#include "cpu_mixing_gradient.h"

#include "cpu_row_sums.h"

#include "cpu_correlate.h"

#include "cpu_table_gradient.h"

#include "cpu_mixing.h"

#include "cpu_workspace.h"

#include "cpu_way_in.h"

#include "cpu_way_out.h"

#include "cpu_products.h"

#include "cpu_gate.h"

#include "cpu_norm.h"

// Subnormal results become zero while a kernel runs: products with far weights make them by the thousand, each costs
// a hundred cycles, and none can be seen beside the normal numbers of a sum. Subnormal inputs are read as they are.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8000u); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t(1) << 24)));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

#ifndef POSMLP_AMX  // which multiplies bfloat16 alone
template <template <class> class Worker, class Work>
void run(const Call& call, Work&& work) {
  const FlushSubnormals flush;
  switch (call.storage) {
    case Storage::float32: { Worker<float> worker(call); return work(worker); }
    case Storage::float64: { Worker<double> worker(call); return work(worker); }
    case Storage::bfloat16: { Worker<Bfloat16> worker(call); return work(worker); }
    case Storage::float16: { Worker<Float16> worker(call); return work(worker); }
  }
}

void statistics(const Call& call, int64_t first, int64_t last) {
  run<Norm>(call, [=](auto& norm) { norm.statistics(first, last); });
}
void forward(const Call& call, int64_t thread) {
  run<Gate>(call, [=](auto& gate) { gate.forward(thread); });
}
void backward(const Call& call, int64_t thread) {
  run<Gate>(call, [=](auto& gate) { gate.backward(thread); });
}
void norm_backward(const Call& call, int64_t first, int64_t last) {
  run<Norm>(call, [=](auto& norm) { norm.backward(first, last); });
}
#endif

}  // namespace
