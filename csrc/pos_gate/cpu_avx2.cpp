// The gate's kernels for AVX2 and FMA, 16 registers of 8 floats.
#include "cpu.h"

#ifdef POSMLP_X86_KERNELS

#include "cpu_includes.h"

#define POSMLP_F16C  // conversions of float16
// The lanes' signs as bits of an integer, of lanes of 4 or 8 bytes.
#define POSMLP_MASK_OF(v, bytes) \
  uint64_t((bytes) == 4 ? _mm256_movemask_ps((__m256)(v)) : _mm256_movemask_pd((__m256d)(v)))

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
