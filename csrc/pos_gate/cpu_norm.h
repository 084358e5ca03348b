// LayerNorm on X1 over its C channels: the statistics before the gate, the rest of the gradient after it.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class T>
class Norm {
 public:
  using A = typename AccumulationOf<T>::type;

  explicit Norm(const Call& call)
      : call_(call), channels_(call.shape.channels), x_(channels_), slope_(channels_) {}

  void statistics(int64_t first, int64_t last) {
    A *mean = static_cast<A*>(call_.norm_mean), *rstd = static_cast<A*>(call_.norm_rstd);
    for (int64_t token = first; token < last; ++token) {
      load_token(token, nullptr);
      const double m = mean_of([&](int64_t c) { return double(x_[c]); });
      const double variance = mean_of([&](int64_t c) { return (x_[c] - m) * (x_[c] - m); });
      mean[token] = A(m);
      rstd[token] = A(1 / std::sqrt(variance + call_.eps));
    }
  }

  // Gradients of the first half of x, and partial sums of those of weight and bias, for blocks of tokens.
  void backward(int64_t first_block, int64_t last_block) {
    const int64_t tokens = call_.shape.batch * call_.shape.map_tokens();
    const A *mean = static_cast<const A*>(call_.norm_mean), *rstd = static_cast<const A*>(call_.norm_rstd);
    const A* weight = static_cast<const A*>(call_.norm_weight);
    for (int64_t block = first_block; block < last_block; ++block) {
      A* dweight = static_cast<A*>(call_.dnorm_weight_parts) + block * channels_;
      A* dbias = static_cast<A*>(call_.dnorm_bias_parts) + block * channels_;
      std::fill_n(dweight, channels_, A(0));
      std::fill_n(dbias, channels_, A(0));
      const int64_t first = tokens * block / call_.norm_blocks, last = tokens * (block + 1) / call_.norm_blocks;
      for (int64_t token = first; token < last; ++token) {
        load_token(token, slope_.data());
        const A* gradient = static_cast<const A*>(call_.dx_normed) + token * channels_;
        for (int64_t c = 0; c < channels_; ++c) {
          x_[c] = (x_[c] - mean[token]) * rstd[token];
          dweight[c] += gradient[c] * x_[c];
          dbias[c] += gradient[c];
        }
        const A level = A(mean_of([&](int64_t c) { return double(gradient[c] * weight[c]); }));
        const A tilt = A(mean_of([&](int64_t c) { return double(gradient[c] * weight[c]) * x_[c]; }));
        for (int64_t c = 0; c < channels_; ++c)
          x_[c] = (gradient[c] * weight[c] - level - x_[c] * tilt) * rstd[token];
        if (call_.activation != Activation::none)
          for (int64_t c = 0; c < channels_; ++c) x_[c] *= slope_[c];
        T* dx = static_cast<T*>(call_.dx) + token * 2 * channels_;
        for_each_vector<A, T>(1, channels_, [&](auto lanes, int64_t, int64_t c) {
          store_as(lanes, dx + c, load_as<A>(lanes, &x_[c]));
        });
      }
    }
  }

 private:
  // The activated X1 of a token, [C].
  void load_token(int64_t token, A* slopes) {
    const Shape& shape = call_.shape;
    int64_t position[kRank], rest = token;
    for (int d = kRank - 1; d >= 0; --d) {
      position[d] = rest % shape.map[d];
      rest /= shape.map[d];
    }
    const T* x = static_cast<const T*>(call_.x) + call_.x_view.offset(rest, position);
    with_constant(call_.activation, [&](auto activation) {
      for_each_vector<A, T>(1, channels_, [&](auto lanes, int64_t, int64_t c) {
        store_activated<activation>(lanes, load_as<A>(lanes, x + c), &x_[c], slopes ? slopes + c : nullptr);
      });
    });
  }

  // Over the channels, in double, which costs nothing beside the memory; four running sums make short chains.
  template <class F>
  double mean_of(F&& value) const {
    double sums[4] = {0, 0, 0, 0};
    int64_t c = 0;
    for (; c + 4 <= channels_; c += 4)
      for (int i = 0; i < 4; ++i) sums[i] += value(c + i);
    for (; c < channels_; ++c) sums[0] += value(c);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) / double(channels_);
  }

  const Call& call_;
  const int64_t channels_;
  std::vector<A> x_, slope_;
};
