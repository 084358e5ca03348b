// The CPU kernels against the definition of the gate, on every instruction set of this processor, without torch: small
// enough to run under the sanitizers. Buffers are allocated one by one and exactly, so that a stray access is caught.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <string>
#include <vector>

#include "cpu.h"

using namespace posmlp;
using namespace posmlp::cpu;

namespace {

std::mt19937_64 generator(1);
int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
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

template <class A>
Problem<A> random_problem() {
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
  p.table = random_values<A>(s.groups * s.table_size());
  p.matrix = random_values<A>((p.matrix_per_group ? s.groups : 1) * n * n);
  p.bias = random_values<A>(n);
  p.norm_weight = random_values<A>(s.channels);
  p.norm_bias = random_values<A>(s.channels);
  return p;
}

double activate(Activation activation, double x) {
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
      x1[t * C + c] = activate(p.activation, double(p.x[t * 2 * C + c]));
      x2[t * C + c] = activate(p.activation, double(p.x[t * 2 * C + C + c]));
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

// x, dz, z and dx as the kernels have them in memory: numbers, or the upper halves of float32 that are bfloat16.
template <class A>
std::vector<char> stored(const std::vector<A>& values, Storage storage) {
  const size_t size = storage == Storage::bfloat16 ? 2 : sizeof(A);
  std::vector<char> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i)
    std::memcpy(&bytes[i * size], reinterpret_cast<const char*>(&values[i]) + (sizeof(A) - size), size);
  return bytes;
}
template <class A>
std::vector<A> read_back(const std::vector<char>& bytes, Storage storage) {
  const size_t size = storage == Storage::bfloat16 ? 2 : sizeof(A);
  std::vector<A> values(bytes.size() / size, A(0));
  for (size_t i = 0; i < values.size(); ++i)
    std::memcpy(reinterpret_cast<char*>(&values[i]) + (sizeof(A) - size), &bytes[i * size], size);
  return values;
}

template <class A>
struct Results {
  std::vector<A> z, dx, dtable, dmatrix, dbias, dnorm_weight, dnorm_bias;
};

template <class A>
Results<A> run(const Problem<A>& p, Storage storage, const Kernels& kernels, int64_t splits) {
  const Shape& s = p.shape;
  const int64_t n = s.window_tokens(), tokens = s.batch * s.map_tokens(), parts = s.groups * splits;
  Results<A> r;
  std::vector<A> mean(tokens), rstd(tokens), dx_normed(tokens * s.channels);
  Call call{};
  call.shape = s;
  call.storage = storage;
  call.softmax = p.softmax;
  call.activation = p.activation;
  const auto x = stored(p.x, storage), dz = stored(p.dz, storage);
  auto z = stored(std::vector<A>(tokens * s.channels), storage), dx = x;
  call.x = x.data();
  call.x_view = s.contiguous(2 * s.channels);
  call.table = p.has_table ? p.table.data() : nullptr;
  call.matrix = p.has_matrix ? p.matrix.data() : nullptr;
  call.matrix_per_group = p.matrix_per_group;
  call.bias = p.has_bias ? p.bias.data() : nullptr;
  call.splits = splits;
  call.norm_blocks = std::min<int64_t>(tokens, 3);
  if (p.has_norm) {
    call.norm_weight = p.norm_weight.data();
    call.norm_bias = p.norm_bias.data();
    call.eps = 1e-3;
    call.norm_mean = mean.data();
    call.norm_rstd = rstd.data();
    kernels.statistics(call, 0, tokens);
  }
  call.z = z.data();
  kernels.forward(call, 0, call.units());
  r.z = read_back<A>(z, storage);

  const auto make = [](bool wanted, std::vector<A>& values, int64_t count) -> void* {
    values.resize(wanted ? count : 0);
    return wanted ? values.data() : nullptr;
  };
  call.dx = dx.data();
  call.dz = dz.data();
  call.dz_view = s.contiguous(s.channels);
  call.dtable_parts = make(p.has_table, r.dtable, parts * s.table_size());
  call.dmatrix_parts = make(p.has_matrix, r.dmatrix, parts * n * n);
  call.dbias_parts = make(p.has_bias, r.dbias, parts * n);
  call.dnorm_weight_parts = make(p.has_norm, r.dnorm_weight, call.norm_blocks * s.channels);
  call.dnorm_bias_parts = make(p.has_norm, r.dnorm_bias, call.norm_blocks * s.channels);
  call.dx_normed = dx_normed.data();
  kernels.backward(call, 0, call.units());
  if (p.has_norm) kernels.norm_backward(call, 0, call.norm_blocks);
  r.dx = read_back<A>(dx, storage);
  return r;
}

// The gradients are tested by their meaning, all at once: <dz, z(p + h v) - z(p - h v)> / 2h = <gradients, v>, in double.
bool gradients_hold(const Problem<double>& p, const Results<double>& r, int64_t splits) {
  const double h = 1e-6;
  auto above = p, below = p;
  double predicted = 0, scale = 1;
  // `parts` partial gradients of each of the parameter's `pieces`, which are side by side
  const auto move = [&](std::vector<double> Problem<double>::*member, const std::vector<double>& gradient, int64_t parts,
                        int64_t pieces) {
    if (gradient.empty()) return;
    const auto v = random_values<double>((p.*member).size());
    const int64_t size = int64_t(v.size()) / pieces;
    for (size_t i = 0; i < v.size(); ++i) (above.*member)[i] += h * v[i], (below.*member)[i] -= h * v[i];
    for (int64_t piece = 0; piece < pieces; ++piece)
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = 0; i < size; ++i) {
          const double term = gradient[(part * pieces + piece) * size + i] * v[piece * size + i];
          predicted += term, scale += std::fabs(term);
        }
  };
  const int64_t groups = p.shape.groups, norm_blocks = std::min<int64_t>(p.shape.batch * p.shape.map_tokens(), 3);
  move(&Problem<double>::x, r.dx, 1, 1);
  move(&Problem<double>::table, r.dtable, splits, groups);
  move(&Problem<double>::matrix, r.dmatrix, p.matrix_per_group ? splits : groups * splits, p.matrix_per_group ? groups : 1);
  move(&Problem<double>::bias, r.dbias, groups * splits, 1);
  move(&Problem<double>::norm_weight, r.dnorm_weight, norm_blocks, 1);
  move(&Problem<double>::norm_bias, r.dnorm_bias, norm_blocks, 1);
  const auto z_above = definition(above), z_below = definition(below);
  double change = 0;
  for (size_t i = 0; i < p.dz.size(); ++i) change += p.dz[i] * (z_above[i] - z_below[i]) / (2 * h);
  return std::fabs(change - predicted) <= 1e-6 * scale;
}

