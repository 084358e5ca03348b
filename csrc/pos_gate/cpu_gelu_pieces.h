// What GELU is looked up in where a register holds 16 numbers and an instruction picks among them: polynomials of
// a = |x|, one for each of 16 pieces of the line.
#pragma once

namespace posmlp::cpu {

// Piece p lies around a = p kWidth and ends halfway to its neighbours; the last one ends where it lies, and nothing is
// left of a tail from there on. Coefficients are those of powers of a - p kWidth: a vector's lanes pick theirs. A power of two
// is a width to which an addition rounds.
struct GeluPieces {
  static constexpr int kPieces = 16;
  static constexpr float kWidth = 0.5f, kEnd = (kPieces - 1) * kWidth;
  template <int kDegree>
  using Powers = float[kDegree + 1][kPieces];

  alignas(64) Powers<5> tail;   // 1 - Phi(a): GELU(x) = max(x, 0) - a (1 - Phi(a))
  alignas(64) Powers<6> slope;  // GELU'(a) - 1/2, which has the sign of x

  GeluPieces();
};

extern const GeluPieces kGeluPieces;

}  // namespace posmlp::cpu
