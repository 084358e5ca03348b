// The products on tensor cores, emulated, against sums in double over what they are given: P, x and dz in 16 bits.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda_tensor_plan.h"

using namespace posmlp;
using namespace posmlp::cuda;

namespace {

std::mt19937_64 generator(1);
int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

template <class T>
std::vector<T> random_values(int64_t count, double scale = 1) {
  std::normal_distribution<double> normal;
  std::vector<T> values(count);
  for (T& value : values) value = round_to<T>(Accumulation<T>(scale * normal(generator)));
  return values;
}

// Everything that a call points to.
template <class T>
struct Problem {
  Call<T> call{};
  std::vector<T> x, dz, z, dx, mixing;
  std::vector<float> bias, norm_weight, norm_bias, mean, rstd, dx_normed, dbias_parts, dmixing;

  explicit Problem(int64_t most_tokens) {
    Shape& s = call.shape;
    s.batch = pick(1, 3);
    s.groups = pick(1, 3);
    const int64_t widths[] = {1, 3, 4, 6, 8, 12, 24, 40};
    s.channels = s.groups * widths[pick(0, 7)];
    do
      for (int d = pick(0, 2); d < kRank; ++d) {
        s.window[d] = pick(1, d == 0 ? 4 : 24);
        s.map[d] = pick(1, 2 * s.window[d]);
        s.shift[d] = pick(0, s.window[d] - 1);
      }
    while (s.window_tokens() > most_tokens || s.batch * s.map_tokens() > 3000);
    const auto classes = window_classes(s);
    call.class_count = int(classes.size());
    std::copy(classes.begin(), classes.end(), call.classes);
    call.activation = Activation(pick(0, 2));
    call.side = round_up(s.window_tokens(), 16);
    call.splits = pick(1, 3);

    // x and dz may be pieces of wider tensors, at any address
    const int64_t tokens = s.batch * s.map_tokens(), n = s.window_tokens();
    const int64_t pad = pick(0, 2) * pick(1, 8), x_width = 2 * s.channels + pad, dz_width = s.channels + pad,
                  skip = pick(0, 1) * pick(1, 8);
    x = random_values<T>(skip + tokens * x_width);
    dz = random_values<T>(skip + tokens * dz_width);
    call.x = x.data() + skip, call.dz = dz.data() + skip;
    call.x_view = s.contiguous(x_width), call.dz_view = s.contiguous(dz_width);
    z.assign(tokens * s.channels, T{0xffff}), dx.assign(2 * tokens * s.channels, T{0xffff});
    call.z = z.data(), call.dx = dx.data();
    call.z_view = s.contiguous(s.channels), call.dx_view = s.contiguous(2 * s.channels);
    if (pick(0, 1)) bias = random_values<float>(n), call.bias = bias.data();
    if (pick(0, 1)) {
      norm_weight = random_values<float>(s.channels), norm_bias = random_values<float>(s.channels);
      mean = random_values<float>(tokens), rstd = random_values<float>(tokens),
      dx_normed.assign(tokens * s.channels, NAN);
      call.norm_weight = norm_weight.data(), call.norm_bias = norm_bias.data(), call.mean = mean.data(),
      call.rstd = rstd.data();
      call.dx_normed = dx_normed.data();
    }
    mixing.assign(call.class_count * s.groups * call.side * call.side, T{0});
    call.mixing = mixing.data();
    for (int c = 0; c < call.class_count; ++c)
      for (int64_t g = 0; g < s.groups; ++g) {
        T* p = mixing.data() + (c * s.groups + g) * call.side * call.side;
        const int64_t present = classes[c].tokens();
        for (int64_t i = 0; i < present; ++i)
          for (int64_t j = 0; j < present; ++j) p[i * call.side + j] = random_values<T>(1, 0.2)[0];
      }
    const int64_t parts = call.class_count * call.splits * s.groups;
    dbias_parts.assign(parts * n, NAN), dmixing.assign(parts * n * n, 0);
    call.dbias_parts = dbias_parts.data(), call.dmixing = dmixing.data();
  }
};

template <class T>
struct Expected {
  std::vector<double> z, dx, dx_normed, dbias, dmixing;  // the last two summed over splits

