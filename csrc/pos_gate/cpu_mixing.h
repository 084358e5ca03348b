// The mixing matrix of one group and window class, and the way back from its gradient to the parameters.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class A>
class Mixing {
 public:
  explicit Mixing(const Call& call) : call_(call), shape_(call.shape) {}

  // P into `p` [ld, ld], zeros beyond the window's tokens.
  void build(const Window& window, int64_t group, A* p, int64_t ld) {
    const int64_t tokens = window.tokens;
    const A* table = at_group(call_.table, group, shape_.table_size());
    const bool factored = call_.softmax && table && !call_.matrix;
    if (factored) exponentiate(table, tokens);
    std::fill(p + tokens * ld, p + ld * ld, A(0));
    for (int64_t i = 0; i < tokens; ++i) {
      A* row = p + i * ld;
      std::fill(row, row + ld, A(0));
      if (factored && factored_row(window, i, row)) continue;
      if (table)
        for_each_run(window, i, i + 1, [&](int64_t, int64_t key, int64_t at) {
          copy_row(table + at, row + key, window.cls.box[2]);
        });
      if (call_.matrix) add_matrix_row(window, group, i, row);
      if (call_.softmax) softmax_row(row, tokens);
    }
  }

  // Adds the gradients of a group's table and matrix, given dP, which is overwritten.
  void add_gradient(const Window& window, int64_t part, const A* p, A* dp, int64_t ld) {
    const int64_t tokens = window.tokens, n = shape_.window_tokens();
    if (call_.softmax)
      for (int64_t i = 0; i < tokens; ++i) softmax_row_gradient(p + i * ld, dp + i * ld, tokens);
    if (call_.dtable_parts) {
      A* to = static_cast<A*>(call_.dtable_parts) + part * shape_.table_size();
      sums_.assign(shape_.table_size(), 0.);  // up to N terms an entry: in double their order does not show
      for_each_run(window, 0, tokens, [&](int64_t i, int64_t key, int64_t at) {
        for (int64_t c = 0; c < window.cls.box[2]; ++c) sums_[at + c] += dp[i * ld + key + c];
      });
      for (int64_t i = 0; i < shape_.table_size(); ++i) to[i] += A(sums_[i]);
    }
    if (call_.dmatrix_parts) {
      A* to = static_cast<A*>(call_.dmatrix_parts) + part * n * n;
      for (int64_t i = 0; i < tokens; ++i)
        for (int64_t j = 0; j < tokens; ++j) to[window.index[i] * n + window.index[j]] += dp[i * ld + j];
    }
  }

 private:
  static constexpr int kLanes = VectorOf<A>::kLanes, kDoubles = VectorOf<double>::kLanes;
  static constexpr A kInfinity = std::numeric_limits<A>::infinity(), kSmallest = std::numeric_limits<A>::min();

  static const A* at_group(const void* parameter, int64_t group, int64_t size) {
    return parameter ? static_cast<const A*>(parameter) + group * size : nullptr;
  }

  // Calls `run(i, key, at)` for the query i and each run of keys whose table entries lie side by side.
  template <class Run>
  void for_each_run(const Window& window, int64_t first, int64_t last, Run&& run) const {
    const int64_t *box = window.cls.box, *size = shape_.window;
    for (int64_t i = first; i < last; ++i) {
      const int64_t i0 = i / (box[1] * box[2]), i1 = i / box[2] % box[1], i2 = i % box[2];
      for (int64_t j0 = 0, key = 0; j0 < box[0]; ++j0)
        for (int64_t j1 = 0; j1 < box[1]; ++j1, key += box[2]) {
          const int64_t delta0 = j0 - i0 + size[0] - 1, delta1 = j1 - i1 + size[1] - 1;
          run(i, key, (delta0 * (2 * size[1] - 1) + delta1) * (2 * size[2] - 1) + size[2] - 1 - i2);
        }
    }
  }

