// The weights of the mixing matrix P of one group and window class.
//
// Token i of a window sits at place(i) in the strides of the table, so the table entry of query i and key j is
// centre + place(j) - place(i). Without a free matrix, P(i, j) = weight(entry) * scale(i): weight is the table itself, or
// e^(R - max R) with scale one over the row's sum under softmax. One exponential per table entry serves all N rows; that
// few can be had in double, and must: an error in one would be the same in every row, and gradients of the table, which
// sum over rows, would not average it out. P is never stored then.
// With a free matrix, or where a row's keys all lie so far from the table's maximum that nothing is left of them, P is
// `dense`, each row about its own maximum.
//
// Under softmax the weights of a row that are packed sum to 1 but for eps / 2 at most, as much as rounding a result once
// may take: for a Gaussian half of a window of 14 and three quarters of one of 24 are the others. One limit, which a weight
// must exceed to be packed, serves all rows of a group whose sums are of one order, so that tiles find the same where they
// look equally far. Of maps in half precision, whose eps is large, it is eps / 8, and a limit about as if all of a row were as
// large: what is left out, always far weights, is seen in the table's gradients, which are in single.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

constexpr int kDoubles = VectorOf<double>::kLanes;

// `count` values, with room for a vector to stick out: zeros.
template <class U>
inline void make_room(std::vector<U>& values, int64_t count) {
  values.resize(count + 2 * VectorOf<U>::kLanes);
  std::fill(values.begin() + count, values.end(), 0.);
}

// The first of some values in an order of values or vectors of them; `count` is not zero.
template <class A, class Before>
inline A first_of(const A* values, int64_t count, const Before& before) {
  constexpr int kLanes = VectorOf<A>::kLanes;
  const auto first_of_two = [&](auto a, auto b) { return before(a, b) ? a : b; };
  if (count >= kLanes) {
    Vec<A> vector = load<A>(values + count - kLanes);
    for (int64_t i = 0; i + kLanes <= count; i += kLanes) vector = first_of_two(load<A>(values + i), vector);
    return fold(vector, first_of_two);
  }
  A first = values[0];
  for (int64_t i = 1; i < count; ++i) first = first_of_two(values[i], first);
  return first;
}
template <class A>
inline A largest_of(const A* values, int64_t count) {
  return first_of(values, count, [](auto a, auto b) { return a > b; });
}
template <class A>
inline A smallest_of(const A* values, int64_t count) {
  return first_of(values, count, [](auto a, auto b) { return a < b; });
}

// What sums over boxes of a table are made in.
template <class U>
struct BoxBuffers {
  std::vector<U> values, sums;
};

// Kept from call to call by each thread, so that no pages are faulted in again.
template <class A>
struct WeightBuffers {
  std::vector<double> weight, scale, row;
  std::vector<A> dense, rounded;
  BoxBuffers<double> row_sums;
  BoxBuffers<A> left_out;
};

template <class A>
class Weights {
 public:
  // epsilon: of the results' type.
  Weights(const Call& call, double epsilon, WeightBuffers<A>& buffers)
      : call_(call), shape_(call.shape), half_(epsilon > double(std::numeric_limits<A>::epsilon())),
        negligible_(epsilon / (half_ ? 8 : 2)), b_(buffers) {}

  void prepare(const Window& window, int64_t group) {
    window_ = &window;
    table_ = at_group(call_.table, group, shape_.table_size());
    centre_ = shape_.table_size() / 2;
    factored_ = table_ && !call_.matrix && weigh_table() && scale_rows();
    largest_scale_ = factored_ ? largest_of(b_.scale.data(), window.tokens) : 1;
    smallest_scale_ = factored_ ? smallest_of(b_.scale.data(), window.tokens) : 1;
    shared_ = factored_ && largest_scale_ < kMostShared;
    if (!factored_) build_dense(group);
    alike_ = shared_ && rows_are_alike();
    find_limit();
  }

