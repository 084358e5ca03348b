// The mixing matrix P of one group and window class, packed for the products, and the way back from its gradient.
//
// Token i of a window sits at place(i) in the strides of the table, so the table entry of query i and key j is
// centre + place(j) - place(i). Without a free matrix, P(i, j) = weight(entry) * scale(i): weight is the table itself, or
// e^(R - max R) with scale one over the row's sum under softmax. One exponential per table entry serves all N rows; that
// few can be had in double, and must: an error in one would be the same in every row, and gradients of the table, which
// sum over rows, would not average it out. P is never stored then: the product by rows reads its weights straight from the
// table, and its results are scaled; the transpose, whose scale goes with what is summed over, is packed from it.
// With a free matrix, or where a row's keys all lie so far from the table's maximum that nothing is left of them, P is
// `dense`, each row about its own maximum.
//
// Under softmax the weights of a row that are packed sum to 1 but for eps / 128 at most: the others cannot show in a
// rounded result, and for a Gaussian a third of a window of 14 and two thirds of one of 24 are such.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// Kept from call to call by each thread, so that no pages are faulted in again.
template <class A>
struct MixingBuffers {
  std::vector<double> weight, flipped, peak, scale, row, sums;
  std::vector<A> dense;
};

// E: what the products multiply; epsilon: of the results' type.
template <class A, class E>
class Mixing {
 public:
  Mixing(const Call& call, double epsilon, MixingBuffers<A>& buffers)
      : call_(call), shape_(call.shape), epsilon_(epsilon), b_(buffers) {}

  void prepare(const Window& window, int64_t group) {
    window_ = &window;
    table_ = at_group(call_.table, group, shape_.table_size());
    centre_ = shape_.table_size() / 2;
    negligible_ = call_.softmax ? epsilon_ / 128 / double(window.tokens) : 0;
    factored_ = table_ && !call_.matrix && weigh_table() && scale_rows();
    shared_ = factored_ && *std::max_element(b_.scale.begin(), b_.scale.begin() + window.tokens) < kMostShared;
    if (!factored_) build_dense(group);
  }

  // Tiles of queries, entries are keys. `row_scale` is what the rows of the product are to be multiplied by.
  void pack_rows(Packed<E>& packed) { pack<true>(packed); }
  A row_scale(int64_t i) const { return shared_ ? A(b_.scale[i]) : A(1); }
  // Tiles of keys, entries are queries: the transpose.
  void pack_columns(Packed<E>& packed) { pack<false>(packed); }

  // Adds the gradients of a group's table and matrix, given dP [tokens, ld]. Sums over rows are taken in double, where
  // their order does not show.
  void add_gradient(int64_t part, const A* dp, int64_t ld) {
    const int64_t size = shape_.table_size();
    make_room(b_.sums, call_.dtable_parts ? size : 0);
    if (factored_)
      for (int64_t i = 0; i < window_->tokens; ++i) add_factored_row(i, dp + i * ld);
    else
      for (int64_t i = 0; i < window_->tokens; ++i) add_dense_row(i, dp + i * ld, part);
    if (!call_.dtable_parts) return;
    A* to = static_cast<A*>(call_.dtable_parts) + part * size;
    const bool weigh = factored_ && call_.softmax;
    for (int64_t e = 0; e < size; ++e) to[e] += A(weigh ? b_.weight[e] * b_.sums[e] : b_.sums[e]);
  }

 private:
  static constexpr int kDoubles = VectorOf<double>::kLanes, kDepth = kDepthOf<E>;
  // Of a scale: beyond it products of unscaled weights with small tokens would be flushed as subnormals.
  static constexpr double kMostShared = 1e12;

  static const A* at_group(const void* parameter, int64_t group, int64_t size) {
    return parameter ? static_cast<const A*>(parameter) + group * size : nullptr;
  }
  // `count` values, with room for a vector to stick out.
  static void make_room(std::vector<double>& values, int64_t count) { values.assign(count + 2 * kDoubles, 0.); }

  // ---- the table ----

  // Calls `run(key, entry, count)` for each run of keys whose entries for query i lie side by side.
  template <class Run>
  void for_each_run(int64_t i, Run&& run) const {
    const int64_t *box = window_->cls.box, first = centre_ - window_->place[i];
    int64_t key = 0;
    for (int64_t j0 = 0; j0 < box[0]; ++j0)
      for (int64_t j1 = 0; j1 < box[1]; ++j1, key += box[2]) run(key, first + window_->place[key], box[2]);
  }

