// The polynomials that GELU is looked up in, made when the library is loaded.
#include "cpu_gelu_pieces.h"

#include <cmath>

namespace posmlp::cpu {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr int kNodes = GeluPieces::kDegree + 1;

double normal_tail(double a) { return std::erfc(a * std::sqrt(0.5)) / 2; }
double slope_above_half(double a) { return 0.5 - normal_tail(a) + a * std::exp(-a * a / 2) / std::sqrt(2 * kPi); }

// Newton's interpolation in the extrema of a Chebyshev polynomial: the ends of a piece are among them, so that neighbours
// meet. The last node of all gets `end` instead, exactly.
void interpolate(double (*function)(double), double end, float (&power)[kNodes][GeluPieces::kPieces]) {
  for (int piece = 0; piece < GeluPieces::kPieces; ++piece) {
    const bool last = piece == GeluPieces::kPieces - 1;
    double node[kNodes], difference[kNodes], sum[kNodes] = {};
    for (int k = 0; k < kNodes; ++k) {
      const double along = (1 - std::cos(kPi * k / GeluPieces::kDegree)) / 2;  // from 0 to 1
      node[k] = last ? along / 2 - 0.5 : along - 0.5;
      difference[k] = function((piece + node[k]) / GeluPieces::kPerUnit);
    }
    if (last) node[kNodes - 1] = 0, difference[kNodes - 1] = end;
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
