// The quadratic table and its gradients on a GPU: a block a group, one launch for each direction (mathematics: table.h).
//
// A table is a few KB: what counts is the launch. In double, as on the CPU, and for the same reasons.
#pragma once

#include "cuda_platform.h"
#include "table.h"

namespace posmlp::cuda {

// Values and gradients as the operator has them: center [S, d], factor [S, d, d], table [S, entries].
template <class A>
struct TableCall {
  gqpe::Group window;  // every group's: rank and window
  const A *center, *factor, *dtable;
  A *table, *dcenter, *dfactor;
  int64_t groups;

  POSMLP_BOTH int64_t entries() const { return window.extent(0) * window.extent(1) * window.extent(2); }

  POSMLP_BOTH gqpe::Group group(int64_t g) const {
    gqpe::Group group = window;
    const int rank = window.rank, skipped = gqpe::kRank - rank;
    for (int a = 0; a < rank; ++a) {
      group.center[skipped + a] = double(center[g * rank + a]);
      for (int k = 0; k < rank; ++k) group.factor[skipped + a][skipped + k] = double(factor[(g * rank + a) * rank + k]);
    }
    return group;
  }

  // u of a table's entry.
  POSMLP_BOTH void offsets(const gqpe::Group& group, int64_t entry, double (&u)[gqpe::kRank]) const {
    for (int d = gqpe::kRank - 1; d >= 0; --d) {
      u[d] = group.offset(d, entry % group.extent(d));
      entry /= group.extent(d);
    }
  }
};

template <class A>
struct QuadraticTableKernel {
  using Arguments = TableCall<A>;
  static constexpr int kThreads = 256;
  static constexpr int64_t kSharedBytes = 0;
  static POSMLP_BOTH int64_t grid(const Arguments& call) { return call.groups; }

  static POSMLP_DEVICE void run(const Arguments& call, char*) {
    const gqpe::Group group = call.group(block_index());
    A* table = call.table + block_index() * call.entries();
    for (int64_t i = thread_index(); i < call.entries(); i += kThreads) {
      double u[gqpe::kRank], sum = 0;
      call.offsets(group, i, u);
      for (int k = 0; k < gqpe::kRank; ++k) {
        const double projected = group.factor[0][k] * u[0] + group.factor[1][k] * u[1] + group.factor[2][k] * u[2];
        sum += projected * projected;
      }
      table[i] = A(-0.5 * sum);
    }
  }
};

template <class A>
struct QuadraticTableBackwardKernel {
  using Arguments = TableCall<A>;
  static constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp, kSums = 9;  // s1, upper triangle of s2
  static constexpr int64_t kSharedBytes = kWarps * kSums * int64_t(sizeof(double));
  static POSMLP_BOTH int64_t grid(const Arguments& call) { return call.groups; }

  static POSMLP_DEVICE void run(const Arguments& call, char* shared) {
    const gqpe::Group group = call.group(block_index());
    const A* gradient = call.dtable + block_index() * call.entries();
    double sums[kSums] = {};
    for (int64_t i = thread_index(); i < call.entries(); i += kThreads) {
      double u[gqpe::kRank];
      call.offsets(group, i, u);
      const double value = double(gradient[i]);
      for (int a = 0, at = gqpe::kRank; a < gqpe::kRank; ++a) {
        sums[a] += value * u[a];
        for (int b = a; b < gqpe::kRank; ++b) sums[at++] += value * u[a] * u[b];
      }
    }
    double* parts = reinterpret_cast<double*>(shared);  // [kWarps, kSums]
    for (int k = 0; k < kSums; ++k) {
      for (int mask = kWarp / 2; mask; mask /= 2) sums[k] += shuffle_xor(sums[k], mask);
      if (thread_index() % kWarp == 0) parts[thread_index() / kWarp * kSums + k] = sums[k];
    }
    sync_threads();
    if (thread_index() == 0) finish(call, group, parts);
  }

 private:
  static POSMLP_DEVICE void finish(const Arguments& call, const gqpe::Group& group, const double* parts) {
    double s1[gqpe::kRank] = {}, s2[gqpe::kRank][gqpe::kRank] = {};
    for (int warp = 0; warp < kWarps; ++warp, parts += kSums)
      for (int a = 0, at = gqpe::kRank; a < gqpe::kRank; ++a) {
        s1[a] += parts[a];
        for (int b = a; b < gqpe::kRank; ++b) s2[a][b] += parts[at++];
      }
    double dcenter[gqpe::kRank] = {}, dfactor[gqpe::kRank][gqpe::kRank] = {};
    gqpe::add_gradients(group, s1, s2, dcenter, dfactor);
    const int rank = group.rank, skipped = gqpe::kRank - rank;
    for (int a = 0; a < rank; ++a) {
      call.dcenter[block_index() * rank + a] = A(dcenter[skipped + a]);
      for (int k = 0; k < rank; ++k)
        call.dfactor[(block_index() * rank + a) * rank + k] = A(dfactor[skipped + a][skipped + k]);
    }
  }
};

}  // namespace posmlp::cuda
