// Random problems for the kernels of any back end, the definition of the gate in double, and what it says of gradients.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "shape.h"

namespace posmlp {

inline std::mt19937_64 generator(1);
inline int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
template <class A>
std::vector<A> random_values(int64_t count) {
  std::normal_distribution<double> normal;
  std::vector<A> values(count);
  for (A& value : values) value = A(normal(generator));
  return values;
}

template <class A>
struct Problem {
  Shape shape;
  bool softmax, has_table, has_matrix, matrix_per_group, has_bias, has_norm;
  Activation activation;
  std::vector<A> x, dz, table, matrix, bias, norm_weight, norm_bias;
};

// A table that falls off from its centre, or from one far outside: rows whose keys are all far from that lie deep below.
template <class A>
std::vector<A> falling_table(const Shape& s, bool far) {
  const View strides = s.table_view();
  std::vector<A> table(s.groups * s.table_size());
  for (size_t e = 0; e < table.size(); ++e)
    for (int d = 0; d < kRank; ++d) {
      const int64_t size = 2 * s.window[d] - 1, index = int64_t(e) / strides.map[d] % size;
      const int64_t beyond = (far ? size + 3 : size / 2) - index;
      table[e] -= A(0.5) * A(beyond * beyond);
    }
  return table;
}

// `long_line`: windows whose sums are taken in blocks. `many_rows`: such as sums of two rows are taken of, with tables of which
// much or nothing is left out.
template <class A>
Problem<A> random_problem(bool long_line = false, bool many_rows = false) {
  Problem<A> p;
  Shape& s = p.shape;
  s.batch = pick(1, 3);
  s.groups = pick(1, 3);
  s.channels = s.groups * (pick(0, 3) ? pick(1, 30) : pick(90, 200));
  for (int d = pick(0, 2); d < kRank; ++d) {
    const bool long_rows = d == 2 && pick(0, 2) == 0;  // so long that a tile of rows fits in
    s.map[d] = pick(1, d == 0 ? 4 : long_rows ? 30 : 9);
    s.window[d] = pick(1, d == 0 ? 3 : long_rows ? 17 : 6);
    s.shift[d] = pick(0, s.window[d] - 1);
  }
  if (long_line) {
    for (int d = 0; d < kRank; ++d) s.map[d] = s.window[d] = 1, s.shift[d] = 0;
    s.map[2] = pick(250, 900);
    s.window[2] = pick(250, 900);
    s.shift[2] = pick(0, s.window[2] - 1);
    s.channels = s.groups * pick(1, 9);
  }
  if (many_rows) {
    s.batch = pick(2, 3);
    s.channels = s.groups * pick(96, 110);
    for (int d = 0; d < kRank; ++d) {
      s.window[d] = d == 0 ? pick(1, 2) : d == 1 ? pick(8, 11) : pick(4, 8);
      s.map[d] = s.window[d] + (pick(0, 3) ? 0 : 1);
      s.shift[d] = 0;
    }
  }
  p.softmax = pick(0, 1);
  p.has_matrix = pick(0, 1);
  p.has_table = !p.has_matrix || s.groups == 1 || pick(0, 1);
  p.matrix_per_group = p.has_matrix && (!p.has_table || pick(0, 1));
  p.has_bias = pick(0, 1);
  p.has_norm = pick(0, 1);
  p.activation = Activation(pick(0, 2));
  const int64_t n = s.window_tokens(), tokens = s.batch * s.map_tokens();
  p.x = random_values<A>(tokens * 2 * s.channels);
  p.dz = random_values<A>(tokens * s.channels);
  p.table = many_rows && pick(0, 1) ? falling_table<A>(s, false) : random_values<A>(s.groups * s.table_size());
  p.matrix = random_values<A>((p.matrix_per_group ? s.groups : 1) * n * n);
  p.bias = random_values<A>(n);
  p.norm_weight = random_values<A>(s.channels);
  p.norm_bias = random_values<A>(s.channels);
  return p;
}

inline double activated(Activation activation, double x) {
  if (activation == Activation::gelu) return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
  if (activation == Activation::gelu_tanh)
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  return x;
}

// z by the definition: token by token, in double.
template <class A>
std::vector<double> definition(const Problem<A>& p) {
  const Shape& s = p.shape;
  const int64_t tokens = s.batch * s.map_tokens(), C = s.channels, D = s.group_channels(), n = s.window_tokens();
  std::vector<double> x1(tokens * C), x2(tokens * C), z(tokens * C);
  for (int64_t t = 0; t < tokens; ++t) {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < C; ++c) {
      x1[t * C + c] = activated(p.activation, double(p.x[t * 2 * C + c]));
      x2[t * C + c] = activated(p.activation, double(p.x[t * 2 * C + C + c]));
      mean += x1[t * C + c] / C;
    }
    for (int64_t c = 0; c < C; ++c) variance += (x1[t * C + c] - mean) * (x1[t * C + c] - mean) / C;
    if (p.has_norm)
      for (int64_t c = 0; c < C; ++c)
        x1[t * C + c] = (x1[t * C + c] - mean) / std::sqrt(variance + 1e-3) * p.norm_weight[c] + p.norm_bias[c];
  }
  const auto place = [&](int64_t token, int64_t* window, int64_t* inside) {
    int64_t rest = token % s.map_tokens();
    for (int d = kRank - 1; d >= 0; --d) {
      const int64_t at = rest % s.map[d] + s.shift[d];
      rest /= s.map[d];
      window[d] = at / s.window[d];
      inside[d] = at % s.window[d];
    }
  };
  const auto index = [&](const int64_t* q) { return (q[0] * s.window[1] + q[1]) * s.window[2] + q[2]; };
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t g = 0; g < s.groups; ++g) {
      int64_t wi[kRank], qi[kRank];
      place(i, wi, qi);
      std::vector<int64_t> keys;
      std::vector<double> weights;
      double largest = -INFINITY, sum = 0;
      for (int64_t j = i / s.map_tokens() * s.map_tokens(); j < (i / s.map_tokens() + 1) * s.map_tokens(); ++j) {
        int64_t wj[kRank], qj[kRank], delta = 0;
        place(j, wj, qj);
        if (!std::equal(wi, wi + kRank, wj)) continue;
        for (int d = 0; d < kRank; ++d) delta = delta * (2 * s.window[d] - 1) + qj[d] - qi[d] + s.window[d] - 1;
        double weight = p.has_table ? double(p.table[g * s.table_size() + delta]) : 0;
        if (p.has_matrix) weight += p.matrix[(p.matrix_per_group ? g * n * n : 0) + index(qi) * n + index(qj)];
        keys.push_back(j);
        weights.push_back(weight);
        largest = std::max(largest, weight);
      }
      if (p.softmax) {
        for (double& weight : weights) sum += weight = std::exp(weight - largest);
        for (double& weight : weights) weight /= sum;
      }
      for (int64_t c = g * D; c < (g + 1) * D; ++c) {
        double y = p.has_bias ? double(p.bias[index(qi)]) : 0;
        for (size_t k = 0; k < keys.size(); ++k) y += weights[k] * x1[keys[k] * C + c];
        z[i * C + c] = y * x2[i * C + c];
      }
    }
  return z;
}

