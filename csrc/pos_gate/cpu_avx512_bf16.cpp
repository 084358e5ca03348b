// The gate's kernels for AVX-512 with products of bfloat16, two in the place of one float, summed in float32.
#include "cpu.h"

#ifdef POSMLP_X86_BF16_KERNELS

#include "cpu_gelu_pieces.h"
#include "cpu_includes.h"

// Where one vector is not within another as bits of an integer, of lanes of 4 or 8 bytes.
#define POSMLP_MASK_NOT_WITHIN(a, b, bytes)                                           \
  uint64_t((bytes) == 4 ? _mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_NLE_UQ) \
                        : _mm512_cmp_pd_mask((__m512d)(a), (__m512d)(b), _CMP_NLE_UQ))
#define POSMLP_F16C        // conversions of float16
#define POSMLP_LANE_MASKS  // loads and stores of a vector's first lanes
#define POSMLP_AVX512      // intrinsics, where compilers do not find them
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
