// The LayerNorm on X1, token by token: its statistics before the gate, the rest of its gradient after it.
//
//     xhat = (act(x1) - mean) rstd;  normed = xhat weight + bias           over the C channels of a token
//     dx1  = act'(x1) rstd (g - mean(g) - xhat mean(g xhat)),              g = dx_normed weight
//     dweight = sum over tokens of dx_normed xhat,  dbias = sum over tokens of dx_normed
//
// The normed tokens are never stored: the products apply two numbers a token as they load. Both kernels are bound by
// memory (C elements a token forward; C elements and C accumulations in, C elements out backward), and their lanes have
// neighbouring channels. Backward, a block takes eight tokens at a time: a warp makes a token's two means, then a
// thread goes down a channel of all eight, whose second reading finds them in the cache, and adds its sum to the
// block's partial sums in memory, which so cost little and have no limit of size.
#pragma once

#include "cuda_activation.cuh"
#include "cuda_reduce.cuh"

namespace posmlp::cuda {

template <class T>
struct StatisticsKernel {
  using A = Accumulation<T>;
  using Arguments = Call<T>;
  static constexpr int kThreads = 256, kTokens = 4;  // by each warp
  static constexpr int64_t kSharedBytes = 0;
  static int64_t grid(const Arguments& call) {
    return divide_up(call.shape.batch * call.shape.map_tokens() * kLanes, kThreads * kTokens);
  }

  POSMLP_DEVICE static void run(const Arguments& call, char*) {
    const int64_t tokens = call.shape.batch * call.shape.map_tokens();
    const int64_t first = (block_index() * kThreads + thread_index()) / kLanes * kTokens;
    auto position = map_walk(call.shape, first, 1);
    for (int64_t token = first; token < first + kTokens && token < tokens; ++token, position.next()) {
      const T* x = call.x + offset_in(call.x_view, position);
      const A mean = channel_mean(call, x, A(0), [](A value) { return value; });
      const A variance = channel_mean(call, x, mean, [](A value) { return value * value; });
      if (thread_index() % kLanes == 0) {
        call.mean[token] = mean;
        call.rstd[token] = A(1) / sqrt(variance + call.eps);
      }
    }
  }

 private:
  template <class F>
  POSMLP_DEVICE static A channel_mean(const Arguments& call, const T* x, A centre, F&& term) {
    A sum = 0;
    for (int64_t c = thread_index() % kLanes; c < call.shape.channels; c += kLanes)
      sum += term(activate(call.activation, to_accumulation(x[c])) - centre);
    return warp_sum(sum) / A(call.shape.channels);
  }
};

template <class T>
struct NormBackwardKernel {
  using A = Accumulation<T>;
  using Arguments = Call<T>;
  static constexpr int kThreads = 256, kTokens = kThreads / kLanes;  // at a time
  struct Token {
    const T* x;
    const A* gradient;  // dx_normed
    T* dx;
    A mean, rstd, level, tilt;
  };
  static constexpr int64_t kSharedBytes = kTokens * int64_t(sizeof(Token));
  static int64_t grid(const Arguments& call) { return call.norm_blocks; }

  POSMLP_DEVICE static void run(const Arguments& call, char* shared) {
    Token* s_tokens = reinterpret_cast<Token*>(shared);
    const int64_t tokens = call.shape.batch * call.shape.map_tokens(), channels = call.shape.channels;
    const int64_t first = tokens * block_index() / call.norm_blocks, warp = thread_index() / kLanes;
    const int64_t last = tokens * (block_index() + 1) / call.norm_blocks;
    A* dweight = call.dnorm_parts + block_index() * channels;
    A* dbias = dweight + call.norm_blocks * channels;
    for (int64_t c = thread_index(); c < channels; c += kThreads) dweight[c] = dbias[c] = 0;
    auto position = map_walk(call.shape, first + warp, kTokens);
    for (int64_t from = first; from < last; from += kTokens, position.next()) {
      sync_threads();  // all have left the last tokens
      const int64_t token = from + warp;
      if (token < last) {
        Token r{call.x + offset_in(call.x_view, position), call.dx_normed + token * channels,
                call.dx + offset_in(call.dx_view, position), call.mean[token], call.rstd[token], A(0), A(0)};
        find_means(call, r);
        if (thread_index() % kLanes == 0) s_tokens[warp] = r;
      }
      sync_threads();
      const int count = int(last - from < kTokens ? last - from : kTokens);
      for (int64_t c = thread_index(); c < channels; c += kThreads)
        finish_channel(call, s_tokens, count, c, dweight[c], dbias[c]);
    }
  }

 private:
  POSMLP_DEVICE static A normed(const Arguments& call, const Token& token, A x) {
    return (activate(call.activation, x) - token.mean) * token.rstd;
  }

  POSMLP_DEVICE static void find_means(const Arguments& call, Token& token) {
    A level = 0, tilt = 0;
    for (int64_t c = thread_index() % kLanes; c < call.shape.channels; c += kLanes) {
      const A g = token.gradient[c] * call.norm_weight[c];
      level += g;
      tilt += g * normed(call, token, to_accumulation(token.x[c]));
    }
    token.level = warp_sum(level) / A(call.shape.channels);
    token.tilt = warp_sum(tilt) / A(call.shape.channels);
  }

  POSMLP_DEVICE static void finish_channel(const Arguments& call, const Token* s_tokens, int count, int64_t c,
                                           A& dweight, A& dbias) {
    const A weight = call.norm_weight[c];
    A weight_sum = 0, bias_sum = 0;
    for (int t = 0; t < count; ++t) {
      const Token& token = s_tokens[t];
      const A x = to_accumulation(token.x[c]), xhat = normed(call, token, x), gradient = token.gradient[c];
      const A dx = (gradient * weight - token.level - xhat * token.tilt) * token.rstd;
      token.dx[c] = round_to<T>(dx * activation_slope(call.activation, x));
      weight_sum += gradient * xhat;
      bias_sum += gradient;
    }
    dweight += weight_sum;
    dbias += bias_sum;
  }
};

}  // namespace posmlp::cuda
