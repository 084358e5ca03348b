// The CUDA back end's kernels and host logic against the definition of the gate, on the emulator of cuda_emulator.h,
// without CUDA and without torch. Buffers are exact and begin as NaNs, so that a stray access or one left out shows.
#include <cstring>
#include <ctime>

#include "cuda_gate.h"
#include "problems.h"

using namespace posmlp;
using namespace posmlp::cuda;

namespace {

bool same(const Walk<kRank>& walk, const int64_t* place) {
  return std::equal(place, place + kRank, walk.at, [](int64_t a, int b) { return a == b; });
}

// Every token of every map belongs to one window of one class, which finds it there.
bool shape_holds(const Shape& s) {
  std::vector<int> seen(s.batch * s.map_tokens(), 0);
  const View tokens = s.contiguous(1), window{0, {s.window[1] * s.window[2], s.window[2], 1}};
  bool right = true;
  for (const WindowClass& cls : window_classes(s)) {
    const auto offsets = cls.token_offsets(tokens), indices = cls.token_indices(s);
    for (int64_t w = 0; w < cls.windows(s.batch); ++w) {
      int64_t first[kRank];
      const int64_t b = cls.locate(s, w, first);
      for (int64_t offset : offsets) ++seen[tokens.offset(b, first) + offset];
    }
    const int stride = int(pick(1, 40));
    auto walk = token_walk(cls, 0, 1), long_walk = token_walk(cls, 0, stride);
    int64_t place[kRank];
    for (int64_t i = 0; i < cls.tokens(); ++i, walk.next()) {
      cls.place(i, place);
      right = right && same(walk, place) && cls.index_of(place) == i && window.offset(0, place) == indices[i];
      if (i % stride) continue;
      right = right && same(long_walk, place);
      long_walk.next();
    }
    for (int d = 0; d < kRank; ++d) {
      cls.place(0, place);
      place[d] = cls.begin[d] + cls.box[d];
      right = right && cls.index_of(place) == -1;
      place[d] = cls.begin[d] - 1;
      right = right && cls.index_of(place) == -1;
    }
  }
  for (int count : seen) right = right && count == 1;
  return right;
}

// A layout with gaps, in which the dimensions of the map may come in any order.
View random_view(const Shape& s, int64_t width) {
  View view;
  int order[kRank] = {0, 1, 2};
  if (pick(0, 1)) std::shuffle(order, order + kRank, generator);
  int64_t stride = width + pick(0, 3);
  for (int d = kRank - 1; d >= 0; --d) {
    view.map[order[d]] = stride;
    stride *= s.map[order[d]] + pick(0, 1);
  }
  view.batch = stride;
  return view;
}

// A tensor [B, *map, width] in just the memory that its view needs; `values` are in the order of a contiguous one.
template <class T>
class Tensor {
 public:
  Tensor(const Shape& s, int64_t width, const View& view) : shape_(s), width_(width), view_(view) {
    const int64_t last[kRank] = {s.map[0] - 1, s.map[1] - 1, s.map[2] - 1};
    if (s.batch == 0) return;
    memory_.resize(view.offset(s.batch - 1, last) + width);
    std::memset(memory_.data(), 0xff, memory_.size() * sizeof(T));
  }
  void write(const std::vector<double>& values) {
    for_each([&](T& element, int64_t i) { element = round_to<T>(Accumulation<T>(values[i])); });
  }
  std::vector<double> read() {
    std::vector<double> values(shape_.batch * shape_.map_tokens() * width_);
    for_each([&](T& element, int64_t i) { values[i] = double(to_accumulation(element)); });
    return values;
  }
  T* data() { return memory_.data(); }
  const View& view() const { return view_; }

 private:
  template <class Work>
  void for_each(Work&& work) {
    for (int64_t t = 0; t < shape_.batch * shape_.map_tokens(); ++t) {
      const auto at = map_walk(shape_, t, 1);
      for (int64_t c = 0; c < width_; ++c) work(memory_[offset_in(view_, at) + c], t * width_ + c);
    }
  }
  const Shape& shape_;
  const int64_t width_;
  const View view_;
  std::vector<T> memory_;
};

struct Results {
  std::vector<double> z;
  Gradients gradients;
};

// One call's parameters, outputs and workspace.
template <class T>
class Session {
 public:
  using A = Accumulation<T>;

