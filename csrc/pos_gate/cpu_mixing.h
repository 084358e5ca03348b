// The mixing matrix P of one group and window class, packed for the products, and the way back from its gradient.
//
// Token i of a window sits at place(i) in the strides of the table, so the table entry of query i and key j is
// centre + place(j) - place(i). Without a free matrix, P(i, j) = weight(entry) * scale(i): weight is the table itself, or
// e^(R - max R) with scale one over the row's sum under softmax. One exponential per table entry serves all N rows; that
// few can be had in double, and must: an error in one would be the same in every row, and gradients of the table, which
// sum over rows, would not average it out. P is never stored then: products read their weights straight from the table (or,
// on tile registers, from blocks copied out of it). The results of a product by rows are scaled; the transpose, whose scale
// goes with what is summed over, is given scaled rows.
// With a free matrix, or where a row's keys all lie so far from the table's maximum that nothing is left of them, P is
// `dense`, each row about its own maximum.
//
// Under softmax the weights of a row that are packed sum to 1 but for eps / 8 at most: the others cannot show in a
// rounded result, and for a Gaussian a third of a window of 14 and two thirds of one of 24 are such.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// Kept from call to call by each thread, so that no pages are faulted in again.
template <class A>
struct MixingBuffers {
  std::vector<double> weight, entries, peak, row_peak, scale, row, sums;
  std::vector<A> dense;
#ifdef POSMLP_AMX
  std::vector<Bfloat16> table, tile;
#endif
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
    negligible_ = call_.softmax ? epsilon_ / 8 / double(window.tokens) : 0;
    factored_ = table_ && !call_.matrix && weigh_table() && scale_rows();
    largest_scale_ = factored_ ? *std::max_element(b_.scale.begin(), b_.scale.begin() + window.tokens) : 1;
    shared_ = factored_ && largest_scale_ < kMostShared;
    if (!factored_) build_dense(group);
  }

  // P but for `row_scale`, which belongs to the results of a product by rows and to what a product by columns is given.
  // Tiles of queries whose steps are keys; tiles of keys whose steps are queries, the transpose.
  void pack_rows(Packed<E>& packed) { pack<true>(packed); }
  void pack_columns(Packed<E>& packed) { pack<false>(packed); }
  A row_scale(int64_t i) const { return shared_ ? A(b_.scale[i]) : A(1); }

  // Adds the gradients of a group's table and matrix, given dP [tokens, ld], rows scaled. Sums over rows are taken in
  // double, where their order does not show.
  void add_gradient(int64_t part, const A* dp, int64_t ld) {
    const int64_t size = shape_.table_size();
    b_.sums.assign((call_.dtable_parts ? size : 0) + 2 * kDoubles, 0.);
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
  static constexpr int kDoubles = VectorOf<double>::kLanes;
  static constexpr int64_t kDepth = kDepthOf<E>;
  // Of a scale: beyond it products of unscaled weights with small tokens would be flushed as subnormals.
  static constexpr double kMostShared = 1e12;

  static const A* at_group(const void* parameter, int64_t group, int64_t size) {
    return parameter ? static_cast<const A*>(parameter) + group * size : nullptr;
  }
  // `count` values, with room for a vector to stick out: zeros.
  static void make_room(std::vector<double>& values, int64_t count) {
    values.resize(count + 2 * kDoubles);
    std::fill(values.begin() + count, values.end(), 0.);
  }

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
      const double sum = b_.sums[centre_ + window_->place[0] - window_->place[i]];
      if (!(sum >= kEnough)) return false;
      b_.scale[i] = 1 / sum;
    }
    return true;
  }

  // The sum of each query's weights into `sums`, where its first key's entry is: its keys are a box of the table.
  void sum_boxes() {
    const View table = shape_.table_view();
    b_.sums = b_.weight;
    for (int d = 0; d < kRank; ++d) sum_runs(window_->cls.box[d], table.map[d]);
  }

  // Each of `sums` becomes the sum of `count` from there on, `stride` apart, made of sums of two, of four and so on.
  void sum_runs(int64_t count, int64_t stride) {
    if (count == 1) return;
    b_.row.assign(b_.sums.size(), 0.);
    for (int64_t run = 1, done = 0; done < count; run *= 2) {
      if (count & run) {
        add_shifted(b_.row, b_.sums, done * stride);
        done += run;
      }
      if (done < count) add_shifted(b_.sums, b_.sums, run * stride);
    }
    b_.sums.swap(b_.row);
  }
  static void add_shifted(std::vector<double>& to, const std::vector<double>& from, int64_t shift) {
    double* const sums = to.data();
    const double *added = from.data() + shift, *const end = from.data() + from.size() - 2 * kDoubles;
    for (int64_t e = 0; added + e < end; e += kDoubles) store(sums + e, load<double>(sums + e) + load<double>(added + e));
  }

  // ---- packing ----