inline std::string description(const Shape& s) {
  char text[200];
  std::snprintf(text, sizeof text, "B %d map %d %d %d window %d %d %d shift %d %d %d C %d S %d", int(s.batch),
                int(s.map[0]), int(s.map[1]), int(s.map[2]), int(s.window[0]), int(s.window[1]), int(s.window[2]),
                int(s.shift[0]), int(s.shift[1]), int(s.shift[2]), int(s.channels), int(s.groups));
  return text;
}

struct Gradients {  // empty where there is none
  std::vector<double> x, table, matrix, bias, norm_weight, norm_bias;
};

// The gradients are tested by their meaning, all at once, in double:
// <dz, z(p + h v) - z(p - h v)> / 2h = <gradients, v>.
inline bool gradients_hold(const Problem<double>& p, const Gradients& gradients) {
  const double h = 1e-6;
  auto above = p, below = p;
  double predicted = 0, scale = 1;
  const auto move = [&](std::vector<double> Problem<double>::*member, const std::vector<double>& gradient) {
    if (gradient.empty()) return;
    const auto v = random_values<double>((p.*member).size());
    for (size_t i = 0; i < v.size(); ++i) {
      (above.*member)[i] += h * v[i], (below.*member)[i] -= h * v[i];
      predicted += gradient[i] * v[i], scale += std::fabs(gradient[i] * v[i]);
    }
  };
  move(&Problem<double>::x, gradients.x);
  move(&Problem<double>::table, gradients.table);
  move(&Problem<double>::matrix, gradients.matrix);
  move(&Problem<double>::bias, gradients.bias);
  move(&Problem<double>::norm_weight, gradients.norm_weight);
  move(&Problem<double>::norm_bias, gradients.norm_bias);
  const auto z_above = definition(above), z_below = definition(below);
  double change = 0;
  for (size_t i = 0; i < p.dz.size(); ++i) change += p.dz[i] * (z_above[i] - z_below[i]) / (2 * h);
  return std::fabs(change - predicted) <= 1e-6 * scale;
}

}  // namespace posmlp