  const Window& window() const { return *window_; }
  WindowSizes sizes_of_window() const {
    WindowSizes sizes;
    std::copy_n(shape_.window, kRank, std::copy_n(window_->cls.box, kRank, sizes.begin()));
    return sizes;
  }
  int64_t centre() const { return centre_; }
  // Whether P is made of a table's weights; otherwise it is `dense`.
  bool factored() const { return factored_; }
  // Whether products may read the table as it is: their results, or what they are given, lack the rows' scales.
  bool shared() const { return shared_; }
  // Whether no row of tokens has a scale much larger than all before or behind it. A difference is as exact as what it is
  // taken from, and what is one row nearer may then be taken off.
  bool alike() const { return alike_; }
  // Whether a softmax's weights differ little from those a row of tokens on.
  bool is_smooth() const {
    const int64_t size = shape_.table_size(), row = row_stride();
    const double* const weights = b_.weight.data();  // with zeros behind the last
    DoubleVec squares{}, differences{};
    for (int64_t e = 0; e < size; e += kDoubles) {
      const DoubleVec weight = load<double>(weights + e);
      squares += weight * weight;
      if (e + row >= size) continue;
      const DoubleVec difference = load<double>(weights + e + row) - weight;
      differences += difference * difference;
    }
    return call_.softmax && sum_lanes<double>(differences) <= sum_lanes<double>(squares);
  }
  // What weight_of must exceed to be packed. Where sums of rows are of different orders, for the table's maximum lies far from
  // its centre, some queries may leave out far more: theirs is of a higher level, of which each is 8 times the one below.
  A limit() const { return limit_; }
  A limit(int level) const { return std::ldexp(limit_, kLevelBits * level); }
  bool has_levels() const { return call_.softmax && shared_ && sure_limit(smallest_scale_) >= limit(1); }
  int level(int64_t first, int64_t last) const {  // of some queries together
    return std::max(0, std::ilogb(sure_limit(largest_of(b_.scale.data() + first, last - first)) / limit_) / kLevelBits);
  }
  // Whether all weights of a softmax are to be taken. They are where each is more than what must be exceeded. In a small
  // window they are too where that can be said of half of the table, which holds most of the pairs: to find the others
  // costs more than they do, and so do runs of many lengths, whose ends no processor foresees.
  bool takes_all() const {
    if (A(least_) > limit_) return true;
    if (!call_.softmax || window_->tokens > kFewTokens) return false;
    const int64_t size = shape_.table_size();
    int count = 0;
    for (int64_t e = 0; e < size; ++e) count += b_.rounded[e] > limit_;
    return 2 * count >= size;
  }
  int64_t row_stride() const { return shape_.table_view().map[1]; }  // of the table
  const double* weight() const { return b_.weight.data(); }  // of each entry of the table
  const A* rounded() const { return b_.rounded.data(); }     // likewise
  const double* scale() const { return b_.scale.data(); }    // of each query
  const A* dense(int64_t i) const { return &b_.dense[i * window_->tokens]; }

  // Of P; where the table is shared, without the scale of its row.
  double weight_of(int64_t i, int64_t j) const {
    if (!factored_) return double(b_.dense[i * window_->tokens + j]);
    return b_.weight[centre_ + window_->place[j] - window_->place[i]] * (shared_ ? 1 : b_.scale[i]);
  }

  // Of a table, the entry of query i and the first key.
  template <class U>
  U* first_entry(U* table, int64_t i) const { return table + centre_ + window_->place[0] - window_->place[i]; }
  // Of all keys of a query the entries are a box of the table. For each of `count` entries the sum over the box that begins
  // there, along one dimension after the other: of as many entries from each one on as the window has tokens. Sums of n make
  // those of 2n or 2n + 1, so that 14 take three passes: 3, 7, 14. The values are in buffers.values, with room behind them; the
  // last box_reach() sums are not whole.
  template <class U>
  const U* sum_boxes(int64_t count, BoxBuffers<U>& buffers) const {
    buffers.sums.resize(buffers.values.size());
    for (int d = 0; d < kRank; ++d) {
      const int64_t stride = shape_.table_view().map[d], length = window_->cls.box[d];
      if (length == 1) continue;
      const U *const values = buffers.values.data(), *sums = values;  // of as many entries as `entries` says
      int64_t entries = 1;
      for (int bit = 63 - __builtin_clzll(length); bit-- > 0;) {
        const bool one_more = length >> bit & 1;
        const int64_t again = entries * stride;
        entries = 2 * entries + one_more;
        add(buffers.sums.data(), sums, sums + again, one_more ? values + 2 * again : nullptr, count - (entries - 1) * stride);
        sums = buffers.sums.data();
      }
      count -= (length - 1) * stride;
      std::swap(buffers.sums, buffers.values);
    }
    return buffers.values.data();
  }
  int64_t box_reach() const {
    int64_t reach = 0;
    for (int d = 0; d < kRank; ++d) reach += (window_->cls.box[d] - 1) * shape_.table_view().map[d];
    return reach;
  }