  Session(const Problem<double>& p, const View& x, const View& z, const View& dz, const Chip& chip)
      : p_(p), chip_(chip), x_(p.shape, 2 * p.shape.channels, x), dx_(p.shape, 2 * p.shape.channels, x),
        z_(p.shape, p.shape.channels, z), dz_(p.shape, p.shape.channels, dz) {
    x_.write(p.x);
    dz_.write(p.dz);
  }

  Results run(bool mixing_grad) {
    Results r;
    Call<T> call = problem();
    run(call, false, false, [this](auto& launcher, const auto& c) { forward(launcher, c, chip_); });
    r.z = z_.read();
    call = problem();
    const auto output = [&](bool wanted, const std::vector<double>& parameter, A*& pointer) {
      outputs_.emplace_back(wanted ? parameter.size() : 0, A(NAN));
      if (wanted) pointer = outputs_.back().data();
    };
    output(p_.has_table && mixing_grad, p_.table, call.dtable);
    output(p_.has_matrix && mixing_grad, p_.matrix, call.dmatrix);
    output(p_.has_bias, p_.bias, call.dbias);
    output(p_.has_norm, p_.norm_weight, call.dnorm_weight);
    output(p_.has_norm, p_.norm_bias, call.dnorm_bias);
    run(call, true, mixing_grad, [this](auto& launcher, const auto& c) { backward(launcher, c, chip_); });
    const auto doubles = [&](int i) { return std::vector<double>(outputs_[i].begin(), outputs_[i].end()); };
    r.gradients = {dx_.read(), doubles(0), doubles(1), doubles(2), doubles(3), doubles(4)};
    return r;
  }

 private:
  Call<T> problem() {
    Call<T> call{};
    call.shape = p_.shape;
    call.softmax = p_.softmax;
    call.matrix_per_group = p_.matrix_per_group;
    call.activation = p_.activation;
    call.eps = A(1e-3);
    call.x = x_.data(), call.x_view = x_.view();
    call.z = z_.data(), call.z_view = z_.view();
    call.dz = dz_.data(), call.dz_view = dz_.view();
    call.dx = dx_.data(), call.dx_view = dx_.view();
    const auto parameter = [&](bool has, const std::vector<double>& values) -> const A* {
      if (!has) return nullptr;
      parameters_.emplace_back(values.begin(), values.end());
      return parameters_.back().data();
    };
    call.table = parameter(p_.has_table, p_.table);
    call.matrix = parameter(p_.has_matrix, p_.matrix);
    call.bias = parameter(p_.has_bias, p_.bias);
    call.norm_weight = parameter(p_.has_norm, p_.norm_weight);
    call.norm_bias = parameter(p_.has_norm, p_.norm_bias);
    plan(call, chip_);
    return call;
  }

  template <class Direction>
  void run(Call<T>& call, bool backward, bool mixing_grad, Direction&& direction) {
    const int64_t bytes = lay_out(call, chip_, backward, mixing_grad, nullptr);
    const std::unique_ptr<char, void (*)(void*)> workspace((char*)std::aligned_alloc(256, bytes), std::free);
    std::memset(workspace.get(), 0xff, bytes);
    lay_out(call, chip_, backward, mixing_grad, workspace.get());
    EmulatedLauncher launcher;
    direction(launcher, call);
  }

  const Problem<double>& p_;
  const Chip chip_;
  Tensor<T> x_, dx_, z_, dz_;
  std::deque<std::vector<A>> parameters_, outputs_;
};

template <class T>
struct Case {
  Problem<double> problem;
  View x, z, dz;
  Chip chip;
  bool mixing_grad;

  Results run() const { return Session<T>(problem, x, z, dz, chip).run(mixing_grad); }
};

bool close(const std::vector<double>& actual, const std::vector<double>& expected, double tolerance) {
  double scale = 1, error = 0;
  for (double value : expected) scale = std::max(scale, std::fabs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!std::isfinite(actual[i])) return false;
    error = std::max(error, std::fabs(actual[i] - expected[i]));
  }
  return actual.size() == expected.size() && error <= tolerance * scale;
}

bool close(const Results& actual, const Results& expected, double tolerance) {
  bool right = close(actual.z, expected.z, tolerance);
  for (auto member : {&Gradients::x, &Gradients::table, &Gradients::matrix, &Gradients::bias, &Gradients::norm_weight,
                      &Gradients::norm_bias})
    right = right && close(actual.gradients.*member, expected.gradients.*member, tolerance);
  return right;
}

template <class T>
std::vector<double> rounded(std::vector<double> values) {
  for (double& value : values) value = double(to_accumulation(round_to<T>(Accumulation<T>(value))));
  return values;
}

