// What is done once per pair of tokens: the mixing matrix, and the gradients that come back through it.
//
//     MixingKernel   P[class, g]  = softmax of the logits over the tokens of the class, or the logits; zero beyond;
//                    or the rows' statistics alone, where products make P from those
//     LogitsKernel   dL[g]        = sum over classes of P (dP - rowsum(P dP)), or of dP without softmax
//     TableKernel    dR[g](d)     = sum over i of dL[g][i, i + d]
//
// A warp has a row, its lanes every 32nd key. P is some hundred thousand to a few million numbers, made once per call
// in three passes over the table, which lies in the first-level cache: no row is stored before it is divided by its
// sum, and none is limited in length. The backward makes P anew from the rows' maxima and sums, because that which the
// products read is rounded. Partial sums of dP are the largest thing here, splits N^2 numbers a group, read once.
#pragma once

#include "cuda_reduce.cuh"

namespace posmlp::cuda {

// The logits of one query.
template <class T>
class LogitsRow {
 public:
  using A = Accumulation<T>;

  POSMLP_DEVICE LogitsRow(const Call<T>& call, int64_t group, const int64_t* query)
      : table_strides_(call.shape.table_view()), matrix_strides_(window_view(call.shape)) {
    const Shape& shape = call.shape;
    const int64_t n = shape.window_tokens();
    if (call.table)  // at the key's place 0, for a key at the query's own is at the table's centre
      table_ = call.table + group * shape.table_size() + shape.table_size() / 2 - table_strides_.offset(0, query);
    if (call.matrix)
      matrix_ = call.matrix + ((call.matrix_per_group ? group * n : 0) + matrix_strides_.offset(0, query)) * n;
  }

  POSMLP_DEVICE A operator()(const Walk<kRank>& key) const {
    A logit = 0;
    if (table_) logit += table_[offset_in(table_strides_, key)];
    if (matrix_) logit += matrix_[offset_in(matrix_strides_, key)];
    return logit;
  }

  POSMLP_DEVICE static View window_view(const Shape& shape) {
    return {0, {shape.window[1] * shape.window[2], shape.window[2], 1}};
  }

 private:
  const View table_strides_, matrix_strides_;
  const A *table_ = nullptr, *matrix_ = nullptr;
};

template <class T>
struct MixingKernel {
  using A = Accumulation<T>;
  using Arguments = Call<T>;
  static constexpr int kThreads = 256;
  static constexpr int64_t kSharedBytes = 0;
  static int64_t rows(const Arguments& call) { return call.class_count * call.shape.groups * call.side; }
  static int64_t grid(const Arguments& call) { return divide_up(rows(call) * kLanes, kThreads); }

  POSMLP_DEVICE static void run(const Arguments& call, char*) {
    const int64_t row = (block_index() * kThreads + thread_index()) / kLanes, of_class = row / call.side;
    if (of_class >= call.class_count * call.shape.groups) return;
    const int lane = thread_index() % kLanes;
    const WindowClass& cls = call.classes[of_class / call.shape.groups];
    const int64_t i = row - of_class * call.side, tokens = cls.tokens();
    T* const mixing = call.mixing ? call.mixing + row * call.side : nullptr;
    int64_t j = lane;
    if (i < tokens) {
      int64_t query[kRank];
      cls.place(i, query);
      const LogitsRow<T> logits(call, of_class % call.shape.groups, query);
      A maximum = 0, inverse = 1;
      if (call.softmax) normalise(logits, cls, tokens, maximum, inverse);
      if (call.row_max && lane == 0) {
        call.row_max[of_class * call.shape.window_tokens() + i] = maximum;
        call.row_rinv[of_class * call.shape.window_tokens() + i] = inverse;
      }
      if (!mixing) return;
      for (auto key = token_walk(cls, lane, kLanes); j < tokens; j += kLanes, key.next()) {
        const A logit = logits(key);
        mixing[j] = round_to<T>(call.softmax ? exp(logit - maximum) * inverse : logit);
      }
    }
    for (; mixing && j < call.side; j += kLanes) mixing[j] = round_to<T>(A(0));
  }

 private:
  // Each row about its own maximum: where all keys are far from the table's centre, e^R alone would be zero.
  POSMLP_DEVICE static void normalise(const LogitsRow<T>& logits, const WindowClass& cls, int64_t tokens, A& maximum,
                                      A& inverse) {
    const int lane = thread_index() % kLanes;
    A sum = 0;
    maximum = -A(INFINITY);
    auto key = token_walk(cls, lane, kLanes);
    for (int64_t j = lane; j < tokens; j += kLanes, key.next()) {
      const A logit = logits(key);
      maximum = logit > maximum ? logit : maximum;
    }
    maximum = warp_max(maximum);
    key = token_walk(cls, lane, kLanes);
    for (int64_t j = lane; j < tokens; j += kLanes, key.next()) sum += exp(logits(key) - maximum);
    inverse = A(1) / warp_sum(sum);
  }
};

// Lanes own keys of the whole window, and add up in memory what the classes have to say about them.
template <class T>
struct LogitsKernel {
  using A = Accumulation<T>;
  using Arguments = Call<T>;
  static constexpr int kThreads = 256;
  static constexpr int64_t kSharedBytes = 0;
  static int64_t grid(const Arguments& call) {
    return divide_up(call.shape.groups * call.shape.window_tokens() * kLanes, kThreads);
  }