  // Calls `run(key, entry, count)` for each run of keys whose entries for query i lie side by side.
  template <class Run>
  void for_each_run(int64_t i, Run&& run) const {
    const int64_t *box = window_->cls.box, first = centre_ - window_->place[i];
    int64_t key = 0;
    for (int64_t j0 = 0; j0 < box[0]; ++j0)
      for (int64_t j1 = 0; j1 < box[1]; ++j1, key += box[2]) run(key, first + window_->place[key], box[2]);
  }

 private:
  static constexpr int kLevelBits = 3;
  static constexpr int64_t kFewTokens = 64;  // of windows in which hardly a weight is negligible
  // Of a scale: beyond it products of unscaled weights with small tokens would be flushed as subnormals.
  static constexpr double kMostShared = 1e12;

  static const A* at_group(const void* parameter, int64_t group, int64_t size) {
    return parameter ? static_cast<const A*>(parameter) + group * size : nullptr;
  }

  // ---- from the table ----

  bool weigh_table() {
    const int64_t size = shape_.table_size();
    make_room(b_.weight, size);
    least_ = 0;
    if (!call_.softmax) {
      for (int64_t e = 0; e < size; ++e) b_.weight[e] = double(table_[e]);
      b_.rounded.assign(table_, table_ + size);
      return true;
    }
    const double maximum = double(largest_of(table_, size));
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    b_.rounded.resize(round_up(size, VectorOf<A>::kLanes));
    std::fill(b_.rounded.end() - VectorOf<A>::kLanes, b_.rounded.end(), kInfinity);
    double* const weights = b_.weight.data();
    A* const rounded = b_.rounded.data();
    DoubleVec least = fill<DoubleVec>(1);
    const auto weigh = [&](int64_t e, DoubleVec entries) {
      const DoubleVec weight = exponential(entries - maximum);
      least = weight < least ? weight : least;
      store(weights + e, weight);
      store_rounded(rounded + e, weight);
    };
    int64_t e = 0;
    for (; e + kDoubles <= size; e += kDoubles) weigh(e, load_wide(table_ + e));
    A rest[kDoubles];
    std::fill(std::copy(table_ + e, table_ + size, rest), rest + kDoubles, kInfinity);
    if (e < size) weigh(e, load_wide(rest));
    std::fill(b_.weight.begin() + size, b_.weight.end(), 0.);
    least_ = fold(least, [](auto a, auto b) { return b < a ? b : a; });
    return true;
  }

  // One over the sum of each query's weights; false if a sum is too small to be divided by.
  bool scale_rows() {
    constexpr double kEnough = 1e-280;
    const int64_t tokens = window_->tokens;
    make_room(b_.scale, tokens);
    if (!call_.softmax) {
      std::fill_n(b_.scale.begin(), tokens, 1.);
      return true;
    }
    b_.row_sums.values = b_.weight;
    row_sums_ = sum_boxes(shape_.table_size(), b_.row_sums);
    double* const scale = b_.scale.data();
    for (int64_t i = 0; i < tokens; ++i) scale[i] = *first_entry(row_sums_, i);
    std::fill_n(scale + tokens, kDoubles, 1.);
    uint64_t too_small = 0;
    for (int64_t i = 0; i < tokens; i += kDoubles) {
      const DoubleVec sums = load<double>(scale + i);
      too_small |= bits_where_not_within(fill<DoubleVec>(kEnough), sums);
      store(scale + i, 1 / sums);
    }
    return too_small == 0;
  }

  // to[e] = a[e] + b[e] + c[e], c if it is not null; up to a vector more than `count`. `to` may be a.
  template <class U>
  static void add(U* to, const U* a, const U* b, const U* c, int64_t count) {
    for (int64_t e = 0; e < count; e += VectorOf<U>::kLanes) {
      const Vec<U> sum = load<U>(a + e) + load<U>(b + e);
      store(to + e, c ? sum + load<U>(c + e) : sum);
    }
  }

  bool rows_are_alike() const {
    constexpr double kMuch = 4;
    const int64_t length = window_->cls.box[2], count = window_->cls.box[1];
    const auto largest = [=, scale = b_.scale.data()](int64_t row) { return largest_of(scale + row * length, length); };
    for (int64_t first = 0; first < window_->cls.box[0] * count; first += count) {
      double forth = largest(first), back = largest(first + count - 1);
      for (int64_t row = 1; row < count; ++row) {
        const double next = largest(first + row), before = largest(first + count - 1 - row);
        if (next > kMuch * forth || before > kMuch * back) return false;
        forth = std::max(forth, next);
        back = std::max(back, before);
      }
    }
    return true;
  }