  static A largest_of(const A* values, int64_t count) {
    constexpr int kLanes = VectorOf<A>::kLanes;
    A largest = values[0];
    if (count >= kLanes) {
      Vec<A> vector = load<A>(values + count - kLanes);
      for (int64_t i = 0; i + kLanes <= count; i += kLanes) {
        const Vec<A> next = load<A>(values + i);
        vector = next > vector ? next : vector;
      }
      for (int l = 0; l < kLanes; ++l) largest = vector[l] > largest ? vector[l] : largest;
      return largest;
    }
    for (int64_t i = 1; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
    return largest;
  }

  bool weigh_table() {
    const int64_t size = shape_.table_size();
    make_room(b_.weight, size);
    if (!call_.softmax) {
      for (int64_t e = 0; e < size; ++e) b_.weight[e] = double(table_[e]);
      return true;
    }
    const double maximum = double(largest_of(table_, size));
    for (int64_t e = 0; e < size; ++e) b_.weight[e] = double(table_[e]) - maximum;
    for (int64_t e = 0; e < size; e += kDoubles)
      store(&b_.weight[e], exponential(load<double>(&b_.weight[e])));
    std::fill(b_.weight.begin() + size, b_.weight.end(), 0.);
    return true;
  }

  // One over the sum of each query's weights; false if a sum is too small to be divided by.
  bool scale_rows() {
    constexpr double kEnough = 1e-280;
    const int64_t tokens = window_->tokens;
    make_room(b_.scale, round_up(tokens, kTileRows));
    if (!call_.softmax) {
      std::fill_n(b_.scale.begin(), tokens, 1.);
      return true;
    }
    sum_boxes();
    for (int64_t i = 0; i < tokens; ++i) {
      if (!(b_.sums[i] >= kEnough)) return false;
      b_.scale[i] = 1 / b_.sums[i];
    }
    return true;
  }

  // The sum of each query's weights into `sums`: its keys are a box of the table, so a dimension at a time will do.
  void sum_boxes() {
    const int64_t *box = window_->cls.box, *size = shape_.window;
    int64_t before = 1, after = shape_.table_size();
    b_.sums.assign(b_.weight.begin(), b_.weight.begin() + after);
    for (int d = 0; d < kRank; ++d) {
      const int64_t entries = 2 * size[d] - 1;
      after /= entries;
      b_.row.assign(before * box[d] * after, 0.);
      for (int64_t a = 0; a < before; ++a)
        for (int64_t key = 0; key < box[d]; ++key) {  // innermost runs what is long: the queries of the last dimension
          const double* from = &b_.sums[(a * entries + size[d] - 1 + key) * after];
          double* to = &b_.row[a * box[d] * after];
          if (after == 1)
            for (int64_t query = 0; query < box[d]; ++query) to[query] += from[-query];
          else
            for (int64_t query = 0; query < box[d]; ++query)
              for (int64_t c = 0; c < after; ++c) to[query * after + c] += from[c - query * after];
        }
      before *= box[d];
      b_.sums.swap(b_.row);
    }
  }

  // ---- packing ----

  // The entries in the order in which a tile's tokens have them side by side: for queries the table's mirror image.
  template <bool kRows>
  void find_entries() {
    const int64_t size = shape_.table_size();
    if (kRows) {
      make_room(b_.flipped, 1 + size);  // behind a zero
      for (int64_t e = 0; e < size; ++e) b_.flipped[1 + e] = b_.weight[size - 1 - e];
    }
    entries_ = kRows ? b_.flipped.data() + 1 : b_.weight.data();
    find_peaks(size);
  }

  // The largest |entry| among the kTileRows from each one on.
  void find_peaks(int64_t size) {
    const int64_t count = size + kDoubles;  // there is room for it
    b_.peak.resize(count);
    for (int64_t e = 0; e < count; ++e)  // NaN is to be seen
      b_.peak[e] = entries_[e] == entries_[e] ? std::abs(entries_[e]) : std::numeric_limits<double>::infinity();
    // Of two entries, then of four and so on: runs may overlap.
    for (int64_t run = 1; run < kTileRows;) {
      const int64_t step = std::min<int64_t>(run, kTileRows - run);
      for (int64_t e = 0; e + step < count; ++e)
        b_.peak[e] = b_.peak[e + step] > b_.peak[e] ? b_.peak[e + step] : b_.peak[e];
      run += step;
    }
  }

  template <bool kRows>
  void pack(Packed<E>& packed) {
    const int64_t tokens = window_->tokens, tiles = divide_up(tokens, kTileRows);
    if (factored_) find_entries<kRows>();
    const bool shares = kRows && shared_;
    const int64_t shared = shares ? round_up(shape_.table_size(), kDoubles) + kDoubles : 0;
    packed.clear(tiles * divide_up(tokens, kDepth), shared);
    if (shares) share_table(packed, shared);
    int64_t entries = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * kTileRows, rows = std::min<int64_t>(kTileRows, tokens - first);
      const bool side_by_side =
          rows == kTileRows && window_->place[first + rows - 1] == window_->place[first] + rows - 1 && factored_;
      entries = side_by_side ? pack_run<kRows>(packed, entries, first, shared)
                             : pack_tile<kRows>(packed, entries, first, rows, shared);
      if (entries == packed.begin.back()) {  // a tile has at least one
        packed.row[entries] = 0;
        packed.at[entries] = shared + entries * kTileRows;
        std::fill_n(&packed.weights[packed.at[entries++]], kTileRows, E{});
      }
      packed.begin.push_back(entries);
    }
  }

