// A tile of the gate's products on ordinary multiply-add units: what its threads load, multiply, and own.
//
// (window, channel) is one long axis of columns, so that neither has to be a multiple of anything. A block of 256
// threads makes tiles of 64 x 64, each thread 4 x 4: per step of 16 in depth it reads 2 x 64 x 16 numbers and multiplies
// 64 x 64 x 16. P comes from memory, that is from the second-level cache, tile by tile; x is activated, and normed,
// on its way into shared memory.
#pragma once

#include "cuda_activation.cuh"
#include "cuda_reduce.cuh"

namespace posmlp::cuda {

// Where a column's first token lies in each tensor; channel of all groups, -1 beyond the last column.
struct Column {
  int64_t x, z, dz, dx, token;
  int channel;
};

template <class T>
class PlainTile {
 public:
  using A = Accumulation<T>;
  static constexpr int kThreads = 256, kSide = 64, kDepth = 16, kEach = 4;
  static constexpr int kStride = kSide + 4;  // quads stay aligned, and columns of a tile go to different banks
  static constexpr int64_t kSharedBytes = 2 * kDepth * kStride * int64_t(sizeof(A)) + kSide * int64_t(sizeof(Column));
  using Sums = A[kEach][kEach];

  static POSMLP_BOTH int64_t row_tiles(const WindowClass& cls) { return divide_up(cls.tokens(), kSide); }
  static POSMLP_BOTH int64_t columns(const Call<T>& call, const WindowClass& cls) {
    return cls.windows(call.shape.batch) * call.shape.group_channels();
  }
  static POSMLP_BOTH int64_t column_tiles(const Call<T>& call, const WindowClass& cls) {
    return divide_up(columns(call, cls), kSide);
  }

  // Which class an index belongs to that runs through `count(cls)` of each; the index becomes one of that class.
  template <class Count>
  static POSMLP_BOTH int find_class(const Call<T>& call, int64_t& index, Count&& count) {
    int k = 0;
    for (; index >= count(call.classes[k]); ++k) index -= count(call.classes[k]);
    return k;
  }
  template <class Count>
  static int64_t sum_of_classes(const Call<T>& call, Count&& count) {
    int64_t sum = 0;
    for (int k = 0; k < call.class_count; ++k) sum += count(call.classes[k]);
    return sum;
  }

  POSMLP_DEVICE PlainTile(const Call<T>& call, int k, int64_t group, char* shared)
      : call_(call), cls_(call.classes[k]), group_(group), tokens_(cls_.tokens()),
        mixing_(call.mixing_of(k, group)), s_left_(reinterpret_cast<A*>(shared + kSide * sizeof(Column))),
        s_right_(s_left_ + kDepth * kStride), s_columns_(reinterpret_cast<Column*>(shared)) {}

  // All 64 columns of a tile from the walk of the first 64 threads.
  POSMLP_DEVICE void find_columns(const Walk<2 + kRank>& walk, int64_t index) {
    sync_threads();
    if (thread_index() < kSide) s_columns_[thread_index()] = column_at(walk, index < columns(call_, cls_));
    sync_threads();
  }
  POSMLP_DEVICE const Column& column(int index) const { return s_columns_[index]; }

  // The loaders' values: of X1, and of G = dz * act(x2).
  POSMLP_DEVICE A x1(const Column& column, const Walk<kRank>& token) const {
    const A value = activate(call_.activation, to_accumulation(call_.x[column.x + offset_in(call_.x_view, token)]));
    if (!call_.norm_weight) return value;
    const int64_t t = column.token + offset_in(call_.shape.contiguous(1), token);
    const int64_t c = column.channel;
    return (value - call_.mean[t]) * call_.rstd[t] * call_.norm_weight[c] + call_.norm_bias[c];
  }
  POSMLP_DEVICE A raw_x2(const Column& column, const Walk<kRank>& token) const {
    return to_accumulation(call_.x[column.x + call_.shape.channels + offset_in(call_.x_view, token)]);
  }
  POSMLP_DEVICE A dz(const Column& column, const Walk<kRank>& token) const {
    return to_accumulation(call_.dz[column.dz + offset_in(call_.dz_view, token)]);
  }
  POSMLP_DEVICE A g(const Column& column, const Walk<kRank>& token) const {
    return dz(column, token) * activate(call_.activation, raw_x2(column, token));
  }

  // sums = P X1, or P^T G, at this tile's columns, for rows from `row` on.
  POSMLP_DEVICE void multiply_x1(int64_t row, Sums& sums) {
    multiply_columns<false>(row, sums, [&](const Column& c, const Walk<kRank>& token) { return x1(c, token); });
  }
  POSMLP_DEVICE void multiply_g(int64_t row, Sums& sums) {
    multiply_columns<true>(row, sums, [&](const Column& c, const Walk<kRank>& token) { return g(c, token); });
  }

