// The way back from the gradient of P to those of the table and the free matrix.
//
// Of the logits: dP, or under softmax P * (dP - sum of P * dP), where the sum is divided by that of P, which rounding
// keeps from 1: what all of a row's dP have in common must cancel.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

struct GradientBuffers {
  std::vector<double> sums, row;
};

template <class A>
class MixingGradient {
 public:
  MixingGradient(const Call& call, const Weights<A>& weights, GradientBuffers& buffers)
      : call_(call), shape_(call.shape), weights_(weights), b_(buffers) {}

  // Adds the gradients of a group's table and matrix, given dP [tokens, ld], rows scaled. Sums over rows are taken in
  // double, where their order does not show.
  void add(int64_t part, const A* dp, int64_t ld) {
    const int64_t size = shape_.table_size();
    b_.sums.assign((call_.dtable_parts ? size : 0) + 2 * kDoubles, 0.);
    if (weights_.factored())
      for (int64_t i = 0; i < weights_.window().tokens; ++i) add_factored_row(i, dp + i * ld);
    else
      for (int64_t i = 0; i < weights_.window().tokens; ++i) add_dense_row(i, dp + i * ld, part);
    if (!call_.dtable_parts) return;
    A* to = static_cast<A*>(call_.dtable_parts) + part * size;
    const bool weigh = weights_.factored() && call_.softmax;
    for (int64_t e = 0; e < size; ++e) to[e] += A(weigh ? weights_.weight()[e] * b_.sums[e] : b_.sums[e]);
  }

 private:
  // Where P is factored, an entry's weight can wait until all rows are summed. Runs of keys are taken by whole vectors,
  // of which the last one's lanes beyond the run count nothing.
  void add_factored_row(int64_t i, const A* dp) {
    const int64_t run = weights_.window().cls.box[2], last = (run - 1) / kDoubles * kDoubles;
    const VectorOf<double>::ints in_run = lane_numbers() < run - last;
    const double scale = weights_.shared() ? 1 : weights_.scale()[i];
    double mean = 0;
    if (call_.softmax) {
      DoubleVec sums{}, weights{};
      weights_.for_each_run(i, [&](int64_t key, int64_t at, int64_t) {
        for (int64_t c = 0; c <= last; c += kDoubles) {
          const DoubleVec weight = load<double>(weights_.weight() + at + c), product = weight * load_wide(dp + key + c);
          weights += c < last ? weight : in_run ? weight : DoubleVec{};
          sums += c < last ? product : in_run ? product : DoubleVec{};
        }
      });
      mean = sum_lanes<double>(sums) / sum_lanes<double>(weights);
    }
    weights_.for_each_run(i, [&](int64_t key, int64_t at, int64_t) {
      for (int64_t c = 0; c <= last; c += kDoubles) {
        const DoubleVec gradient = (load_wide(dp + key + c) - mean) * scale;
        double* to = &b_.sums[at + c];
        store(to, load<double>(to) + (c < last ? gradient : in_run ? gradient : DoubleVec{}));
      }
    });
  }

  void add_dense_row(int64_t i, const A* dp, int64_t part) {
    const int64_t tokens = weights_.window().tokens, n = shape_.window_tokens();
    const A* weight = weights_.dense(i);
    double sum = 0, weights = 0;
    if (call_.softmax)
      for (int64_t j = 0; j < tokens; ++j) sum += double(weight[j]) * double(dp[j]), weights += double(weight[j]);
    make_room(b_.row, tokens);
    for (int64_t j = 0; j < tokens; ++j)
      b_.row[j] = call_.softmax ? double(weight[j]) * (double(dp[j]) - sum / weights) : double(dp[j]);
    if (call_.dtable_parts)
      weights_.for_each_run(i, [&](int64_t key, int64_t at, int64_t count) {
        for (int64_t c = 0; c < count; ++c) b_.sums[at + c] += b_.row[key + c];
      });
    if (call_.dmatrix_parts) {
      A* to = static_cast<A*>(call_.dmatrix_parts) + part * n * n + weights_.window().index[i] * n;
      for (int64_t j = 0; j < tokens; ++j) to[weights_.window().index[j]] += A(b_.row[j]);
    }
  }

  const Call& call_;
  const Shape& shape_;
  const Weights<A>& weights_;
  GradientBuffers& b_;
};