// With x and dz that are bfloat16 already, storing in bfloat16 must change nothing but by rounding.
bool bfloat16_holds(Problem<float> p, const Kernels& kernels, int64_t splits) {
  for (auto* values : {&p.x, &p.dz}) *values = read_back<float>(stored(*values, Storage::bfloat16), Storage::bfloat16);
  const auto exact = run(p, Storage::float32, kernels, splits), rounded = run(p, Storage::bfloat16, kernels, splits);
  for (auto member : {&Results<float>::z, &Results<float>::dx, &Results<float>::dtable, &Results<float>::dmatrix,
                      &Results<float>::dbias, &Results<float>::dnorm_weight, &Results<float>::dnorm_bias}) {
    float scale = 5;  // sums may cancel to less
    for (float value : exact.*member) scale = std::max(scale, std::fabs(value));
    for (size_t i = 0; i < (exact.*member).size(); ++i)
      if (!(std::fabs((exact.*member)[i] - (rounded.*member)[i]) <= 0.05f * scale)) return false;
  }
  return true;
}

template <class A>
bool check(const Problem<A>& p, const Kernels& kernels, uint64_t seed) {
  const int64_t splits = pick(1, 3);
  const auto expected = definition(p);
  const auto results = run(p, sizeof(A) == 8 ? Storage::float64 : Storage::float32, kernels, splits);
  double error = 0, scale = 1e-3;
  for (size_t i = 0; i < expected.size(); ++i) {
    error = std::max(error, std::fabs(expected[i] - double(results.z[i])));
    scale = std::max(scale, std::fabs(expected[i]));
  }
  bool right = error <= scale * (sizeof(A) == 8 ? 1e-12 : 2e-5);
  if constexpr (sizeof(A) == 8)
    right = right && gradients_hold(p, results, splits);
  else
    right = right && bfloat16_holds(p, kernels, splits);
  for (double gradient : results.dx) right = right && std::isfinite(gradient);
  if (!right) {
    const Shape& s = p.shape;
    std::printf("FAILED %s float%d seed %llu: map %d %d %d window %d %d %d shift %d %d %d C %d S %d error %g of %g\n",
                kernels.name, int(8 * sizeof(A)), (unsigned long long)seed, int(s.map[0]), int(s.map[1]), int(s.map[2]), int(s.window[0]),
                int(s.window[1]), int(s.window[2]), int(s.shift[0]), int(s.shift[1]), int(s.shift[2]), int(s.channels),
                int(s.groups), error, scale);
  }
  return right;
}

}  // namespace

// test_kernels [first seed] [seconds]: 60 random problems, or as many as there is time for.
int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0;
  const std::time_t start = std::time(nullptr);
  int passed = 0, failed = 0;
  for (uint64_t seed = first; seconds > 0 ? std::difftime(std::time(nullptr), start) < seconds : seed < first + 60; ++seed)
    for (const Kernels* kernels : kernels_of_this_processor()) {
      generator.seed(seed);
      ++(check(random_problem<double>(), *kernels, seed) ? passed : failed);
      ++(check(random_problem<float>(), *kernels, seed) ? passed : failed);
    }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
