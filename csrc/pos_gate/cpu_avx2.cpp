// The gate's kernels for AVX2 and FMA, 16 registers of 8 floats.
#include "cpu.h"

#ifdef POSMLP_X86_KERNELS

#include "cpu_includes.h"

#define POSMLP_F16C  // conversions of float16
// Where one vector is not within another as bits of an integer, of lanes of 4 or 8 bytes.
#define POSMLP_MASK_NOT_WITHIN(a, b, bytes)                                                          \
  uint64_t((bytes) == 4 ? _mm256_movemask_ps(_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_NLE_UQ)) \
                        : _mm256_movemask_pd(_mm256_cmp_pd((__m256d)(a), (__m256d)(b), _CMP_NLE_UQ)))

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace posmlp::cpu {
namespace {
constexpr int kVectorBytes = 32, kTileRows = 4, kLeastRows = 2, kTileVectors = 3;
}
#include "cpu_kernels.h"
}  // namespace posmlp::cpu

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace posmlp::cpu {
const Kernels kAvx2 = {"avx2", statistics, forward, backward, norm_backward};
}

#endif
