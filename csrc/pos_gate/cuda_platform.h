// The few words of CUDA that the kernels speak.
//
// Under nvcc they are CUDA. A plain C++ compiler takes them from cuda_emulator.h (in tests/csrc), which runs the same
// kernels on a CPU, thread by thread and with the semantics of each instruction: so that they are tested on machines
// that have no GPU.
#pragma once

#include <math.h>  // not cmath: both compilers know its overloads for float by their plain names

#include <type_traits>

#include "shape.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define POSMLP_DEVICE __device__ __forceinline__
#define POSMLP_UNROLL _Pragma("unroll")
#else
#define POSMLP_DEVICE inline
#define POSMLP_UNROLL
#endif

namespace posmlp::cuda {

// The 16-bit types as they lie in memory.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <class T>
using Accumulation = typename AccumulationOf<T>::type;

}  // namespace posmlp::cuda

#ifdef __CUDACC__

namespace posmlp::cuda {

POSMLP_DEVICE int thread_index() { return int(threadIdx.x); }
POSMLP_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }
POSMLP_DEVICE void sync_threads() { __syncthreads(); }
POSMLP_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
POSMLP_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

POSMLP_DEVICE float to_accumulation(float x) { return x; }
POSMLP_DEVICE double to_accumulation(double x) { return x; }
POSMLP_DEVICE float to_accumulation(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
POSMLP_DEVICE float to_accumulation(Half x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
POSMLP_DEVICE T round_to(Accumulation<T> x) { return x; }
template <>
POSMLP_DEVICE Bf16 round_to<Bf16>(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
template <>
POSMLP_DEVICE Half round_to<Half>(float x) { return {__half_as_ushort(__float2half_rn(x))}; }

// Two at once: the first in the lower half of the word.
template <class T>
POSMLP_DEVICE uint32_t round_pair(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, Bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Copies `bytes` (4, 8 or 16, aligned to as much) from global to shared memory, without waiting; zeros if not `valid`.
template <int bytes>
POSMLP_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  const int size = valid ? bytes : 0;
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(bytes), "r"(size)
                 : "memory");
}
POSMLP_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last `pending` committed groups of this thread's copies have arrived.
template <int pending>
POSMLP_DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// Four 8 x 8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8 and gets, of each
// matrix, row l / 4 and columns 2 (l % 4) and the next, or of the transposed matrix.
POSMLP_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(unsigned(__cvta_generic_to_shared(row))) : "memory");
}
POSMLP_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(unsigned(__cvta_generic_to_shared(row))) : "memory");
}

// d += a b, 16 x 16 by 16 x 8. Lane l holds, with g = l / 4 and t = 2 (l % 4), pairs of neighbouring columns t and t + 1
// of a: (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8); pairs of neighbouring rows of b: (t, g), (t + 8, g);
// and of d: (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1).
#define POSMLP_MULTIPLY_ADD(type)                                                                           \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                              \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                           \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
POSMLP_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  POSMLP_MULTIPLY_ADD("bf16");
}
POSMLP_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  POSMLP_MULTIPLY_ADD("f16");
}
#undef POSMLP_MULTIPLY_ADD

// How every kernel is entered: `Kernel` has `Arguments`, `kThreads`, and `run`.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    enter(const __grid_constant__ typename Kernel::Arguments arguments) {
  extern __shared__ __align__(128) char shared[];
  Kernel::run(arguments, shared);
}

}  // namespace posmlp::cuda

#else
#include "cuda_emulator.h"
#endif
