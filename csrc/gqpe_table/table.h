// The quadratic table of one group, and its gradients. Plain C++.
//
//     R(delta) = -1/2 |M^T u|^2,   u = delta - c        for every displacement delta of the window
//     s1 = sum G u,  s2 = sum G u u^T                   over the table's entries, G = dL/dR
//     dc = M M^T s1,  dM = -s2 M
//
// A table is a few KB made from a few numbers: neither bytes nor flops matter, calls do, one for each direction. So it
// can afford to compute in double and round once, and sums in double need no care about centres far outside the window,
// which make u large and the sums cancel. The squares stay squares: multiplied out they would cancel where M is nearly
// singular. Both directions go row by row, along which only the last coordinate of u changes.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define POSMLP_BOTH __host__ __device__
#else
#define POSMLP_BOTH
#endif

namespace posmlp::gqpe {

constexpr int kRank = 3;  // maps of one and two dimensions have leading windows of 1, and zeros in c and M

struct Group {
  int rank = kRank;
  double center[kRank] = {}, factor[kRank][kRank] = {};
  int64_t window[kRank] = {1, 1, 1};

  POSMLP_BOTH int64_t extent(int d) const { return 2 * window[d] - 1; }
  POSMLP_BOTH double offset(int d, int64_t index) const { return double(index + 1 - window[d]) - center[d]; }

  // Calls visit(u, row) for every row, u at its first entry.
  template <typename Visit>
  void for_each_row(Visit visit) const {
    for (int64_t row = 0; row < extent(0) * extent(1); ++row) {
      const double u[kRank] = {offset(0, row / extent(1)), offset(1, row % extent(1)), offset(2, 0)};
      visit(u, row);
    }
  }
};

template <typename T>
void table(const Group& g, T* out) {
  const double(&m)[kRank][kRank] = g.factor;
  const int width = int(g.extent(2));
  g.for_each_row([&](const double* u, int64_t row) {
    double rest[kRank];  // what the leading coordinates add to M^T u
    for (int k = 0; k < kRank; ++k) rest[k] = m[0][k] * u[0] + m[1][k] * u[1];
    for (int j = 0; j < width; ++j) {
      double sum = 0;
      for (int k = 0; k < kRank; ++k) {
        const double projected = rest[k] + m[2][k] * (u[2] + j);
        sum += projected * projected;
      }
      out[row * width + j] = T(-0.5 * sum);
    }
  });
}

// dc and dM from s1 and the upper triangle of s2, added to what is there.
POSMLP_BOTH inline void add_gradients(const Group& g, const double (&s1)[kRank], const double (&s2)[kRank][kRank],
                                      double (&dcenter)[kRank], double (&dfactor)[kRank][kRank]) {
  for (int k = 0; k < kRank; ++k) {
    double projected = 0;  // (M^T s1)[k]
    for (int a = 0; a < kRank; ++a) projected += g.factor[a][k] * s1[a];
    for (int a = 0; a < kRank; ++a) {
      dcenter[a] += g.factor[a][k] * projected;
      for (int b = 0; b < kRank; ++b) dfactor[a][k] -= (a < b ? s2[a][b] : s2[b][a]) * g.factor[b][k];
    }
  }
}

// dc and dM. The sums over rows are taken column by column, so that no sum has to be reordered to use vectors.
template <typename T>
void table_backward(const Group& g, const T* gradient, double (&dcenter)[kRank], double (&dfactor)[kRank][kRank]) {
  constexpr int64_t kColumns = 32, kProducts = 6;
  const int64_t width = g.extent(2), products = g.rank * (g.rank + 1) / 2;  // the others are zeros
  double s1[kRank] = {}, s2[kRank][kRank] = {};                             // of s2 the upper triangle
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t columns = std::min(kColumns, width - first);
    double sums[kProducts][kColumns] = {};
    g.for_each_row([&](const double* u, int64_t row) {
      const double weights[kProducts] = {1, u[1], u[1] * u[1], u[0], u[0] * u[1], u[0] * u[0]};
      const T* values = gradient + row * width + first;
      for (int64_t p = 0; p < products; ++p)
        for (int64_t j = 0; j < columns; ++j) sums[p][j] += weights[p] * double(values[j]);
    });
    for (int64_t j = 0; j < columns; ++j) {
      const double u2 = g.offset(2, first + j);
      s1[0] += sums[3][j];
      s1[1] += sums[1][j];
      s1[2] += sums[0][j] * u2;
      s2[0][0] += sums[5][j];
      s2[0][1] += sums[4][j];
      s2[0][2] += sums[3][j] * u2;
      s2[1][1] += sums[2][j];
      s2[1][2] += sums[1][j] * u2;
      s2[2][2] += sums[0][j] * u2 * u2;
    }
  }
  add_gradients(g, s1, s2, dcenter, dfactor);
}

}  // namespace posmlp::gqpe
