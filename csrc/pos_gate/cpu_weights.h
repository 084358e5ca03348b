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
// may take: for a Gaussian half of a window of 14 and three quarters of one of 24 are the others. What may be left out of
// a row is what does not exceed its limit, and all of the table up to there, far more than the row has, sums to no more
// than that. Of maps in half precision, whose eps is large, it is eps / 8, and no more than if all of the row were as large:
// what is left out, always far weights, is seen in the table's gradients, which are in single.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

constexpr int kDoubles = VectorOf<double>::kLanes;

// `count` values, with room for a vector to stick out: zeros.
inline void make_room(std::vector<double>& values, int64_t count) {
  values.resize(count + 2 * kDoubles);
  std::fill(values.begin() + count, values.end(), 0.);
}

// The first of some values in an order of values or vectors of them; `count` is not zero.
template <class A, class Before>
inline A first_of(const A* values, int64_t count, Before&& before) {
  constexpr int kLanes = VectorOf<A>::kLanes;
  A first = values[0];
  if (count >= kLanes) {
    Vec<A> vector = load<A>(values + count - kLanes);
    for (int64_t i = 0; i + kLanes <= count; i += kLanes) {
      const Vec<A> next = load<A>(values + i);
      vector = before(next, vector) ? next : vector;
    }
    for (int l = 0; l < kLanes; ++l) first = before(vector[l], first) ? vector[l] : first;
    return first;
  }
  for (int64_t i = 1; i < count; ++i) first = before(values[i], first) ? values[i] : first;
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

// Kept from call to call by each thread, so that no pages are faulted in again.
template <class A>
struct WeightBuffers {
  std::vector<double> weight, scale, row, sums;
  std::vector<A> dense, limit, rounded;
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
    shared_ = factored_ && largest_scale_ < kMostShared;
    if (!factored_) build_dense(group);
    find_limits();
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
  const A* limit() const { return b_.limit.data(); }  // of each query: what weight_of must exceed to be packed
  // Whether all weights of a softmax are to be taken. They are where each is more than what any query's must exceed. In a
  // small window they are too where that can be said of half of the table, which holds most of the pairs: to find the
  // others costs more than they do, and so do runs of many lengths, whose ends no processor foresees.
  bool takes_all() const {
    if (A(least_) > largest_of(b_.limit.data(), int64_t(b_.limit.size()))) return true;
    if (!call_.softmax || window_->tokens > kFewTokens) return false;
    const A limit = smallest_of(b_.limit.data(), window_->tokens);
    const int64_t size = shape_.table_size();
    int count = 0;
    for (int64_t e = 0; e < size; ++e) count += b_.rounded[e] > limit;
    return 2 * count >= size;
  }
  const double* weight() const { return b_.weight.data(); }  // of each entry of the table
  const double* scale() const { return b_.scale.data(); }    // of each query
  const A* dense(int64_t i) const { return &b_.dense[i * window_->tokens]; }

  // Of P; where the table is shared, without the scale of its row.
  double weight_of(int64_t i, int64_t j) const {
    if (!factored_) return double(b_.dense[i * window_->tokens + j]);
    return b_.weight[centre_ + window_->place[j] - window_->place[i]] * (shared_ ? 1 : b_.scale[i]);
  }

  // Of a table, the entry of query i and the first key.
  double* first_entry(double* table, int64_t i) const { return table + centre_ + window_->place[0] - window_->place[i]; }
  // What is there for each query, all else being zero, is taken from there and added to the entries of all its keys.
  void spread_boxes(double* table) const { spread_boxes(table, 0); }

  // Calls `run(key, entry, count)` for each run of keys whose entries for query i lie side by side.
  template <class Run>
  void for_each_run(int64_t i, Run&& run) const {
    const int64_t *box = window_->cls.box, first = centre_ - window_->place[i];
    int64_t key = 0;
    for (int64_t j0 = 0; j0 < box[0]; ++j0)
      for (int64_t j1 = 0; j1 < box[1]; ++j1, key += box[2]) run(key, first + window_->place[key], box[2]);
  }

 private:
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
      return true;
    }
    const double maximum = double(largest_of(table_, size));
    least_ = std::exp(double(smallest_of(table_, size)) - maximum);
    for (int64_t e = 0; e < size; ++e) b_.weight[e] = double(table_[e]) - maximum;
    b_.rounded.resize(round_up(size, kDoubles));
    for (int64_t e = 0; e < size; e += kDoubles) {
      const DoubleVec weight = exponential(load<double>(&b_.weight[e]));
      store(&b_.weight[e], weight);
      store_rounded(&b_.rounded[e], weight);
    }
    std::fill(b_.weight.begin() + size, b_.weight.end(), 0.);
    return true;
  }

  // One over the sum of each query's weights; false if a sum is too small to be divided by.
  bool scale_rows() {
    constexpr double kEnough = 1e-280;
    const int64_t tokens = window_->tokens;
    make_room(b_.scale, round_up(tokens, VectorOf<A>::kLanes));
    if (!call_.softmax) {
      std::fill_n(b_.scale.begin(), tokens, 1.);
      return true;
    }
    b_.sums = b_.weight;
    sum_boxes(b_.sums.data(), 0);
    for (int64_t i = 0; i < tokens; ++i) {
      const double sum = *first_entry(b_.sums.data(), i);
      if (!(sum >= kEnough)) return false;
      b_.scale[i] = sum;
    }
    for (int64_t i = 0; i < tokens; ++i) b_.scale[i] = 1 / b_.scale[i];  // by vectors
    return true;
  }

  // The sum of each query's weights, to where its first key's entry was: its keys are a box of the table. Along dimension
  // d such a box ends the first half of the entries that the window reaches and begins the second, so that its sum is one
  // of a suffix and a prefix.
  void sum_boxes(double* sums, int d) const {
    const int64_t stride = shape_.table_view().map[d], box = window_->cls.box[d];
    sums += (shape_.window[d] - box) * stride;
    for (int64_t k = box - 2; k >= 0; --k) add_entries(sums, k, k + 1, stride);
    for (int64_t k = box + 1; k < 2 * box - 1; ++k) add_entries(sums, k, k - 1, stride);
    for (int64_t k = 1; k < box; ++k) add_entries(sums, k, k + box - 1, stride);
    if (d + 1 < kRank)
      for (int64_t k = 0; k < box; ++k) sum_boxes(sums + k * stride, d + 1);
  }
  void spread_boxes(double* sums, int d) const {
    const int64_t stride = shape_.table_view().map[d], box = window_->cls.box[d];
    sums += (shape_.window[d] - box) * stride;
    if (d + 1 < kRank)
      for (int64_t k = 0; k < box; ++k) spread_boxes(sums + k * stride, d + 1);
    for (int64_t k = box - 1; k > 0; --k) add_entries(sums, k + box - 1, k, stride);
    for (int64_t k = 2 * box - 2; k > box; --k) add_entries(sums, k - 1, k, stride);
    for (int64_t k = 0; k < box - 1; ++k) add_entries(sums, k + 1, k, stride);
  }
  static void add_entries(double* sums, int64_t to, int64_t from, int64_t stride) {
    double* const sum = sums + to * stride;
    const double* const added = sums + from * stride;
    for (int64_t e = 0; e < stride; ++e) sum[e] += added[e];
  }

  // ---- what may be left out ----

  // The largest of some candidates up to which the table's weights, times the row's scale, are negligible together; at
  // least what is so if all of the row were as large.
  void find_limits() {
    constexpr int kLanes = VectorOf<A>::kLanes;
    const int64_t tokens = window_->tokens;
    const A each = A(call_.softmax ? negligible_ / double(tokens) : 0);
    b_.limit.assign(round_up(tokens, kLanes), each);
    if (!shared_ || !call_.softmax) return;
    A candidates[kCandidates] = {}, scales[kCandidates] = {};
    const int count = tokens > kFewTokens && !half_ ? kCandidates : 0;
    if (count > 0) find_candidates(each, candidates, scales);
    for (int64_t i = 0; i < tokens; i += kLanes) {
      A rounded[kLanes];
      for (int j = 0; j < kLanes; j += kDoubles) store_rounded(rounded + j, load<double>(&b_.scale[i + j]));
      const Vec<A> scale = load<A>(rounded);
      Vec<A> limit = each / scale;
      for (int k = 0; k < count; ++k)
        limit = scale <= scales[k] && limit < candidates[k] ? fill<Vec<A>>(candidates[k]) : limit;
      store(&b_.limit[i], limit);
    }
  }

  // Candidates, the smallest first, and the largest scale of a row that may leave out so much.
  static constexpr int kCandidates = 8;
  void find_candidates(A each, A* candidates, A* scales) const {
    constexpr A kFirst = 3, kRatio = A(1.75);
    candidates[0] = kFirst * each / A(largest_scale_);
    for (int k = 1; k < kCandidates; ++k) candidates[k] = kRatio * candidates[k - 1];
    constexpr int kLanes = std::min(kCandidates, VectorOf<A>::kLanes);
    using Some = Vec<A, kLanes>;
    for (int k = 0; k < kCandidates; k += kLanes) {
      const Some limit = load<A, kLanes>(candidates + k);
      Some sums[4] = {};  // of weights up to each; four that wait for each other less than one would
      const auto add = [&](Some& sum, A weight) { sum += weight <= limit ? fill<Some>(weight) : Some{}; };
      const int64_t size = shape_.table_size();
      int64_t e = 0;
      for (; e + 4 <= size; e += 4)
        for (int i = 0; i < 4; ++i) add(sums[i], b_.rounded[e + i]);
      for (; e < size; ++e) add(sums[0], b_.rounded[e]);
      store(scales + k, A(negligible_) / ((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
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
  double largest_scale_ = 1, least_ = 0;  // least_: of a softmax's weights
  bool factored_ = false, shared_ = false;
};
