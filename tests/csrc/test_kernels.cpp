// The CPU kernels against the definition of the gate, on every instruction set of this processor and with AVX-512's tiles
// on all, without torch: small enough to run under the sanitizers. Buffers are allocated one by one and exactly, so that a
// stray access is caught. With POSMLP_AMX_EMULATED the kernels for tile registers run on registers in software.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <thread>
#include <vector>

#include "cpu.h"
#include "problems.h"
#include "wide_kernels.h"

using namespace posmlp;
using namespace posmlp::cpu;

namespace {

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

// All units of a call, dealt to three threads, of which the last takes two and then all that the others have.
void in_turn(Call& call, size_t times, void (*kernel)(const Call&, int64_t thread)) {
  constexpr int64_t kThreads = 3;
  std::vector<Deal> deals;
  for (size_t i = 0; i < times; ++i) deals.emplace_back(call.units(), kThreads);
  call.deals = deals.data();
  for (int64_t thread = kThreads - 1; thread >= 0; --thread) kernel(call, thread);
}

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
  call.streams = splits > 1;
  call.blocks = splits == 2 ? s.groups : 1;
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
  in_turn(call, window_classes(s).size(), kernels.forward);
  r.z = read_back<A>(z, storage);

  const auto make = [](bool wanted, std::vector<A>& values, int64_t count) -> void* {
    values.resize(wanted ? count : 0);
    return wanted ? values.data() : nullptr;
  };
  call.blocks = 1;
  call.dx = dx.data();
  call.dz = dz.data();
  call.dz_view = s.contiguous(s.channels);
  call.dtable_parts = make(p.has_table, r.dtable, parts * s.table_size());
  call.dmatrix_parts = make(p.has_matrix, r.dmatrix, parts * n * n);
  call.dbias_parts = make(p.has_bias, r.dbias, parts * n);
  call.dnorm_weight_parts = make(p.has_norm, r.dnorm_weight, call.norm_blocks * s.channels);
  call.dnorm_bias_parts = make(p.has_norm, r.dnorm_bias, call.norm_blocks * s.channels);
  call.dx_normed = dx_normed.data();
  in_turn(call, 1, kernels.backward);
  if (p.has_norm) kernels.norm_backward(call, 0, call.norm_blocks);
  r.dx = read_back<A>(dx, storage);
  return r;
}

// The sum of `parts` partial gradients.
template <class A>
std::vector<A> added(const std::vector<A>& values, int64_t parts) {
  const int64_t size = int64_t(values.size()) / parts;
  std::vector<A> sums(size);
  for (size_t i = 0; i < values.size(); ++i) sums[i % size] += values[i];
  return sums;
}

bool gradients_hold(const Problem<double>& p, const Results<double>& r, int64_t splits) {
  const int64_t groups = p.shape.groups, norm_blocks = std::min<int64_t>(p.shape.batch * p.shape.map_tokens(), 3);
  return posmlp::gradients_hold(
      p, {r.dx, added(r.dtable, splits), added(r.dmatrix, p.matrix_per_group ? splits : groups * splits),
          added(r.dbias, groups * splits), added(r.dnorm_weight, norm_blocks), added(r.dnorm_bias, norm_blocks)});
}

// Whether all numbers differ by at most `tolerance` of the largest, or of `least`: sums may cancel to less.
bool close(const Results<float>& expected, const Results<float>& results, float tolerance, float least) {
  for (auto member : {&Results<float>::z, &Results<float>::dx, &Results<float>::dtable, &Results<float>::dmatrix,
                      &Results<float>::dbias, &Results<float>::dnorm_weight, &Results<float>::dnorm_bias}) {
    float scale = least;
    for (float value : expected.*member) scale = std::max(scale, std::fabs(value));
    for (size_t i = 0; i < (expected.*member).size(); ++i)
      if (!(std::fabs((expected.*member)[i] - (results.*member)[i]) <= tolerance * scale)) return false;
  }
  return true;
}

#ifdef POSMLP_X86_BF16_KERNELS
// Tile registers take the same rounded numbers as pairs do, though an output may fall on the other side of a tie: also
// where a table leaves out blocks, or rows cannot share it.
bool tiles_hold(Problem<float> p, int64_t splits) {
  for (const auto& table : {p.table, falling_table<float>(p.shape, false), falling_table<float>(p.shape, true)}) {
    p.table = table;
    const auto expected = run(p, Storage::bfloat16, kAvx512Bf16, splits);
    if (!close(expected, run(p, Storage::bfloat16, kAvx512Amx, splits), 0.005f, 1)) return false;
  }
  return true;
}
#endif

// With x and dz that are bfloat16 already, storing in bfloat16 must change nothing but by rounding.
bool bfloat16_holds(Problem<float> p, const Kernels& kernels, int64_t splits) {
  for (auto* values : {&p.x, &p.dz}) *values = read_back<float>(stored(*values, Storage::bfloat16), Storage::bfloat16);
  const auto exact = run(p, Storage::float32, kernels, splits), rounded = run(p, Storage::bfloat16, kernels, splits);
  if (!close(exact, rounded, 0.05f, 5)) return false;
#ifdef POSMLP_X86_BF16_KERNELS
  if (&kernels == &kAvx512Amx && !tiles_hold(p, splits)) return false;
#endif
  // The first image's NaN stay there, whatever the others' products take beyond their windows' last tokens.
  const int64_t image = p.shape.map_tokens() * p.shape.channels;
  std::fill_n(p.x.begin(), 2 * image, NAN);
  const auto others = run(p, Storage::bfloat16, kernels, splits);
  return std::equal(rounded.z.begin() + image, rounded.z.end(), others.z.begin() + image) &&
         std::equal(rounded.dx.begin() + 2 * image, rounded.dx.end(), others.dx.begin() + 2 * image);
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
    std::printf("FAILED %s float%d seed %llu: %s, error %g of %g\n", kernels.name, int(8 * sizeof(A)),
                (unsigned long long)seed, description(p.shape).c_str(), error, scale);
  }
  return right;
}

// Whether four threads, of which one keeps stopping, are dealt each unit once.
bool deal_holds() {
  constexpr int64_t kUnits = 10007, kThreads = 4;
  Deal deal(kUnits, kThreads);
  std::vector<std::vector<int64_t>> dealt(kThreads);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] {
      for (int64_t unit; (unit = deal.take(i)) >= 0;) {
        dealt[i].push_back(unit);
        if (i == 1) std::this_thread::yield();
      }
    });
  for (std::thread& thread : threads) thread.join();
  std::vector<int> times(kUnits, 0);
  for (const auto& units : dealt)
    for (int64_t unit : units) ++times[unit];
  return std::count(times.begin(), times.end(), 1) == kUnits && deal.take(0) < 0;
}

}  // namespace

// test_kernels [first seed] [seconds]: 60 random problems, or as many as there is time for.
int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0;
  const std::time_t start = std::time(nullptr);
  auto all = kernels_of_this_processor();
  all.push_back(&kWide);
  int passed = 0, failed = 0;
  ++(deal_holds() ? passed : failed);
  for (uint64_t seed = first; seconds > 0 ? std::difftime(std::time(nullptr), start) < seconds : seed < first + 60; ++seed)
    for (const Kernels* kernels : all) {
      generator.seed(seed);
      const bool long_line = seed % 16 == 15, many_rows = seed % 16 == 7;
      ++(check(random_problem<double>(long_line, many_rows), *kernels, seed) ? passed : failed);
      ++(check(random_problem<float>(long_line, many_rows), *kernels, seed) ? passed : failed);
    }
  for (const Kernels* kernels : all) std::printf("%s ", kernels->name);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
