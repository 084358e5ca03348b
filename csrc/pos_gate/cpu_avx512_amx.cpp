// The gate's kernels for Intel AMX (Sapphire Rapids and later): avx512_bf16 with the inner products of its bfloat16 gate on
// tile registers. What does not multiply pairs of bfloat16 is that set's own.
#include "cpu.h"

#ifdef POSMLP_X86_BF16_KERNELS

#include "cpu_gelu_pieces.h"
#include "cpu_includes.h"
#ifdef POSMLP_AMX_EMULATED
#include "amx_emulator.h"  // of the tests: the tile registers in software
#endif

#define POSMLP_F16C        // conversions of float16
#define POSMLP_LANE_MASKS  // loads and stores of a vector's first lanes
#define POSMLP_AVX512      // intrinsics, where compilers do not find them
#define POSMLP_KEEP(v) __asm__("" : "+v"(v))
#define POSMLP_BF16_DOT    // products and conversions of bfloat16
#define POSMLP_AMX         // products of tiles of bfloat16

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")
#endif

namespace posmlp::cpu {
namespace {
constexpr int kVectorBytes = 64, kTileRows = 16, kLeastRows = 16, kTileVectors = 3;
}
#include "cpu_kernels.h"

namespace {

void statistics(const Call& call, int64_t first, int64_t last) { kAvx512Bf16.statistics(call, first, last); }
void norm_backward(const Call& call, int64_t first, int64_t last) { kAvx512Bf16.norm_backward(call, first, last); }

void forward(const Call& call, int64_t thread) {
  if (call.storage != Storage::bfloat16) return kAvx512Bf16.forward(call, thread);
  const FlushSubnormals flush;
  const TileRegisters registers;
  Gate<Bfloat16>(call).forward(thread);
}
void backward(const Call& call, int64_t thread) {
  if (call.storage != Storage::bfloat16) return kAvx512Bf16.backward(call, thread);
  const FlushSubnormals flush;
  const TileRegisters registers;
  Gate<Bfloat16>(call).backward(thread);
}

}  // namespace
}  // namespace posmlp::cpu

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace posmlp::cpu {
const Kernels kAvx512Amx = {"avx512_amx", statistics, forward, backward, norm_backward};
}

#endif