  POSMLP_DEVICE static void run(const Arguments& call, char*) {
    const int64_t row = (block_index() * kThreads + thread_index()) / kLanes, n = call.shape.window_tokens();
    const int64_t group = row / n;
    if (group >= call.shape.groups) return;
    A* dlogits = call.dlogits + row * n;
    const auto token = window_walk(call.shape, row - group * n, 0);
    const int64_t query[kRank] = {token.at[0], token.at[1], token.at[2]};
    const LogitsRow<T> logits(call, group, query);
    for (int64_t j = thread_index() % kLanes; j < n; j += kLanes) dlogits[j] = 0;
    for (int k = 0; k < call.class_count; ++k) {
      const int64_t i = call.classes[k].index_of(query);
      if (i >= 0) add_class(call, k, group, i, logits, dlogits);
    }
  }

 private:
  // Under softmax the row's mean of dP comes from these very dP and weights, so that what all of a row have in common
  // cancels; the sums over splits are put by for that in the first one's place.
  POSMLP_DEVICE static void add_class(const Arguments& call, int k, int64_t group, int64_t i,
                                      const LogitsRow<T>& logits, A* dlogits) {
    const int64_t n = call.shape.window_tokens(), groups = call.shape.groups, row = (k * groups + group) * n + i;
    const A maximum = call.softmax ? call.row_max[row] : A(0), inverse = call.softmax ? call.row_rinv[row] : A(0);
    A* dmixing = call.dmixing + ((k * call.splits * groups + group) * n + i) * n;
    A weights = 0, total = 0;
    for_each_key(call, k, [&](int64_t j, int64_t in_class, const Walk<kRank>& key) {
      A dp = 0;
      for (int64_t s = 0; s < call.splits; ++s) dp += dmixing[s * groups * n * n + in_class];
      if (!call.softmax) {
        dlogits[j] += dp;
        return;
      }
      const A weight = exp(logits(key) - maximum);
      dmixing[in_class] = dp;
      weights += weight;
      total += weight * dp;
    });
    if (!call.softmax) return;
    const A mean = warp_sum(total) / warp_sum(weights);
    for_each_key(call, k, [&](int64_t j, int64_t in_class, const Walk<kRank>& key) {
      dlogits[j] += exp(logits(key) - maximum) * inverse * (dmixing[in_class] - mean);
    });
  }

  // Calls `work(j, in_class, place)` for this lane's keys of the whole window that the class has.
  template <class Work>
  POSMLP_DEVICE static void for_each_key(const Arguments& call, int k, Work&& work) {
    auto key = window_walk(call.shape, thread_index() % kLanes, kLanes);
    for (int64_t j = thread_index() % kLanes; j < call.shape.window_tokens(); j += kLanes, key.next()) {
      const int64_t place[kRank] = {key.at[0], key.at[1], key.at[2]}, in_class = call.classes[k].index_of(place);
      if (in_class >= 0) work(j, in_class, key);
    }
  }
};

// Gathers, for a pair of tokens belongs to one displacement: neighbouring displacements from neighbouring keys.
template <class T>
struct TableKernel {
  using A = Accumulation<T>;
  using Arguments = Call<T>;
  static constexpr int kThreads = Columns::kThreads;
  static constexpr int64_t kSharedBytes = Columns::kBytes<A>;
  static int64_t grid(const Arguments& call) { return call.shape.groups * Columns::blocks(call.shape.table_size()); }

  POSMLP_DEVICE static void run(const Arguments& call, char* shared) {
    const Shape& shape = call.shape;
    const int64_t size = shape.table_size(), blocks = divide_up(size, kLanes), group = block_index() / blocks;
    const int64_t entry = (block_index() - group * blocks) * kLanes + Columns::lane(), n = shape.window_tokens();
    const View table = shape.table_view(), window = LogitsRow<T>::window_view(shape);
    const int64_t delta[kRank] = {entry / table.map[0] - (shape.window[0] - 1),
                                  entry % table.map[0] / table.map[1] - (shape.window[1] - 1),
                                  entry % table.map[1] - (shape.window[2] - 1)};
    const A* dlogits = call.dlogits + group * n * n;
    const int64_t step = window.offset(0, delta);  // from query to key
    A sum = 0;
    auto query = window_walk(shape, Columns::warp(), Columns::kWarps);
    for (int64_t i = Columns::warp(); i < n && entry < size; i += Columns::kWarps, query.next()) {
      bool inside = true;
      for (int d = 0; d < kRank; ++d)
        inside = inside && query.at[d] + delta[d] >= 0 && query.at[d] + delta[d] < shape.window[d];
      if (inside) sum += dlogits[i * n + i + step];
    }
    sum = Columns::sum_over_warps(sum, shared);
    if (Columns::warp() == 0 && entry < size) call.dtable[group * size + entry] = sum;
  }
};

}  // namespace posmlp::cuda