  // sums += G X1^T over this tile's columns, for rows and columns of dP from `row` and `key` on.
  POSMLP_DEVICE void add_outer(int64_t row, int64_t key, Sums& sums) {
    constexpr int kStep = kThreads / kDepth;
    const int k = thread_index() % kDepth, first = thread_index() / kDepth;
    for (int from = 0; from < kSide; from += kDepth) {
      const Column& column = s_columns_[from + k];
      auto query = box_walk(cls_, row + first, kStep), other = box_walk(cls_, key + first, kStep);
      for (int t = first; t < kSide; t += kStep, query.next(), other.next()) {
        const bool present = column.channel >= 0;
        s_left_[k * kStride + t] = present && row + t < tokens_ ? g(column, query) : A(0);
        s_right_[k * kStride + t] = present && key + t < tokens_ ? x1(column, other) : A(0);
      }
      multiply(sums);
    }
  }

  // Calls `finish(r, i, token)` for each of this thread's rows that are present.
  template <class Finish>
  POSMLP_DEVICE void for_each_row(int64_t first, Finish&& finish) const {
    auto token = box_walk(cls_, first + own_row(), 1);
    POSMLP_UNROLL
    for (int r = 0; r < kEach; ++r, token.next())
      if (first + own_row() + r < tokens_) finish(r, first + own_row() + r, token);
  }
  // And of its columns.
  template <class Finish>
  POSMLP_DEVICE void for_each_column(Finish&& finish) const {
    POSMLP_UNROLL
    for (int c = 0; c < kEach; ++c)
      if (s_columns_[own_column() + c].channel >= 0) finish(c, s_columns_[own_column() + c]);
  }
  POSMLP_DEVICE static int own_row() { return thread_index() / (kSide / kEach) * kEach; }
  POSMLP_DEVICE static int own_column() { return thread_index() % (kSide / kEach) * kEach; }
  POSMLP_DEVICE static void clear(Sums& sums) {
    for (auto& row : sums)
      for (A& sum : row) sum = 0;
  }

  POSMLP_DEVICE A bias(const Walk<kRank>& token) const {
    if (!call_.bias) return A(0);
    const int64_t* window = call_.shape.window;
    return call_.bias[((cls_.begin[0] + token.at[0]) * window[1] + cls_.begin[1] + token.at[1]) * window[2] +
                      cls_.begin[2] + token.at[2]];
  }

 private:
  POSMLP_DEVICE Column column_at(const Walk<2 + kRank>& walk, bool present) const {
    if (!present) return {0, 0, 0, 0, 0, -1};
    int64_t position[kRank];
    for (int d = 0; d < kRank; ++d)
      position[d] = walk.at[1 + d] * call_.shape.window[d] - call_.shape.shift[d] + cls_.begin[d];
    const int64_t b = walk.at[0], channel = group_ * call_.shape.group_channels() + walk.at[1 + kRank];
    return {call_.x_view.offset(b, position) + channel,  call_.z_view.offset(b, position) + channel,
            call_.dz_view.offset(b, position) + channel, call_.dx_view.offset(b, position) + channel,
            call_.shape.contiguous(1).offset(b, position), int(channel)};
  }

  // sums = P, or P^T, times what `value(column, token)` is.
  template <bool transposed, class Value>
  POSMLP_DEVICE void multiply_columns(int64_t row, Sums& sums, Value&& value) {
    const int column = thread_index() % kSide, first = thread_index() / kSide;
    constexpr int kStep = kThreads / kSide;
    auto token = box_walk(cls_, first, kStep);
    clear(sums);
    for (int64_t from = 0; from < tokens_; from += kDepth) {
      load_mixing<transposed>(row, from);
      for (int k = first; k < kDepth; k += kStep, token.next()) {
        const bool present = from + k < tokens_ && s_columns_[column].channel >= 0;
        s_right_[k * kStride + column] = present ? value(s_columns_[column], token) : A(0);
      }
      multiply(sums);
    }
  }

  // left[k][row] = P(row, k), or P(k, row); zeros beyond, which P has itself up to `side`.
  template <bool transposed>
  POSMLP_DEVICE void load_mixing(int64_t row, int64_t depth) {
    constexpr int kFast = transposed ? kSide : kDepth, kStep = kThreads / kFast;  // along the rows of memory
    for (int slow = thread_index() / kFast; slow < kSide * kDepth / kFast; slow += kStep) {
      const int fast = thread_index() % kFast, r = transposed ? fast : slow, k = transposed ? slow : fast;
      const int64_t i = transposed ? depth + k : row + r, j = transposed ? row + r : depth + k;
      const bool inside = i < call_.side && j < call_.side;
      s_left_[k * kStride + r] = inside ? to_accumulation(mixing_[i * call_.side + j]) : A(0);
    }
  }

  struct alignas(16) Quad {
    A values[kEach];
  };

  POSMLP_DEVICE void multiply(Sums& sums) const {
    sync_threads();
    for (int k = 0; k < kDepth; ++k) {
      const Quad left = *reinterpret_cast<const Quad*>(s_left_ + k * kStride + own_row());
      const Quad right = *reinterpret_cast<const Quad*>(s_right_ + k * kStride + own_column());
      for (int r = 0; r < kEach; ++r)
        for (int c = 0; c < kEach; ++c) sums[r][c] += left.values[r] * right.values[c];
    }
    sync_threads();
  }

  const Call<T>& call_;
  const WindowClass& cls_;
  const int64_t group_, tokens_;
  const T* mixing_;
  A *s_left_, *s_right_;  // [kDepth, kStride]
  Column* s_columns_;
};

}  // namespace posmlp::cuda
