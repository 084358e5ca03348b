// The gate's kernels for AVX-512 with products of bfloat16, two in the place of one float, summed in float32.
#include "cpu.h"

#ifdef POSMLP_X86_BF16_KERNELS

#include "cpu_includes.h"

// The lanes' signs as bits of an integer, of lanes of 4 or 8 bytes.
#define POSMLP_MASK_OF(v, bytes) \
  uint64_t((bytes) == 4 ? _mm512_movepi32_mask((__m512i)(v)) : _mm512_movepi64_mask((__m512i)(v)))
#define POSMLP_F16C        // conversions of float16
#define POSMLP_LANE_MASKS  // loads and stores of a vector's first lanes
#define POSMLP_KEEP(v) __asm__("" : "+v"(v))
#define POSMLP_BF16_DOT    // products and conversions of bfloat16

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

namespace posmlp::cpu {
namespace {
constexpr int kVectorBytes = 64, kTileRows = 7, kLeastRows = 4, kTileVectors = 3;
}
#include "cpu_kernels.h"
}  // namespace posmlp::cpu

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace posmlp::cpu {
const Kernels kAvx512Bf16 = {"avx512_bf16", statistics, forward, backward, norm_backward};
}

#endif