  explicit Expected(const Call<T>& call) {
    const Shape& s = call.shape;
    const int64_t tokens = s.batch * s.map_tokens(), C = s.channels, D = s.group_channels(), n = s.window_tokens();
    z.resize(tokens * C), dx.resize(2 * tokens * C), dx_normed.resize(tokens * C);
    dbias.resize(call.class_count * s.groups * n), dmixing.resize(call.class_count * s.groups * n * n);
    const View dense = s.contiguous(1);
    for (int c = 0; c < call.class_count; ++c) {
      const WindowClass& windows = call.classes[c];
      const int64_t present = windows.tokens();
      const auto x_at = windows.token_offsets(call.x_view), dz_at = windows.token_offsets(call.dz_view),
                 at = windows.token_offsets(dense), place = windows.token_indices(s);
      for (int64_t w = 0; w < windows.windows(s.batch); ++w) {
        int64_t position[kRank];
        const int64_t b = windows.locate(s, w, position);
        const T *x = call.x + call.x_view.offset(b, position), *dz = call.dz + call.dz_view.offset(b, position);
        const int64_t first = dense.offset(b, position);
        for (int64_t g = 0; g < s.groups; ++g)
          for (int64_t ch = g * D; ch < (g + 1) * D; ++ch) {
            std::vector<double> tokens1(present), gradient(present), mixed(present);
            for (int64_t j = 0; j < present; ++j) {
              double value = activate(call.activation, double(to_accumulation(x[x_at[j] + ch])));
              if (call.norm_weight) {
                const int64_t t = first + at[j];
                value = (value - call.mean[t]) * call.rstd[t] * call.norm_weight[ch] + call.norm_bias[ch];
              }
              tokens1[j] = to_accumulation(round_to<T>(float(value)));
              gradient[j] = double(to_accumulation(dz[dz_at[j] + ch])) *
                            activate(call.activation, double(to_accumulation(x[x_at[j] + C + ch])));
            }
            const T* p = call.mixing_of(c, g);
            for (int64_t i = 0; i < present; ++i) {
              for (int64_t j = 0; j < present; ++j) {
                mixed[i] += double(to_accumulation(p[i * call.side + j])) * tokens1[j];
                dmixing[((c * s.groups + g) * n + i) * n + j] += gradient[i] * tokens1[j];
              }
              const double x2 = to_accumulation(x[x_at[i] + C + ch]),
                           y = mixed[i] + (call.bias ? call.bias[place[i]] : 0);
              const int64_t t = first + at[i];
              z[t * C + ch] = y * activate(call.activation, x2);
              dx[t * 2 * C + C + ch] =
                  double(to_accumulation(dz[dz_at[i] + ch])) * y * activation_slope(call.activation, x2);
              dbias[(c * s.groups + g) * n + i] += gradient[i];
            }
            for (int64_t j = 0; j < present; ++j) {
              double sum = 0;
              for (int64_t i = 0; i < present; ++i) sum += double(to_accumulation(p[i * call.side + j])) * gradient[i];
              const int64_t t = first + at[j];
              dx_normed[t * C + ch] = sum;
              dx[t * 2 * C + ch] = sum * activation_slope(call.activation, double(to_accumulation(x[x_at[j] + ch])));
            }
          }
      }
    }
  }
};

// Within a few units of the type's rounding, beside the largest value.
bool close(const char* name, const std::vector<double>& expected, const std::vector<double>& actual, double epsilon) {
  double scale = 1, error = 0;
  for (double value : expected) scale = std::max(scale, std::fabs(value));
  for (size_t i = 0; i < expected.size(); ++i)
    error = std::max(error, std::isnan(actual[i]) ? INFINITY : std::fabs(actual[i] - expected[i]));
  if (error <= 6 * epsilon * scale) return true;
  std::printf("%s is off by %g where it reaches %g\n", name, error, scale);
  return false;
}

template <class V>
std::vector<double> in_double(const std::vector<V>& values) {
  std::vector<double> out;
  for (const V& value : values) out.push_back(to_accumulation(value));
  return out;
}

// [classes, splits, the rest] -> [classes, the rest]
std::vector<double> over_splits(const std::vector<float>& parts, int64_t classes, int64_t splits) {
  const int64_t rest = int64_t(parts.size()) / classes / splits;
  std::vector<double> sums(classes * rest);
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t k = 0; k < splits; ++k)
      for (int64_t i = 0; i < rest; ++i) sums[c * rest + i] += parts[(c * splits + k) * rest + i];
  return sums;
}

template <class T, Product kProduct>
bool run_product(const Problem<T>& p, const Chip& chip) {
  using Kernel = TensorProductKernel<T, kProduct>;
  const TensorPlan plan = plan_product<T, kProduct>(p.call, chip);
  if (plan.shared_bytes < 0) return false;
  EmulatedLauncher().launch<Kernel>({p.call, plan}, Kernel::grid(p.call, plan), plan.shared_bytes, plan.warps * kWarp);
  return true;
}

template <class T, int kKeyTiles>
void run_outer(const Problem<T>& p, const Chip& chip) {
  using Kernel = TensorOuterKernel<T, kKeyTiles>;
  const OuterPlan plan = plan_outer<T, kKeyTiles>(p.call, chip);
  EmulatedLauncher().launch<Kernel>({p.call, plan}, Kernel::grid(p.call, plan), plan.shared_bytes, plan.warps * kWarp);
}

template <class T>
bool check(double epsilon) {
  const Chip chip{4, int64_t(pick(0, 1) ? 227 : pick(40, 99)) << 10, 90};
  Problem<T> p(pick(0, 3) ? 60 : 500);
  const Call<T>& call = p.call;
  const bool at_once = pick(0, 1) && run_product<T, Product::both>(p, chip);
  if (!run_product<T, Product::gate>(p, chip) ||
      !(at_once || (run_product<T, Product::rows>(p, chip) && run_product<T, Product::columns>(p, chip))))
    return std::printf("no cut of %lld tokens for %lld bytes\n", (long long)call.shape.window_tokens(),
                       (long long)chip.shared_bytes),
           false;
  pick(0, 1) ? run_outer<T, 26>(p, chip) : run_outer<T, 8>(p, chip);
  const Expected<T> e(call);
  bool good = close("z", e.z, in_double(p.z), epsilon);
  auto dx = in_double(p.dx), expected_dx = e.dx;
  if (call.norm_weight) {
    good &= close("dx_normed", e.dx_normed, in_double(p.dx_normed), epsilon);
    for (size_t i = 0; i < dx.size(); ++i)
      if (int64_t(i) / call.shape.channels % 2 == 0) dx[i] = expected_dx[i] = 0;  // the norm's kernel writes them
  }
  good &= close("dx", expected_dx, dx, epsilon);
  good &= close("dbias", e.dbias, over_splits(p.dbias_parts, call.class_count, call.splits), epsilon);
  good &= close("dmixing", e.dmixing, over_splits(p.dmixing, call.class_count, call.splits), epsilon);
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 60;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  for (int i = 0; i < count; ++i) {
    generator.seed(seed + i);
    if (!(i % 2 ? check<Bf16>(0x1p-8) : check<Half>(0x1p-11)))
      return std::printf("problem %llu failed\n", (unsigned long long)(seed + i)), 1;
  }
  std::printf("%d problems, 0 failed\n", count);
}
