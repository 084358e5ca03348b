// The activations, with their slopes.
//
// Exact GELU is x Phi(x), Phi the normal distribution function; its slope is Phi(x) + x Phi'(x).
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class V>
struct ActivationValue {
  V value, slope;
};

// Phi. In float32: 1/2 + x P(x^2) / Q(x^2), but for roundings within 1e-8 of it up to kEnd and exactly 0 below -kEnd,
// where the sum would leave a trace.
template <class V>
inline V normal_cdf(V x) {
  if constexpr (std::is_same_v<ElementOf<V>, double>) {
    for (int i = 0; i < kLanesOf<V>; ++i) x[i] = 0.5 * ::erfc(-x[i] * 0.70710678118654752440);
    return x;
  } else {
    constexpr float kEnd = 5.55f;
    constexpr float kP[] = {2.244276942e-8f, 6.352734090e-6f, 1.712741359e-4f,
                            4.691817798e-3f, 3.410917521e-2f, 3.989422321e-1f};
    constexpr float kQ[] = {1.188617262e-6f, 7.434884174e-5f, 1.898334478e-3f, 2.878968976e-2f, 2.521648407e-1f, 1.f};
    const V bounded = x > kEnd ? fill<V>(kEnd) : x, square = bounded * bounded;
    V p = fill<V>(kP[0]), q = fill<V>(kQ[0]);
    for (int i = 1; i < 6; ++i) {
      p = p * square + kP[i];
      q = q * square + kQ[i];
    }
    const V phi = bounded * (p / q) + 0.5f;
    return x < -kEnd ? V{} : phi;
  }
}

#ifdef POSMLP_LOOKUP
#include "cpu_gelu_lookup.h"
#endif

template <class V>
inline V gelu(V x) {
#ifdef POSMLP_LOOKUP
  return gelu_by_pieces(x);
#else
  return x * normal_cdf(x);
#endif
}
template <class V>
inline ActivationValue<V> gelu_with_slope(V x) {
#ifdef POSMLP_LOOKUP
  return gelu_with_slope_by_pieces(x);
#else
  const V phi = normal_cdf(x), density = exponential(x * x * ElementOf<V>(-0.5)) * ElementOf<V>(0.39894228040143267794);
  return {x * phi, phi + x * density};
#endif
}

// The tanh form of GELU: 0.5 x (1 + tanh u) = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3).
template <class V>
inline ActivationValue<V> gelu_tanh(V x) {
  using A = ElementOf<V>;
  constexpr A kScale = A(0.79788456080286535588), kCubic = A(0.044715);
  const V u = kScale * (x + kCubic * x * x * x);
  const V decay = exponential(A(-2) * u), gate = A(1) / (A(1) + decay), rest = decay * gate;  // 1 - gate, uncancelled
  const V slope = kScale * (A(1) + A(3) * kCubic * x * x);
  return {x * gate, gate + A(2) * x * gate * rest * slope};
}

// Calls `work` with the activation as a constant, so that no vector has to ask for it.
template <class Work>
inline void with_constant(Activation activation, const Work& work) {
  switch (activation) {
    case Activation::none: return work(std::integral_constant<Activation, Activation::none>());
    case Activation::gelu: return work(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh: return work(std::integral_constant<Activation, Activation::gelu_tanh>());
  }
}
template <Activation kActivation, class V>
inline V activated(V x) {
  if constexpr (kActivation == Activation::none) return x;
  if constexpr (kActivation == Activation::gelu) return gelu(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh(x).value;
}
template <Activation kActivation, class V>
inline ActivationValue<V> activated_with_slope(V x) {
  if constexpr (kActivation == Activation::none) return {x, fill<V>(1)};
  if constexpr (kActivation == Activation::gelu) return gelu_with_slope(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh(x);
}
// *value = act(x), and *slope = act'(x) if it is wanted.
template <Activation kActivation, class V>
inline void store_activated(V x, ElementOf<V>* value, ElementOf<V>* slope) {
  if (!slope) return store(value, activated<kActivation>(x));
  const auto y = activated_with_slope<kActivation>(x);
  store(value, y.value);
  store(slope, y.slope);
}
