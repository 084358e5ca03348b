// The quadratic table and its gradients by the CUDA kernels, emulated, against the CPU's of table.h.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda_table.cuh"

using namespace posmlp;
using namespace posmlp::cuda;

namespace {

std::mt19937_64 generator(1);
int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

template <class A>
std::vector<A> random_values(int64_t count, double scale) {
  std::normal_distribution<double> normal;
  std::vector<A> values(count);
  for (A& value : values) value = A(scale * normal(generator));
  return values;
}

template <class A>
bool close(const std::vector<A>& actual, const std::vector<double>& expected) {
  double scale = 1;
  for (double value : expected) scale = std::max(scale, std::fabs(value));
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(std::fabs(double(actual[i]) - expected[i]) <= (sizeof(A) == 4 ? 1e-6 : 1e-13) * scale)) return false;
  return actual.size() == expected.size();
}

template <class A>
bool check() {
  const int rank = int(pick(1, 3));
  const int64_t groups = pick(1, 3);
  TableCall<A> call{};
  call.groups = groups;
  call.window.rank = rank;
  for (int d = gqpe::kRank - rank; d < gqpe::kRank; ++d) call.window.window[d] = pick(1, rank == 3 ? 5 : 15);
  const int64_t entries = call.entries();
  const auto center = random_values<A>(groups * rank, pick(0, 1) ? 1 : 30),
             factor = random_values<A>(groups * rank * rank, 1), dtable = random_values<A>(groups * entries, 1);
  std::vector<A> table(groups * entries, A(NAN)), dcenter(center.size(), A(NAN)), dfactor(factor.size(), A(NAN));
  call.center = center.data(), call.factor = factor.data(), call.dtable = dtable.data();
  call.table = table.data(), call.dcenter = dcenter.data(), call.dfactor = dfactor.data();
  using Forward = QuadraticTableKernel<A>;
  using Backward = QuadraticTableBackwardKernel<A>;
  EmulatedLauncher().launch<Forward>(call, Forward::grid(call), Forward::kSharedBytes);
  EmulatedLauncher().launch<Backward>(call, Backward::grid(call), Backward::kSharedBytes);

  std::vector<double> expected(table.size()), expected_center, expected_factor;
  for (int64_t g = 0; g < groups; ++g) {
    const gqpe::Group group = call.group(g);
    gqpe::table(group, expected.data() + g * entries);
    double c[gqpe::kRank] = {}, m[gqpe::kRank][gqpe::kRank] = {};
    gqpe::table_backward(group, dtable.data() + g * entries, c, m);
    for (int a = gqpe::kRank - rank; a < gqpe::kRank; ++a) {
      expected_center.push_back(c[a]);
      for (int k = gqpe::kRank - rank; k < gqpe::kRank; ++k) expected_factor.push_back(m[a][k]);
    }
  }
  return close(table, expected) && close(dcenter, expected_center) && close(dfactor, expected_factor);
}

}  // namespace

int main() {
  int failed = 0;
  for (int i = 0; i < 60; ++i) failed += !(i % 2 ? check<float>() : check<double>());
  std::printf("60 problems, %d failed\n", failed);
  return failed > 0;
}
