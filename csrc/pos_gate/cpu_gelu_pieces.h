// What GELU is looked up in where a register holds 16 numbers and an instruction picks among them: polynomials of
// a = |x|, one for each of 16 pieces of the line.
#pragma once

namespace posmlp::cpu {

// Piece p lies around a = p / kPerUnit and ends halfway to its neighbours; the last one ends where it lies, and nothing is
// left of a tail from there on. Coefficients are those of powers of kPerUnit a - p: a vector's lanes pick theirs.
struct GeluPieces {
  static constexpr int kPieces = 16, kDegree = 5;
  static constexpr float kPerUnit = 2.5f, kEnd = (kPieces - 1) / kPerUnit;

  alignas(64) float tail[kDegree + 1][kPieces];   // 1 - Phi(a): GELU(x) = max(x, 0) - a (1 - Phi(a))
  alignas(64) float slope[kDegree + 1][kPieces];  // GELU'(a) - 1/2, which has the sign of x

  GeluPieces();
};

extern const GeluPieces kGeluPieces;

}  // namespace posmlp::cpu