// In T, on numbers that are T's: what differs from the kernels in double is rounding.
template <class T>
bool type_holds(Case<double> exact, double tolerance) {
  Problem<double>& p = exact.problem;
  p.x = rounded<T>(p.x), p.dz = rounded<T>(p.dz);
  for (auto* values : {&p.table, &p.matrix, &p.bias, &p.norm_weight, &p.norm_bias}) *values = rounded<float>(*values);
  const Case<T> same{p, exact.x, exact.z, exact.dz, exact.chip, exact.mixing_grad};
  return close(same.run(), exact.run(), tolerance);
}

// The least shared memory that a chip may have for a problem: P stays there only where that takes less than all else.
int64_t least_shared_bytes(const Problem<double>& p) {
  static const float some = 0;
  Call<Bf16> call{};
  call.shape = p.shape;
  call.table = p.has_table ? &some : nullptr, call.matrix = p.has_matrix ? &some : nullptr;
  Chip chip{1, 0, 80};
  plan(call, chip);
  const auto fits = [&] {
    return plan_product<Bf16, Product::gate>(call, chip).shared_bytes > 0 &&
           plan_product<Bf16, Product::rows>(call, chip).shared_bytes > 0 &&
           plan_product<Bf16, Product::columns>(call, chip).shared_bytes > 0;
  };
  while (!fits()) chip.shared_bytes += 1 << 10;
  return chip.shared_bytes;
}

Case<double> random_case() {
  Case<double> c;
  Problem<double>& p = c.problem;
  const bool rebuilds = pick(0, 2) == 0;  // on a chip so small that P of so many tokens has no room
  do p = random_problem<double>();
  while (rebuilds && (p.has_matrix || p.shape.window_tokens() <= 64));
  Shape& s = p.shape;
  c.x = random_view(s, 2 * s.channels), c.z = random_view(s, s.channels), c.dz = random_view(s, s.channels);
  if (pick(0, 15) == 0) {  // an empty batch, whose parameters have gradients of zero
    s.batch = 0;
    p.x.clear(), p.dz.clear();
  } else if (pick(0, 3) == 0) {  // an expanded gradient
    c.dz.batch = 0;
    const size_t map = p.dz.size() / size_t(s.batch);
    for (size_t i = map; i < p.dz.size(); ++i) p.dz[i] = p.dz[i % map];
  }
  if (p.softmax && pick(0, 3) == 0) {  // rows that are far below the table's maximum, and keys that are left out
    for (double& value : p.table) value = pick(0, 3) ? 100 * value : -INFINITY;
    for (int64_t g = 0; g < s.groups; ++g) p.table[g * s.table_size() + s.table_size() / 2] = -300;
  } else if (p.softmax && pick(0, 3) == 0) {
    p.table = falling_table<double>(s, true);
  }
  c.chip = {int(pick(1, 12)), 99 << 10, 80};
  if (rebuilds || pick(0, 1)) c.chip.shared_bytes = least_shared_bytes(p) + (pick(0, 1) ? 0 : pick(1, 40) << 10);
  c.mixing_grad = pick(0, 3) > 0;
  return c;
}

const char* wrong(const Case<double>& c) {
  if (!shape_holds(c.problem.shape)) return "the shape";
  const Results r = c.run();
  if (!close(r.z, definition(c.problem), 1e-12)) return "double, forward";
  if (!gradients_hold(c.problem, r.gradients)) return "double, backward";
  if (!close(c.run(), r, 0)) return "the same bits";
  switch (pick(0, 2)) {
    case 0: return type_holds<float>(c, 2e-5) ? nullptr : "float";
    case 1: return type_holds<Bf16>(c, 0.05) ? nullptr : "bfloat16";
    default: return type_holds<Half>(c, 0.01) ? nullptr : "float16";
  }
}

}  // namespace

// test_cuda [first seed] [seconds]: 40 random problems, or as many as there is time for.
int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0;
  const std::time_t start = std::time(nullptr);
  int passed = 0, failed = 0;
  const auto goes_on = [&](uint64_t seed) {
    return seconds > 0 ? std::difftime(std::time(nullptr), start) < seconds : seed < first + 40;
  };
  for (uint64_t seed = first; goes_on(seed); ++seed) {
    generator.seed(seed);
    const Case<double> c = random_case();
    const char* what = wrong(c);
    if (what)
      std::printf("FAILED seed %llu: %s; %s\n", (unsigned long long)seed, what, description(c.problem.shape).c_str());
    ++(what ? failed : passed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
