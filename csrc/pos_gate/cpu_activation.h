// The activations, with their slopes.
//
// Exact GELU is x Phi(x), Phi the normal distribution function; its slope is Phi(x) + x Phi'(x).
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class V>
struct ActivationValue {
  V value, slope;
};

// |x|
template <class V>
inline V magnitude(V x) {
  return (V)((IntsOf<V>)x & std::numeric_limits<ElementOf<IntsOf<V>>>::max());  // all bits but the sign
}
// The smaller of two positive numbers, which are ordered as their bits are, even where one is NaN.
template <class V>
inline V smaller_positive(V a, V b) {
  const auto a_bits = (IntsOf<V>)a, b_bits = (IntsOf<V>)b;
  return (V)(a_bits < b_bits ? a_bits : b_bits);
}

// GELU in single as x/2 + b E(b), b = |x| / 2 and E(b) = erf(sqrt(2) b), and its slope as 1/2 and half of E + b E' with
// the sign of x. 1 - E is the eighth power of 1 - t, t a polynomial of b without a constant, which gives b E and b E'
// within 2e-8 but for roundings, and takes neither a division nor an exponential. A squaring of 1 - t leads from t to
// t + t (1 - t), which is right to its last places at either end. From b = 4.61 on t exceeds 1.
template <class V>
inline ActivationValue<V> gelu_by_power(V x) {
  constexpr float kT[] = {7.93108193e-5f,  -1.02228171e-3f, 4.1467757e-3f,  -1.11315923e-3f,
                          -2.63158549e-2f, 5.89331286e-3f,  1.39263466e-1f, 1.99470967e-1f};
  const V half_x = x * 0.5f, b = magnitude(half_x);
  V ratio = fill<V>(kT[0]), change{};  // t / b and its derivative
  for (int i = 1; i < 8; ++i) {
    change = change * b + ratio;
    ratio = ratio * b + kT[i];
  }
  const V t = smaller_positive(ratio * b, fill<V>(1)), rest = 1.f - t;
  const V second = t * rest + t, second_rest = 1.f - second;
  const V fourth = second * second_rest + second, fourth_rest = 1.f - fourth;
  const V e = fourth * fourth_rest + fourth;
  const V dt = smaller_positive(change * b + ratio, fill<V>(std::numeric_limits<float>::max()));  // times zero is zero
  const V both = rest * second_rest * fourth_rest * dt * b * 8.f + e;
  return {b * e + half_x, 0.5f * (V)((IntsOf<V>)both ^ ((IntsOf<V>)x & (IntsOf<V>)fill<V>(-0.f))) + 0.5f};
}

// GELU in double as max(x, 0) - a Q(a), a = |x| and Q(a) = 1 - Phi(a); its slope is Q - a Phi' for x < 0, and 1 less that
// otherwise. The ratio of Q to e^(-a^2 / 2) is w = 1 / (1 + a / 4) times a polynomial of 1 - w, within 7e-17 of Q.
template <class V>
inline ActivationValue<V> gelu_by_ratio(V x) {
  constexpr double kRatio[] = {
      0.005397301282692059, -0.012373449774623919, 0.0027590557428771416, 0.0030785942928715564,
      0.018678742736322262, -0.00073978682478801387, -0.054424455475446029, -0.030083996180991506,
      0.17900861885766053, 0.07384889948366633, -0.79807601277429649, 1.3084617567788693,
      -1.0957691216056701, 0.5};
  const V a = magnitude(x) > 40. ? fill<V>(40) : magnitude(x);  // where nothing is left of Q
  const V w = 1. / (a * 0.25 + 1.), decay = exponential(a * a * -0.5);
  V ratio{};
  for (double coefficient : kRatio) ratio = ratio * (1. - w) + coefficient;
  const V q = decay * w * ratio, slope = q - a * decay * 0.39894228040143267794;
  return {(x > 0 ? x : V{}) - a * q, x < 0 ? slope : 1. - slope};
}

#ifdef POSMLP_AVX512
// With AVX-512. Every multiplication is one of a sum rounded once, and says so: compilers see to that in some of the places
// where this is inlined, and not in others.