#ifdef POSMLP_AMX
  // For tile registers, which take a row's steps side by side: too few of them lie so in the table. All weights are copied,
  // a row of the window at a time, out of the table's or its mirror image's, which are rounded once.
  template <bool kRows>
  void pack(Packed<E>& packed) {
    packed.clear();
    if (shared_) round_table<kRows>();
    const auto write = [&](int64_t token, auto* to) { write_row<kRows>(token, to); };
    pack_blocks(packed, window_->tokens, b_.tile, write, [&](int64_t first, int64_t rows, int64_t key, int64_t keys) {
      if (!shared_) return negligible_;
      const double* scale = &b_.scale[kRows ? first : key];
      return negligible_ / *std::max_element(scale, scale + (kRows ? rows : keys));
    });
  }
  template <bool kRows>
  void round_table() {
    const int64_t size = shape_.table_size();
    b_.table.resize(size + kOvershoot);
    for (int64_t e = 0; e < size; ++e) narrow(float(b_.weight[kRows ? e : size - 1 - e]), b_.table[e]);
  }
  // The row of P, or of its transpose, of a token, and up to kOvershoot numbers more.
  template <bool kRows>
  void write_row(int64_t token, Bfloat16* to) const {
    const int64_t tokens = window_->tokens, length = window_->cls.box[2], *place = window_->place.data();
    if (!shared_)
      for (int64_t k = 0; k < tokens; ++k) narrow(float(weight_of(kRows ? token : k, kRows ? k : token)), to[k]);
    else
      for (int64_t row = 0; row < tokens; row += length)
        for (int64_t k = 0; k < length; k += kOvershoot)
          __builtin_memcpy(to + row + k, &b_.table[centre_ - place[token] + place[row] + k], 2 * kOvershoot);
  }
