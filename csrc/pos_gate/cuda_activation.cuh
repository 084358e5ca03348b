// The activation of x as it is loaded, and its slope; as on the CPU (cpu_activation.h), if by other formulas.
//
//     gelu       x Phi(x)       slope  Phi(x) + x Phi'(x)                 Phi: the normal distribution function
//     gelu_tanh  x s            slope  s + x s (1 - s) d(2u)/dx,          s = 1 / (1 + e^(-2u)),
//                               2u = 2 sqrt(2/pi) (x + 0.044715 x^3),     1 - s = e^(-2u) s, without cancelling
//
// Both cost some twenty instructions an element, which hide behind memory where x is read once.
#pragma once

#include "cuda_platform.h"

namespace posmlp::cuda {

// In float32 1/2 + x P(x^2) / Q(x^2), within 1e-8 up to kEnd and exactly 0 below -kEnd: half the work of an erf.
POSMLP_DEVICE float normal_cdf(float x) {
  constexpr float kEnd = 5.55f;
  const float bounded = x > kEnd ? kEnd : x, square = bounded * bounded;
  float p = 2.244276942e-8f * square + 6.352734090e-6f;
  p = (p * square + 1.712741359e-4f) * square + 4.691817798e-3f;
  p = (p * square + 3.410917521e-2f) * square + 3.989422321e-1f;
  float q = 1.188617262e-6f * square + 7.434884174e-5f;
  q = (q * square + 1.898334478e-3f) * square + 2.878968976e-2f;
  q = (q * square + 2.521648407e-1f) * square + 1.f;
  return x < -kEnd ? 0.f : bounded * (p / q) + 0.5f;
}
POSMLP_DEVICE double normal_cdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }

template <class A>
POSMLP_DEVICE A gelu_tanh_decay(A x) { return exp(A(-1.5957691216057308) * (x + A(0.044715) * x * x * x)); }  // e^(-2u)

template <class A>
POSMLP_DEVICE A activate(Activation activation, A x) {
  if (activation == Activation::gelu) return x * normal_cdf(x);
  if (activation == Activation::gelu_tanh) return x / (A(1) + gelu_tanh_decay(x));
  return x;
}

template <class A>
POSMLP_DEVICE A activation_slope(Activation activation, A x) {
  if (activation == Activation::none) return A(1);
  if (activation == Activation::gelu) return normal_cdf(x) + x * A(0.39894228040143267794) * exp(A(-0.5) * x * x);
  const A near = x < A(-10) ? A(-10) : x > A(10) ? A(10) : x;  // beyond, the slope is 0 or 1, and e^(-2u) overflows
  const A decay = gelu_tanh_decay(near), s = A(1) / (A(1) + decay);
  return s + near * s * (decay * s) * A(1.5957691216057308) * (A(1) + A(3 * 0.044715) * near * near);
}

}  // namespace posmlp::cuda
