// Vectors of W lanes through the compiler's vector extension, and the few functions of them that the gate needs.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t ints __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
using FloatVec = Vec<float>;
using DoubleVec = Vec<double>;

template <class A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
inline void store(A* p, Vec<A> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// A vector of doubles, rounded once.
template <class A>
inline void store_rounded(A* p, DoubleVec v) {
  typedef A Rounded __attribute__((vector_size(kVectorBytes / sizeof(double) * sizeof(A))));
  const Rounded rounded = __builtin_convertvector(v, Rounded);
  __builtin_memcpy(p, &rounded, sizeof rounded);
}
template <class A>
inline DoubleVec load_wide(const A* p) {
  typedef A Narrow __attribute__((vector_size(kVectorBytes / sizeof(double) * sizeof(A))));
  Narrow v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, DoubleVec);
}
template <class A>
inline Vec<A> fill(A a) {
  return a - Vec<A>{};  // a minus zero is a, bit for bit; zero plus a is not, and would cost an addition
}
inline VectorOf<double>::ints lane_numbers() {
  VectorOf<double>::ints numbers;
  for (int i = 0; i < VectorOf<double>::kLanes; ++i) numbers[i] = i;
  return numbers;
}
template <class A>
inline double sum_lanes(Vec<A> v) {
  double total = 0;
  for (int i = 0; i < VectorOf<A>::kLanes; ++i) total += v[i];
  return total;
}

// e^x to about 1 ulp: x = n ln 2 + r, a degree-6 polynomial for e^r, 2^n through the exponent's bits.
// Below the smallest normal number it returns 0: a weight that small cannot change a sum, and subnormals are slow.
inline FloatVec exponential(FloatVec x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves n in the low bits
  constexpr float kSmallest = -87.33654f, kLargest = 88.f;
  const auto tiny = x < kSmallest;
  FloatVec y = tiny ? fill(kSmallest) : x;
  y = y > kLargest ? fill(kLargest) : y;
  const FloatVec shifted = y * kLog2E + kRound;
  const FloatVec n = shifted - kRound;
  const FloatVec r = (y - n * kLn2High) - n * kLn2Low;
  FloatVec p = fill(1.3814534759e-3f);
  p = p * r + 8.3687463775e-3f;
  p = p * r + 4.1668392718e-2f;
  p = p * r + 1.6666521132e-1f;
  p = p * r + 4.9999994040e-1f;
  p = (p * r) * r + r + 1.f;
  const auto exponent = ((VectorOf<float>::ints)shifted + 127) << 23;  // 2^n
  return tiny ? FloatVec{} : p * (FloatVec)exponent;
}
// The same in double, by the Taylor series to degree 13, whose next term is 4e-18 for |r| <= ln 2 / 2.
inline DoubleVec exponential(DoubleVec x) {
  constexpr double kLog2E = 1.4426950408889634, kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  constexpr double kRound = 0x1.8p52, kSmallest = -708.39, kLargest = 709.;
  constexpr double kInverseFactorials[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880,
                                           1. / 40320,      1. / 5040,      1. / 720,      1. / 120,     1. / 24,
                                           1. / 6,          1. / 2,         1.,            1.};
  const auto tiny = x < kSmallest;
  DoubleVec y = tiny ? fill(kSmallest) : x;
  y = y > kLargest ? fill(kLargest) : y;
  const DoubleVec shifted = y * kLog2E + kRound;
  const DoubleVec n = shifted - kRound;
  const DoubleVec r = (y - n * kLn2High) - n * kLn2Low;
  DoubleVec p{};
  for (double coefficient : kInverseFactorials) p = p * r + coefficient;
  const auto exponent = ((VectorOf<double>::ints)shifted + 1023) << 52;  // 2^n
  return tiny ? DoubleVec{} : p * (DoubleVec)exponent;
}

template <class A>
struct ActivationValue {
  Vec<A> value, derivative;
};

// Phi, the normal distribution function, in float32: 1/2 + x P(x^2) / Q(x^2), within 1e-8 of it up to kEnd and exactly 0
// below -kEnd, where the sum would leave a trace.
inline FloatVec normal_cdf(FloatVec x) {
  constexpr float kEnd = 5.55f;
  constexpr float kP[] = {2.244276942e-8f, 6.352734090e-6f, 1.712741359e-4f,
                          4.691817798e-3f, 3.410917521e-2f, 3.989422321e-1f};
  constexpr float kQ[] = {1.188617262e-6f, 7.434884174e-5f, 1.898334478e-3f, 2.878968976e-2f, 2.521648407e-1f, 1.f};
  const FloatVec bounded = x > kEnd ? fill(kEnd) : x, square = bounded * bounded;
  FloatVec p = fill(kP[0]), q = fill(kQ[0]);
  for (int i = 1; i < 6; ++i) {
    p = p * square + kP[i];
    q = q * square + kQ[i];
  }
  const FloatVec phi = bounded * (p / q) + 0.5f;
  return x < -kEnd ? FloatVec{} : phi;
}

// Exact GELU, x Phi(x), and its derivative Phi(x) + x Phi'(x).
inline FloatVec gelu_value(FloatVec x) { return x * normal_cdf(x); }
inline ActivationValue<float> gelu(FloatVec x) {
  const FloatVec phi = normal_cdf(x), density = exponential(x * x * -0.5f) * 0.3989422804f;
  return {x * phi, phi + x * density};
}
inline ActivationValue<double> gelu(DoubleVec x) {
  ActivationValue<double> y;
  for (int i = 0; i < VectorOf<double>::kLanes; ++i) {
    const double phi = 0.5 * ::erfc(-x[i] * 0.70710678118654752440);
    y.value[i] = x[i] * phi;
    y.derivative[i] = phi + x[i] * ::exp(-0.5 * x[i] * x[i]) * 0.39894228040143267794;
  }
  return y;
}

inline DoubleVec gelu_value(DoubleVec x) { return gelu(x).value; }

// The tanh form of GELU: 0.5 x (1 + tanh u) = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3).
template <class V>
inline auto gelu_tanh(V x) {
  using A = std::remove_reference_t<decltype(x[0])>;
  constexpr A kScale = A(0.79788456080286535588), kCubic = A(0.044715);
  const V u = kScale * (x + kCubic * x * x * x);
  const V decay = exponential(A(-2) * u), gate = A(1) / (A(1) + decay), rest = decay * gate;  // 1 - gate, uncancelled
  const V slope = kScale * (A(1) + A(3) * kCubic * x * x);
  return ActivationValue<A>{x * gate, gate + A(2) * x * gate * rest * slope};
}

// values[i] = act(values[i]), and slopes[i] = act'(values[i]) if wanted; count is a multiple of the lanes.
template <class A>
inline void activate(Activation activation, A* values, A* slopes, int64_t count) {
  constexpr int kLanes = VectorOf<A>::kLanes;
  if (activation == Activation::none) return;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec<A> x = load<A>(values + i);
    if (!slopes && activation == Activation::gelu) {
      store<A>(values + i, gelu_value(x));
      continue;
    }
    const auto y = activation == Activation::gelu ? gelu(x) : gelu_tanh(x);
    store<A>(values + i, y.value);
    if (slopes) store<A>(slopes + i, y.derivative);
  }
}