  void add_matrix_row(const Window& window, int64_t group, int64_t i, A* row) const {
    const int64_t n = shape_.window_tokens();
    const A* matrix = at_group(call_.matrix, call_.matrix_per_group ? group : 0, n * n) + window.index[i] * n;
    for (int64_t j = 0; j < window.tokens; ++j) row[j] += matrix[window.index[j]];
  }

  // Without a free matrix a weight is e^(R(delta) - max R) over its row's sum: one exponential per table entry serves
  // all N rows. That few can be had in double, and must: an error in one would be the same in every row, and gradients
  // of the table, which sum over rows, would not average it out.
  void exponentiate(const A* table, int64_t tokens) {
    const int64_t size = shape_.table_size();
    A maximum = table[0];
    for (int64_t i = 1; i < size; ++i) maximum = table[i] > maximum ? table[i] : maximum;
    weights_.assign(round_up(size, kDoubles), 0.);
    for (int64_t i = 0; i < size; ++i) weights_[i] = double(table[i]) - double(maximum);
    for (int64_t i = 0; i < size; i += kDoubles)
      store<double>(&weights_[i], exponential(load<double>(&weights_[i])));
    row_.assign(round_up(tokens, kDoubles), 0.);
  }

  // The weights of query i; false where its keys are all so far from the table's maximum that nothing is left of them.
  bool factored_row(const Window& window, int64_t i, A* row) {
    constexpr double kEnough = 1e-280;
    for_each_run(window, i, i + 1, [&](int64_t, int64_t key, int64_t at) {
      copy_row(&weights_[at], &row_[key], window.cls.box[2]);
    });
    DoubleVec sums{};
    for (int64_t j = 0; j < window.tokens; j += kDoubles) sums += load<double>(&row_[j]);
    const double sum = sum_lanes<double>(sums);
    if (!(sum >= kEnough)) return false;
    const double inverse = 1 / sum;
    for (int64_t j = 0; j < window.tokens; j += kDoubles) {
      const DoubleVec weight = load<double>(&row_[j]) * inverse;
      store_rounded(row + j, weight < double(kSmallest) ? DoubleVec{} : weight);
    }
    return true;
  }

  // About the row's own maximum, so that centres far away divide by no zero. Weights below the smallest normal number
  // become zero, here as above: subnormal operands would slow every product down.
  static void softmax_row(A* row, int64_t tokens) {
    const int64_t padded = round_up(tokens, kLanes);
    for (int64_t j = tokens; j < padded; ++j) row[j] = -kInfinity;
    Vec<A> largest = fill(-kInfinity);
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec<A> value = load<A>(row + j);
      largest = value > largest ? value : largest;
    }
    A maximum = -kInfinity;
    for (int l = 0; l < kLanes; ++l) maximum = largest[l] > maximum ? largest[l] : maximum;
    Vec<A> sums{};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec<A> weight = exponential(load<A>(row + j) - maximum);
      sums += weight;
      store<A>(row + j, weight);
    }
    const A inverse = A(1 / sum_lanes<A>(sums));
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec<A> weight = load<A>(row + j) * inverse;
      store<A>(row + j, weight < kSmallest ? Vec<A>{} : weight);
    }
    for (int64_t j = tokens; j < padded; ++j) row[j] = 0;
  }

  // dL = P * (dP - sum of P * dP). The sum is divided by that of P, which rounding keeps from 1: what all of a row's dP
  // have in common must cancel.
  static void softmax_row_gradient(const A* weight, A* gradient, int64_t tokens) {
    Vec<A> sums{}, weights{};
    for (int64_t j = 0; j < tokens; j += kLanes) {
      sums += load<A>(weight + j) * load<A>(gradient + j);
      weights += load<A>(weight + j);
    }
    const A mean = A(sum_lanes<A>(sums) / sum_lanes<A>(weights));
    for (int64_t j = 0; j < tokens; j += kLanes)
      store<A>(gradient + j, load<A>(weight + j) * (load<A>(gradient + j) - mean));
  }

  const Call& call_;
  const Shape& shape_;
  std::vector<double> weights_, row_;  // e^(R - max R) of the group at hand, and those of a query
  std::vector<double> sums_;           // the gradient of a table
};
