// The polynomials that GELU is looked up in, made when the library is loaded.
#include "cpu_gelu_pieces.h"

#include <cmath>

namespace posmlp::cpu {
namespace {

constexpr double kPi = 3.14159265358979323846, kWidth = GeluPieces::kWidth;

double normal_tail(double a) { return std::erfc(a * std::sqrt(0.5)) / 2; }
double slope_above_half(double a) { return 0.5 - normal_tail(a) + a * std::exp(-a * a / 2) / std::sqrt(2 * kPi); }

// Newton's interpolation in the roots of a Chebyshev polynomial, which is nearly the best there is. Of the first and the last
// piece half is on the line, at whose end is `end`, exactly.
template <int kNodes>
void interpolate(double (*function)(double), double end, float (&power)[kNodes][GeluPieces::kPieces]) {
  for (int piece = 0; piece < GeluPieces::kPieces; ++piece) {
    const bool last = piece == GeluPieces::kPieces - 1;
    const double from = piece == 0 ? 0 : -kWidth / 2, to = last ? 0 : kWidth / 2;
    double node[kNodes], difference[kNodes], sum[kNodes] = {};
    for (int k = 0; k < kNodes; ++k) {
      node[k] = from + (to - from) * (1 - std::cos(kPi * (k + 0.5) / kNodes)) / 2;
      difference[k] = function(piece * kWidth + node[k]);
    }
    for (int order = 1; order < kNodes; ++order)
      for (int k = kNodes - 1; k >= order; --k)
        difference[k] = (difference[k] - difference[k - 1]) / (node[k] - node[k - order]);
    for (int k = kNodes - 1; k >= 0; --k) {  // sum * (t - node) + difference
      for (int n = kNodes - 1; n > 0; --n) sum[n] = sum[n - 1] - node[k] * sum[n];
      sum[0] = difference[k] - node[k] * sum[0];
    }
    if (last) sum[0] = end;
    for (int n = 0; n < kNodes; ++n) power[n][piece] = float(sum[n]);
  }
}

}  // namespace

GeluPieces::GeluPieces() {
  interpolate(normal_tail, 0, tail);
  interpolate(slope_above_half, 0.5, slope);
}

const GeluPieces kGeluPieces;

}  // namespace posmlp::cpu
