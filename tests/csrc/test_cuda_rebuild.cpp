// P as the products on tensor cores make it from the table, emulated, against P as MixingKernel stores it. Tokens that
// are unit vectors show it number by number: gate and rows give P, columns gives its transpose.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda_gate.h"
#include "problems.h"

using namespace posmlp;
using namespace posmlp::cuda;

namespace {

// What the softmax's rows are like: none; within reach of their largest maximum; some far below it.
enum class Rows { plain, near, far };

// One window of each kind with as many channels a group as tokens; x2 and dz are one wherever they are no unit vectors.
template <class T>
struct Probe {
  Call<T> call{};
  std::vector<T> x, dz, z, dx, mixing;
  std::vector<float> table, row_max, row_rinv, dbias_parts;

  explicit Probe(Rows rows) {
    Shape& s = call.shape;
    do
      for (int d = int(pick(0, 2)); d < kRank; ++d) {
        s.window[d] = pick(1, d == 0 ? 4 : d == 2 ? 40 : 9);
        s.shift[d] = pick(0, s.window[d] - 1);
        s.map[d] = pick(1, 2 * s.window[d]);
      }
    while (s.window_tokens() > 150 || s.map_tokens() > 400);
    s.batch = 1, s.groups = pick(1, 2);
    s.channels = s.groups * s.window_tokens();
    call.softmax = rows != Rows::plain;
    table = rows == Rows::far ? falling_table<float>(s, true) : random_values<float>(s.groups * s.table_size());
    call.table = table.data();
    x.resize(s.map_tokens() * 2 * s.channels), dz.resize(s.map_tokens() * s.channels);
    z.assign(dz.size(), T{0xffff}), dx.assign(x.size(), T{0xffff});
    call.x = x.data(), call.dz = dz.data(), call.z = z.data(), call.dx = dx.data();
    call.x_view = call.dx_view = s.contiguous(2 * s.channels);
    call.z_view = call.dz_view = s.contiguous(s.channels);
    const Chip chip{4, 227 << 10, 90};
    plan(call, chip);
    const int64_t n = s.window_tokens(), kinds = call.class_count * s.groups;
    mixing.assign(kinds * call.side * call.side, T{0xffff});
    row_max.assign(kinds * n, NAN), row_rinv.assign(kinds * n, NAN);
    call.mixing = mixing.data(), call.row_max = row_max.data(), call.row_rinv = row_rinv.data();
    EmulatedLauncher launcher;
    prepare(launcher, call);
    call.mixing = nullptr;
    if (!call.softmax) call.row_max = call.row_rinv = nullptr;
  }

  // Calls `visit(class, group, i, j, token, channel)`, where tokens of the map show the P of a class's first window.
  template <class Visit>
  void for_each_pair(Visit visit) const {
    const Shape& s = call.shape;
    const View dense = s.contiguous(1);
    for (int k = 0; k < call.class_count; ++k) {
      const WindowClass& windows = call.classes[k];
      const auto at = windows.token_offsets(dense);
      int64_t position[kRank];
      windows.locate(s, 0, position);
      for (int64_t g = 0; g < s.groups; ++g)
        for (int64_t i = 0; i < windows.tokens(); ++i)
          for (int64_t j = 0; j < windows.tokens(); ++j)
            visit(k, g, i, j, dense.offset(0, position) + at[i], g * s.window_tokens() + j);
    }
  }

  template <Product kProduct>
  void run() {
    using Kernel = TensorProductKernel<T, kProduct>;
    const int64_t C = call.shape.channels;
    const T one = round_to<T>(1.0f), zero{0};
    constexpr bool kColumnsPart = kProduct == Product::columns;
    std::fill(x.begin(), x.end(), one), std::fill(dz.begin(), dz.end(), one);
    for_each_pair([&](int, int64_t, int64_t i, int64_t j, int64_t token, int64_t channel) {
      (kColumnsPart ? dz[token * C + channel] : x[token * 2 * C + channel]) = i == j ? one : zero;
    });
    // of windows beside a class's first, and channels beyond its tokens, nothing is asked
    const int all_warps = int(divide_up(call.shape.window_tokens(), 32));
    TensorPlan plan{};
    plan.warps = int(pick(1, all_warps)), plan.row_blocks = int(divide_up(all_warps, plan.warps));
    plan.keys = int(16 * pick(1, 4)), plan.chunks = int(divide_up(call.side, plan.keys));
    plan.stages = int(pick(2, 3)), plan.rebuild = true;
    plan.piece = widest_piece(call, kProduct != Product::gate), plan.pairs = plan.piece > 1;
    plan.shared_bytes = Kernel::shared_bytes(call.shape, plan);
    const int64_t parts = call.class_count * call.splits * call.shape.groups * call.shape.window_tokens();
    dbias_parts.assign(parts, NAN), call.dbias_parts = dbias_parts.data();
    EmulatedLauncher().launch<Kernel>({call, plan}, Kernel::grid(call, plan), plan.shared_bytes, plan.warps * kWarp);
  }

  // To one unit in the last place: what is rounded is a product here, and there an exponential with a factor.
  template <class Shown>
  bool equals(const char* name, bool transposed, Shown shown) const {
    constexpr bool kHalf = std::is_same_v<T, Half>;
    constexpr double kUnit = kHalf ? 0x1p-10 : 0x1p-7, kSmallest = kHalf ? 0x1p-24 : 1e-10;
    bool right = true;
    for_each_pair([&](int k, int64_t g, int64_t i, int64_t j, int64_t token, int64_t channel) {
      const T* stored = mixing.data() + (k * call.shape.groups + g) * call.side * call.side;
      const double expected = to_accumulation(stored[transposed ? j * call.side + i : i * call.side + j]);
      const double error = std::fabs(to_accumulation(shown(token, channel)) - expected);
      right = right && error <= kUnit * std::fabs(expected) + kSmallest;
    });
    if (!right) std::printf("%s is not P: %s\n", name, description(call.shape).c_str());
    return right;
  }
};

template <class T>
bool check(Rows rows) {
  Probe<T> p(rows);
  const int64_t C = p.call.shape.channels;
  p.template run<Product::gate>();
  bool right = p.equals("gate", false, [&](int64_t token, int64_t c) { return p.z[token * C + c]; });
  p.template run<Product::rows>();
  right &= p.equals("rows", false, [&](int64_t token, int64_t c) { return p.dx[token * 2 * C + C + c]; });
  p.template run<Product::columns>();
  right &= p.equals("columns", true, [&](int64_t token, int64_t c) { return p.dx[token * 2 * C + c]; });
  return right;
}

}  // namespace

int main() {
  int failed = 0;
  for (int i = 0; i < 30; ++i) {
    generator.seed(i);
    const Rows rows = Rows(i % 3);
    failed += !(i % 2 ? check<Bf16>(rows) : check<Half>(rows));
  }
  std::printf("30 problems, %d failed\n", failed);
  return failed > 0;
}