// A polynomial of t, whose coefficients each lane looks up for its own piece: the last four bits of `piece`. By pairs of them: a
// core has little room for what waits, and shorter chains wait less.
template <int kCount>
inline __m512 look_up(const float (&power)[kCount][GeluPieces::kPieces], __m512i piece, __m512 t) {
  const auto coefficient = [&](int n) __attribute__((always_inline)) {
    return _mm512_maskz_permutexvar_ps(kAllLanes, piece, _mm512_load_ps(power[n]));
  };
  const auto pair = [&](int n) __attribute__((always_inline)) {
    return n + 1 < kCount ? _mm512_fmadd_ps(coefficient(n + 1), t, coefficient(n)) : coefficient(n);
  };
  constexpr int kLast = (kCount - 1) / 2 * 2;
  const __m512 square = _mm512_mul_ps(t, t);
  __m512 sum = pair(kLast);
  POSMLP_UNROLL for (int n = kLast - 2; n >= 0; n -= 2) sum = _mm512_fmadd_ps(sum, square, pair(n));
  return sum;
}
// GELU in single as max(x, 0) - a Q(a), a = |x| and Q = 1 - Phi, which cancels nowhere. Q is a polynomial for each of 16
// pieces of the line, and so is the slope: 7 multiplications, 13 with the slope, where a power takes 13 and 26.
inline ActivationValue<Vec<float>> gelu_by_pieces(Vec<float> lanes) {
  constexpr int kSmallerMagnitude = 0b1010;  // without a sign
  const __m512 x = (__m512)lanes, end = _mm512_set1_ps(GeluPieces::kEnd);
  const __m512 round = _mm512_set1_ps(1.5f * (1 << 23) * GeluPieces::kWidth);  // adding it leaves the piece in the low bits
  const __m512 a = _mm512_maskz_range_ps(kAllLanes, x, end, kSmallerMagnitude);
  const __m512 shifted = a + round, t = a - (shifted - round);
  const __m512i piece = _mm512_castps_si512(shifted);
  const __m512 tail = look_up(kGeluPieces.tail, piece, t), above_half = look_up(kGeluPieces.slope, piece, t);
  const __m512 positive = _mm512_maskz_max_ps(kAllLanes, __m512{}, x);  // or NaN, which this takes from its second
  const __m512 slope = 0.5f + _mm512_xor_ps(above_half, _mm512_and_ps(x, _mm512_set1_ps(-0.f)));
  return {(Vec<float>)_mm512_fnmadd_ps(a, tail, positive), (Vec<float>)(x == x ? slope : x)};
}
template <class V>  // a part of a register, whose other lanes do not matter
inline ActivationValue<V> gelu_by_pieces(V x) {
  __m512 wide{};
  if constexpr (sizeof x == 32) wide = _mm512_castps256_ps512((__m256)x);
  else if constexpr (sizeof x == 16) wide = _mm512_castps128_ps512((__m128)x);
  else __builtin_memcpy(&wide, &x, sizeof x);
  const auto y = gelu_by_pieces((Vec<float>)wide);
  return {part_of<V, 0>(y.value), part_of<V, 0>(y.slope)};
}
#endif

template <class V>
inline ActivationValue<V> gelu_with_slope(V x) {
  if constexpr (std::is_same_v<ElementOf<V>, double>) return gelu_by_ratio(x);
#ifdef POSMLP_AVX512
  else return gelu_by_pieces(x);
#else
  else return gelu_by_power(x);
#endif
}
template <class V>
inline V gelu(V x) {
  return gelu_with_slope(x).value;  // the compiler leaves out what nobody wants
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
// *value = act(x), and *slope = act'(x) if it is wanted and not 1 everywhere; `lanes` of them.
template <Activation kActivation, class L, class V>
inline void store_activated(L lanes, V x, ElementOf<V>* value, ElementOf<V>* slope) {
  if (kActivation == Activation::none || !slope) return store_as(lanes, value, activated<kActivation>(x));
  const auto y = activated_with_slope<kActivation>(x);
  store_as(lanes, value, y.value);
  store_as(lanes, slope, y.slope);
}
