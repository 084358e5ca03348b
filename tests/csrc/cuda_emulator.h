// What cuda_platform.h has from CUDA, for a CPU: each word with the semantics and the demands of its instruction, on
// the machine of cuda_machine.h. Included by cuda_platform.h where the compiler is not nvcc.
#pragma once

#include <cmath>

#include "cuda_machine.h"

namespace posmlp::cuda {

namespace emulator {

// Four 8 x 8 matrices of 16-bit values; see cuda_platform.h for who has what.
struct MatrixRow {
  const void* row;
  uint32_t* r;
};
inline void load_matrices(const char* what, const void* row, uint32_t (&r)[4], bool transposed) {
  machine.check_shared(row, 16, 16, what);
  MatrixRow operand{row, r};
  machine.sync_warp(what, &operand, [=](void* const* operands) {
    const auto lane_of = [&](int lane) { return static_cast<const MatrixRow*>(operands[lane]); };
    for (int lane = 0; lane < kWarp; ++lane)
      for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int k = 0; k < 2; ++k) {
          const int i = lane / 4, j = 2 * (lane % 4) + k, row = transposed ? j : i, column = transposed ? i : j;
          std::memcpy(&pair[k], static_cast<const char*>(lane_of(8 * m + row)->row) + 2 * column, 2);
        }
        lane_of(lane)->r[m] = pair[0] | uint32_t(pair[1]) << 16;
      }
  });
}

}  // namespace emulator

inline int thread_index() { return emulator::machine.thread(); }
inline int64_t block_index() { return emulator::machine.block(); }
inline void sync_threads() { emulator::machine.sync_block(); }

template <class A>
A shuffle_xor(A value, int mask) {
  A operand[2] = {value, 0};
  emulator::machine.sync_warp("shuffle_xor", operand, [=](void* const* operands) {
    for (int lane = 0; lane < emulator::kWarp; ++lane)
      static_cast<A*>(operands[lane])[1] = *static_cast<const A*>(operands[lane ^ mask]);
  });
  return operand[1];
}

inline float to_accumulation(float x) { return x; }
inline double to_accumulation(double x) { return x; }
inline float to_accumulation(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float to_accumulation(Half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(fraction), -24)
                                     : std::ldexp(float(fraction + 1024), exponent - 25);
  return x.bits >> 15 ? -size : size;
}

// To the nearest, of two as near to the even one.
template <class T>
T round_to(Accumulation<T> x) { return x; }
template <>
inline Bf16 round_to<Bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {uint16_t(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half round_to<Half>(float x) {
  if (x != x) return {0x7fff};
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size >= 65520.f) return {uint16_t(sign | 0x7c00)};
  if (size < 0x1p-14f) return {uint16_t(sign | uint16_t(std::nearbyint(size * 0x1p24f)))};  // steps of 2^-24
  uint32_t bits;
  std::memcpy(&bits, &size, 4);
  return {uint16_t(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)))};
}

template <class T>
uint32_t round_pair(float first, float second) {
  return round_to<T>(first).bits | uint32_t(round_to<T>(second).bits) << 16;
}

template <int bytes>
void copy_async(void* shared, const void* global, bool valid) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  emulator::machine.check_shared(shared, bytes, bytes, "copy_async");
  if (uintptr_t(global) % bytes) emulator::machine.fail("copy_async: a global address not aligned to %d bytes", bytes);
  std::memset(shared, 0xff, bytes);
  emulator::machine.copies().push_back({shared, valid ? global : nullptr, bytes});
}
inline void copies_commit() { emulator::machine.commit_copies(); }
template <int pending>
void copies_wait() { emulator::machine.wait_copies(pending); }

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulator::load_matrices("load_matrices", row, r, false);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulator::load_matrices("load_matrices_transposed", row, r, true);
}

namespace emulator {

struct Product {
  const uint32_t *a, b[2];
  float* d;
};
// Element `index` of a register's pair.
template <class T>
float element(uint32_t pair, int index) { return to_accumulation(T{uint16_t(pair >> 16 * index)}); }

template <class T>
void multiply_add(void* const* operands) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Product& p = *static_cast<const Product*>(operands[lane]);
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int half = 0; half < 4; ++half)
      for (int k = 0; k < 2; ++k) a[g + half % 2 * 8][t + half / 2 * 8 + k] = element<T>(p.a[half], k);
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 2; ++k) b[t + half * 8 + k][g] = element<T>(p.b[half], k);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = static_cast<const Product*>(operands[lane])->d;
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = 2 * (lane % 4) + e % 2;
      double sum = d[e];
      for (int k = 0; k < 16; ++k) sum += double(a[row][k]) * double(b[k][column]);
      d[e] = float(sum);
    }
  }
}

}  // namespace emulator

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  emulator::Product product{a, {b0, b1}, d};
  emulator::machine.sync_warp("multiply_add", &product, &emulator::multiply_add<T>);
}

class EmulatedLauncher {
 public:
  template <class Kernel>
  void launch(const typename Kernel::Arguments& arguments, int64_t grid, int64_t shared_bytes,
              int threads = Kernel::kThreads) {
    static_assert(Kernel::kThreads % emulator::kWarp == 0 && Kernel::kThreads <= emulator::kMostThreads);
    static_assert(sizeof(arguments) <= emulator::kMostArguments);
    const auto body = [](const void* values, char* shared) {
      Kernel::run(*static_cast<const typename Kernel::Arguments*>(values), shared);
    };
    emulator::machine.launch(body, &arguments, threads, grid, shared_bytes);
  }
};

}  // namespace posmlp::cuda