#else
  template <bool kRows>
  void pack(Packed<E>& packed) {
    const int64_t tokens = window_->tokens, *place = window_->place.data();
    packed.clear();
    if (shared_) share_table<kRows>(packed);
    for (int64_t first = 0; first < tokens; first += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, tokens - first), last = first + rows - 1;
      if (shared_ && rows == kTileRows && place[last] == place[first] + rows - 1)
        pack_shared<kRows>(packed, first);
      else
        pack_tile<kRows>(packed, first, rows);
      packed.end_tile();
    }
  }

  // The table, for tiles whose tokens lie side by side along the last dimension: their weights do so too, in the table's
  // mirror image for queries, in the table itself for keys. Of a pair the second is that of the next token, one before.
  template <bool kRows>
  void share_table(Packed<E>& packed) {
    const int64_t size = shape_.table_size(), shared = round_up(size, kDoubles) + kDoubles;
    make_room(b_.entries, 1 + size);
    double* entries = b_.entries.data() + 1;  // behind a zero
    entries[-1] = 0;
    if (kRows)
      std::reverse_copy(&b_.weight[0], &b_.weight[size], entries);
    else
      std::copy(&b_.weight[0], &b_.weight[size], entries);
    packed.weights.resize(shared);
    for (int64_t e = 0; e < shared; e += kDoubles)
      store_operands(&packed.weights[e], load<double>(entries + e), load<double>(entries + e - 1));
    find_peaks(entries, size);
  }

  // The largest |entry| among the kTileRows from each one on, and among those that a tile meets in a whole row of tokens.
  void find_peaks(const double* entries, int64_t size) {
    b_.peak.resize(size + kDoubles);  // there is room for it
    for (size_t e = 0; e < b_.peak.size(); ++e)  // NaN is to be seen
      b_.peak[e] = entries[e] == entries[e] ? std::abs(entries[e]) : std::numeric_limits<double>::infinity();
    widen_peaks(b_.peak, 1, kTileRows);
    b_.row_peak = b_.peak;
    widen_peaks(b_.row_peak, kTileRows, kTileRows - 1 + window_->cls.box[2]);
  }

  // Each is the largest of `reach` entries from there on, and becomes the largest of `wanted`.
  static void widen_peaks(std::vector<double>& peaks, int64_t reach, int64_t wanted) {
    double* const peak = peaks.data();
    for (int64_t step; reach < wanted; reach += step) {
      step = std::min(reach, wanted - reach);  // runs may overlap
      for (int64_t e = 0; e + step < int64_t(peaks.size()); ++e) peak[e] = std::max(peak[e], peak[e + step]);
    }
  }

  // A tile that finds its weights in the shared table. Of each row of the tokens that are summed over it takes what lies
  // between the first and the last that count.
  template <bool kRows>
  void pack_shared(Packed<E>& packed, int64_t first) const {
    const int64_t *place = window_->place.data(), length = window_->cls.box[2], origin = centre_ + place[first];
    const double *scale = b_.scale.data(), *peak = b_.peak.data(), *row_peak = b_.row_peak.data();
    const double largest = kRows ? *std::max_element(scale + first, scale + first + kTileRows) : largest_scale_;
    const auto counts = [&](int64_t k) { return peak[origin - place[k]] * (kRows ? largest : scale[k]) > negligible_; };
    for (int64_t row = 0; row < window_->tokens; row += length) {
      int64_t from = row, to = row + length;
      if (!(row_peak[origin - place[to - 1]] * largest > negligible_)) continue;
      while (from < to && !counts(from)) ++from;
      if (from == to) continue;
      while (!counts(to - 1)) --to;
      // A pair of which one lies in another row has weights of its own.
      int64_t step = from / kDepth, last = divide_up(to, kDepth);
      if (step < divide_up(row, kDepth)) add_step<kRows>(packed, first, kTileRows, step++);
      const int64_t inner = std::min(last, (row + length) / kDepth);
      for (int64_t count; step < inner; step += count) {
        count = std::min<int64_t>(inner - step, kMostSteps);
        packed.add(origin - place[step * kDepth], step * kPanelOf<A>, count, -kDepth);
      }
      if (inner < last) add_step<kRows>(packed, first, kTileRows, inner);
    }
  }

  template <bool kRows>
  void pack_tile(Packed<E>& packed, int64_t first, int64_t rows) const {
    for (int64_t step = 0; step * kDepth < window_->tokens; ++step) add_step<kRows>(packed, first, rows, step);
  }

  // Adds a step with weights of its own, unless none counts or the tile has it already.
  template <bool kRows>
  void add_step(Packed<E>& packed, int64_t first, int64_t rows, int64_t step) const {
    const int32_t row = int32_t(step * kPanelOf<A>);
    Run* const run = packed.last_of_tile();
    if (run && run->row + (run->count - 1) * kPanelOf<A> == row) return;
    E weights[kTileRows] = {};
    bool counts = false;
    for (int64_t r = 0; r < rows; ++r) {
      double pair[2] = {0, 0};
      for (int64_t d = 0; d < std::min(kDepth, window_->tokens - step * kDepth); ++d) {
        const int64_t i = kRows ? first + r : step * kDepth + d, j = kRows ? step * kDepth + d : first + r;
        pair[d] = weight_of(i, j);
        counts |= !(std::abs(pair[d]) * (shared_ ? b_.scale[i] : 1) <= negligible_);
      }
      weights[r] = operand<E>(pair[0], pair[1]);
    }
    if (!counts) return;
    const int64_t at = int64_t(packed.weights.size());
    packed.weights.insert(packed.weights.end(), weights, weights + kTileRows);
    const bool follows = run && run->stride == kTileRows && run->count < kMostSteps &&
                         run->at + run->count * kTileRows == at && run->row + run->count * kPanelOf<A> == row;
    if (follows)
      ++run->count;
    else
      packed.add(at, row, 1, kTileRows);
  }
#endif

  // Of P; where the table is shared, without the scale of its row.
  double weight_of(int64_t i, int64_t j) const {
    if (!factored_) return double(b_.dense[i * window_->tokens + j]);
    return b_.weight[centre_ + window_->place[j] - window_->place[i]] * (shared_ ? 1 : b_.scale[i]);
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
    const double scale = shared_ ? 1 : b_.scale[i];
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
        const DoubleVec gradient = (load_wide(dp + key + c) - mean) * scale;
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
  int64_t centre_ = 0;
  double negligible_ = 0, largest_scale_ = 1;
  bool factored_ = false, shared_ = false;  // shared: tiles read the table, and P's rows lack their scales
};
