// Sums in a fixed order: over the lanes of a warp, over the warps of a block, over the partial sums of many blocks.
#pragma once

#include "cuda_call.h"
#include "cuda_walk.cuh"

namespace posmlp::cuda {

constexpr int kLanes = 32;

template <class A>
POSMLP_DEVICE A warp_sum(A value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
template <class A>
POSMLP_DEVICE A warp_max(A value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const A other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Sums as wide as a warp that the warps of a block share out: each lane has one in mind, neighbours in memory by
// neighbours, and each warp has every kWarps-th of its terms. The first warp gets the sums.
struct Columns {
  static constexpr int kThreads = 256, kWarps = kThreads / kLanes;
  template <class A>
  static constexpr int64_t kBytes = kThreads * int64_t(sizeof(A));

  static int64_t blocks(int64_t columns) { return divide_up(columns, kLanes); }
  POSMLP_DEVICE static int lane() { return thread_index() % kLanes; }
  POSMLP_DEVICE static int warp() { return thread_index() / kLanes; }

  template <class A>
  POSMLP_DEVICE static A sum_over_warps(A value, char* shared) {
    A* s_values = reinterpret_cast<A*>(shared);
    s_values[thread_index()] = value;
    sync_threads();
    A sum = 0;
    if (warp() == 0)
      for (int w = 0; w < kWarps; ++w) sum += s_values[w * kLanes + lane()];
    return sum;
  }
};

// parts [count, size] -> sums [size].
template <class T>
struct ReduceKernel {
  using A = Accumulation<T>;
  struct Arguments {
    const A* parts;
    A* sums;
    int64_t count, size;
  };
  static constexpr int kThreads = Columns::kThreads;
  static constexpr int64_t kSharedBytes = Columns::kBytes<A>;
  static int64_t grid(const Arguments& a) { return Columns::blocks(a.size); }

  POSMLP_DEVICE static void run(const Arguments& a, char* shared) {
    const int64_t column = block_index() * kLanes + Columns::lane();
    A sum = 0;
    if (column < a.size)
      for (int64_t p = Columns::warp(); p < a.count; p += Columns::kWarps) sum += a.parts[p * a.size + column];
    sum = Columns::sum_over_warps(sum, shared);
    if (Columns::warp() == 0 && column < a.size) a.sums[column] = sum;
  }
};

// The bias' gradient: dbias_parts [classes, splits, S, N], by the tokens of a class -> dbias [N], by place.
template <class T>
struct BiasKernel {
  using A = Accumulation<T>;
  using Arguments = Call<T>;
  static constexpr int kThreads = Columns::kThreads;
  static constexpr int64_t kSharedBytes = Columns::kBytes<A>;
  static int64_t grid(const Arguments& call) { return Columns::blocks(call.shape.window_tokens()); }

  POSMLP_DEVICE static void run(const Arguments& call, char* shared) {
    const int64_t n = call.shape.window_tokens(), parts = call.splits * call.shape.groups;
    const int64_t index = block_index() * kLanes + Columns::lane();
    const auto token = window_walk(call.shape, index < n ? index : 0, 0);
    const int64_t place[kRank] = {token.at[0], token.at[1], token.at[2]};
    A sum = 0;
    for (int k = 0; k < call.class_count; ++k) {
      const int64_t i = call.classes[k].index_of(place);
      if (i < 0 || index >= n) continue;
      for (int64_t p = Columns::warp(); p < parts; p += Columns::kWarps)
        sum += call.dbias_parts[(k * parts + p) * n + i];
    }
    sum = Columns::sum_over_warps(sum, shared);
    if (Columns::warp() == 0 && index < n) call.dbias[index] = sum;
  }
};

}  // namespace posmlp::cuda