  // The table's mirror image as it is, for the rows of P without their scale: entry e, and in a pair the one before it,
  // which is that of the next key.
  void share_table(Packed<E>& packed, int64_t shared) const {
    for (int64_t e = 0; e < shared; e += kDoubles)
      store_operands(&packed.weights[e], load<double>(entries_ + e), load<double>(entries_ + e - 1));
  }

  // A tile whose tokens lie side by side along the last dimension: their weights do so too, in the table's mirror image
  // for queries, in the table for keys. Rows whose scale can wait need no weights of their own.
  template <bool kRows>
  int64_t pack_run(Packed<E>& packed, int64_t entries, int64_t first, int64_t shared) const {
    const double *weight = entries_, *peak = b_.peak.data();
    const double largest = kRows ? *std::max_element(&b_.scale[first], &b_.scale[first] + kTileRows) : 1;
    const int64_t* place = window_->place.data();
    const int64_t origin = centre_ + place[first], tokens = window_->tokens;
    const auto counts = [&](int64_t k) { return peak[origin - place[k]] * (kRows ? largest : b_.scale[k]) > negligible_; };
    const auto weights = [&](int64_t k, int r) {
      const DoubleVec scale = !kRows   ? fill<DoubleVec>(b_.scale[k])
                              : shared ? fill<DoubleVec>(1)
                                       : load<double>(&b_.scale[first + r]);
      return load<double>(weight + origin - place[k] + r) * scale;
    };
    for (int64_t k = 0; k < tokens; k += kDepth) {
      const bool two = kDepth == 2 && k + 1 < tokens;
      const bool kept = counts(k) | (two && counts(k + 1));
      packed.row[entries] = int32_t(k / kDepth * kPanelOf<A>);
      if (kRows && shared && (kDepth == 1 || (two && place[k + 1] == place[k] + 1))) {
        packed.at[entries] = origin - place[k];
      } else if (kept) {
        packed.at[entries] = shared + entries * kTileRows;
        for (int r = 0; r < kTileRows; r += kDoubles)
          store_operands(&packed.weights[packed.at[entries] + r], weights(k, r), two ? weights(k + 1, r) : DoubleVec{});
      }
      entries += kept;  // without a branch: hardly a pattern to foresee
    }
    return entries;
  }

  template <bool kRows>
  int64_t pack_tile(Packed<E>& packed, int64_t entries, int64_t first, int64_t rows, int64_t shared) const {
    const int64_t tokens = window_->tokens;
    for (int64_t k = 0; k < tokens; k += kDepth) {
      packed.row[entries] = int32_t(k / kDepth * kPanelOf<A>);
      packed.at[entries] = shared + entries * kTileRows;
      E* to = &packed.weights[packed.at[entries]];
      bool counts = false;
      for (int64_t r = 0; r < rows; ++r) {
        double weights[2] = {0, 0};
        for (int64_t d = 0; d < std::min<int64_t>(kDepth, tokens - k); ++d) {
          weights[d] = kRows ? weight_of(first + r, k + d) : weight_of(k + d, first + r);
          counts |= !(std::abs(weights[d]) <= negligible_);
          if (kRows && shared) weights[d] /= b_.scale[first + r];
        }
        to[r] = operand<E>(weights[0], weights[1]);
      }
      std::fill(to + rows, to + kTileRows, E{});
      entries += counts;
    }
    return entries;
  }

  double weight_of(int64_t i, int64_t j) const {
    return factored_ ? b_.weight[centre_ + window_->place[j] - window_->place[i]] * b_.scale[i]
                     : double(b_.dense[i * window_->tokens + j]);
  }

  // ---- dense ----