  // ---- what may be left out ----

  // What each weight of a row of such a scale may be if all of them are as large.
  A sure_limit(double scale) const { return A(negligible_ / double(window_->tokens) / scale); }

  // The largest of some that are tried with which no row leaves out too much; at least what all weights of a row may be at
  // once.
  void find_limit() {
    const double each = call_.softmax ? negligible_ / double(window_->tokens) : 0;
    limit_ = shared_ && call_.softmax ? sure_limit(largest_scale_) : A(each);
    if (!shared_ || !call_.softmax) return;
    A candidates[kCandidates];
    int count = 0;
    if (half_)
      candidates[count++] = sure_limit(std::sqrt(largest_scale_ * smallest_scale_));
    else if (window_->tokens > kFewTokens)
      count = find_candidates(candidates);
    for (int k = count; k-- > 0;)
      if (leaves_out_little(candidates[k])) {
        limit_ = candidates[k];
        return;
      }
  }

  // Candidates, the smallest first, of which a row may leave out 64; how many are worth a try: up to where all of the table's
  // weights that are no larger sum to three times what a row may leave out. A window has room for a quarter of the table.
  static constexpr int kCandidates = 8;
  int find_candidates(A* candidates) const {
    constexpr A kFew = 64, kRatio = A(1.75), kTimes = 3;
    constexpr int kLanes = VectorOf<A>::kLanes;
    candidates[0] = A(negligible_ / largest_scale_) / kFew;
    for (int k = 1; k < kCandidates; ++k) candidates[k] = kRatio * candidates[k - 1];
    const int64_t size = shape_.table_size();
    const A* const weights = b_.rounded.data();  // with infinities behind the last
    Vec<A> sums[kCandidates] = {};  // of weights up to each
    for (int64_t e = 0; e < size; e += kLanes) {
      const Vec<A> weight = load<A>(weights + e);
      POSMLP_UNROLL for (int k = 0; k < kCandidates; ++k) sums[k] += weight <= candidates[k] ? weight : Vec<A>{};
    }
    int count = 0;
    while (count < kCandidates && sum_lanes<A>(sums[count]) * largest_scale_ <= kTimes * negligible_) ++count;
    return count;
  }

  // Whether the weights up to a limit are negligible in each row.
  bool leaves_out_little(A limit) {
    constexpr int kLanes = VectorOf<A>::kLanes;
    const int64_t size = shape_.table_size(), tokens = window_->tokens, length = window_->cls.box[2];
    make_room(b_.left_out.values, round_up(size, kLanes));
    const A* const weights = b_.rounded.data();  // with infinities behind the last
    A* const small = b_.left_out.values.data();
    for (int64_t e = 0; e < size; e += kLanes) {
      const Vec<A> weight = load<A>(weights + e);
      store(small + e, weight <= limit ? weight : Vec<A>{});
    }
    const A* const left_out = sum_boxes(size, b_.left_out);
    uint64_t too_much = 0;
    for (int64_t row = 0; row < tokens; row += length) {  // whose last token's entry is the first
      const A* const left = first_entry(left_out, row + length - 1);
      const double* const sums = first_entry(row_sums_, row + length - 1);
      for (int64_t k = 0; k < length; k += kDoubles) {
        const uint64_t bits = bits_where_not_within(load_wide(left + k), negligible_ * load<double>(sums + k));
        too_much |= bits & ~uint64_t(0) >> (64 - std::min<int64_t>(64, length - k));
      }
    }
    return too_much == 0;
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

  const Call& call_;
  const Shape& shape_;
  const bool half_;          // whether maps are in half precision
  const double negligible_;  // of a row's sum, all that is left out together
  WeightBuffers<A>& b_;
  const Window* window_ = nullptr;
  const A* table_ = nullptr;  // of the group at hand
  int64_t centre_ = 0;
  const double* row_sums_ = nullptr;      // of a softmax: of the box that begins at each entry
  double largest_scale_ = 1, smallest_scale_ = 1, least_ = 0;  // least_: of a softmax's weights
  A limit_ = 0;
  bool factored_ = false, shared_ = false, alike_ = false;
};