  void build_dense(int64_t group) {
    const int64_t tokens = window_->tokens, n = shape_.window_tokens();
    const A* matrix = at_group(call_.matrix, call_.matrix_per_group ? group : 0, n * n);
    b_.dense.resize(tokens * tokens);
    make_room(b_.row, tokens);
    for (int64_t i = 0; i < tokens; ++i) {
      std::fill(b_.row.begin(), b_.row.end(), 0.);
      if (table_)
        for_each_run(i, [&](int64_t key, int64_t at, int64_t count) {
          for (int64_t c = 0; c < count; ++c) b_.row[key + c] = double(table_[at + c]);
        });
      if (matrix)
        for (int64_t j = 0; j < tokens; ++j) b_.row[j] += double(matrix[window_->index[i] * n + window_->index[j]]);
      if (call_.softmax) softmax_row();
      for (int64_t j = 0; j < tokens; ++j) b_.dense[i * tokens + j] = A(b_.row[j]);
    }
  }

  void softmax_row() {
    const int64_t tokens = window_->tokens;
    const double maximum = *std::max_element(b_.row.begin(), b_.row.begin() + tokens);
    std::fill(b_.row.begin() + tokens, b_.row.end(), -std::numeric_limits<double>::infinity());
    DoubleVec sums{};
    for (int64_t j = 0; j < tokens; j += kDoubles) {
      const DoubleVec weight = exponential(load<double>(&b_.row[j]) - maximum);
      sums += weight;
      store(&b_.row[j], weight);
    }
    const double inverse = 1 / sum_lanes<double>(sums);
    for (int64_t j = 0; j < tokens; ++j) b_.row[j] *= inverse;
  }

  // ---- gradient ----
  //
  // Of the logits: dP, or under softmax P * (dP - sum of P * dP), where the sum is divided by that of P, which rounding
  // keeps from 1: what all of a row's dP have in common must cancel.

  // Where P is factored, an entry's weight can wait until all rows are summed. Runs of keys are taken by whole vectors,
  // of which the last one's lanes beyond the run count nothing.
  void add_factored_row(int64_t i, const A* dp) {
    const int64_t run = window_->cls.box[2], last = (run - 1) / kDoubles * kDoubles;
    const VectorOf<double>::ints in_run = lane_numbers() < run - last;
    double mean = 0;
    if (call_.softmax) {
      DoubleVec sums{}, weights{};
      for_each_run(i, [&](int64_t key, int64_t at, int64_t) {
        for (int64_t c = 0; c <= last; c += kDoubles) {
          const DoubleVec weight = load<double>(&b_.weight[at + c]), product = weight * load_wide(dp + key + c);
          weights += c < last ? weight : in_run ? weight : DoubleVec{};
          sums += c < last ? product : in_run ? product : DoubleVec{};
        }
      });
      mean = sum_lanes<double>(sums) / sum_lanes<double>(weights);
    }
    for_each_run(i, [&](int64_t key, int64_t at, int64_t) {
      for (int64_t c = 0; c <= last; c += kDoubles) {
        const DoubleVec gradient = (load_wide(dp + key + c) - mean) * b_.scale[i];
        double* to = &b_.sums[at + c];
        store(to, load<double>(to) + (c < last ? gradient : in_run ? gradient : DoubleVec{}));
      }
    });
  }

  void add_dense_row(int64_t i, const A* dp, int64_t part) {
    const int64_t tokens = window_->tokens, n = shape_.window_tokens();
    const A* weight = &b_.dense[i * tokens];
    double sum = 0, weights = 0;
    if (call_.softmax)
      for (int64_t j = 0; j < tokens; ++j) sum += double(weight[j]) * double(dp[j]), weights += double(weight[j]);
    make_room(b_.row, tokens);
    for (int64_t j = 0; j < tokens; ++j)
      b_.row[j] = call_.softmax ? double(weight[j]) * (double(dp[j]) - sum / weights) : double(dp[j]);
    if (call_.dtable_parts)
      for_each_run(i, [&](int64_t key, int64_t at, int64_t count) {
        for (int64_t c = 0; c < count; ++c) b_.sums[at + c] += b_.row[key + c];
      });
    if (call_.dmatrix_parts) {
      A* to = static_cast<A*>(call_.dmatrix_parts) + part * n * n + window_->index[i] * n;
      for (int64_t j = 0; j < tokens; ++j) to[window_->index[j]] += A(b_.row[j]);
    }
  }

  const Call& call_;
  const Shape& shape_;
  const double epsilon_;
  MixingBuffers<A>& b_;
  const Window* window_ = nullptr;
  const A* table_ = nullptr;  // of the group at hand
  const double* entries_ = nullptr;
  int64_t centre_ = 0;
  double negligible_ = 0;
  bool factored_ = false, shared_ = false;  // shared: rows are packed without their scale
};
