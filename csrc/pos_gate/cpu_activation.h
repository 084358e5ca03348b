// The activations, with their slopes.
//
// Exact GELU is x Phi(x), Phi the normal distribution function; its slope is Phi(x) + x Phi'(x). With AVX-512 a register
// holds a table of 16 numbers, and looking up the six coefficients of a polynomial for a short piece of Phi takes less
// time than the division of the rational function that serves the other instruction sets, and cancels nowhere.
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
// Q(a) = 1 - Phi(a) for a >= 0, a polynomial on each piece around 0, 1, ... kPieces - 1 steps. The last piece is zero:
// beyond 5.55 nothing is left of Q that could be seen beside an ordinary number.
constexpr int kPieces = 16;
constexpr double kStep = 5.55 / (kPieces - 1.5);

// By the series of Phi(a) - 1/2, all of whose terms have one sign.
constexpr double normal_tail(double a) {
  double term = a, sum = a, density = 1, power = 1;
  for (int n = 3; n < 160; n += 2) sum += term *= a * a / n;
  for (int n = 1; n < 16; ++n) density += power *= -a * a / 2 / 64 / n;  // the 64th root of e^(-a^2 / 2)
  for (int n = 0; n < 6; ++n) density *= density;
  return 0.5 - 0.39894228040143267794 * density * sum;
}

// Coefficients of kStep Q by powers of the distance from the piece's centre, in steps: Newton's interpolation in the
// roots of a Chebyshev polynomial. Degree 5 keeps Q to 5e-9, degree 6 its slope.
template <int kDegree>
struct TailTable {
  alignas(64) float power[kDegree + 1][kPieces] = {};

  constexpr TailTable() {
    double node[kDegree + 1] = {};
    for (int k = 0; k <= kDegree; ++k) {
      const double angle = 3.14159265358979323846 * (k + 0.5) / (kDegree + 1);
      double term = 0.5;  // of half the cosine
      for (int n = 1; n < 40; term *= -angle * angle / (n * (n + 1)), n += 2) node[k] += term;
    }
    for (int piece = 0; piece < kPieces - 1; ++piece) {
      double value[kDegree + 1] = {}, sum[kDegree + 1] = {};
      for (int k = 0; k <= kDegree; ++k) value[k] = kStep * normal_tail(kStep * (piece + node[k]));
      for (int order = 1; order <= kDegree; ++order)
        for (int k = kDegree; k >= order; --k) value[k] = (value[k] - value[k - 1]) / (node[k] - node[k - order]);
      for (int k = kDegree; k >= 0; --k) {
        for (int n = kDegree; n > 0; --n) sum[n] = sum[n - 1] - node[k] * sum[n];
        sum[0] = value[k] - node[k] * sum[0];
      }
      for (int n = 0; n <= kDegree; ++n) power[n][piece] = float(sum[n]);
    }
  }
};
template <int kDegree>
constexpr TailTable<kDegree> kTail{};

// table[index], of whose bits the lowest four count.
template <class Index>
inline auto look_up(Index index, const float* table) {
  constexpr int kLanes = kLanesOf<Index>;
  if constexpr (kLanes == 16) {
    return (Vec<float, 16>)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, _mm512_load_ps(table));
  } else if constexpr (kLanes == 8) {
    return (Vec<float, 8>)_mm256_permutex2var_ps(_mm256_load_ps(table), (__m256i)index, _mm256_load_ps(table + 8));
  } else if constexpr (kLanes == 4) {
    const __m256i wide = _mm256_castsi128_si256((__m128i)index);
    return (Vec<float, 4>)_mm256_castps256_ps128(
        _mm256_permutex2var_ps(_mm256_load_ps(table), wide, _mm256_load_ps(table + 8)));
  } else {
    Vec<float, kLanes> values{};
    for (int i = 0; i < kLanes; ++i) values[i] = table[index[i] & (kPieces - 1)];
    return values;
  }
}

// a < b ? a : b and a > b ? a : b, in one instruction, which the compiler does not dare to choose for NaN's sake.
template <class V>
inline V smaller(V a, V b) {
  if constexpr (sizeof a == 64) return (V)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
  if constexpr (sizeof a == 32) return (V)_mm256_min_ps((__m256)a, (__m256)b);
  return a < b ? a : b;
}
template <class V>
inline V larger(V a, V b) {
  if constexpr (sizeof a == 64) return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  if constexpr (sizeof a == 32) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  return a > b ? a : b;
}

// Where |x| lies: that many steps from 0, and `rest` from the centre of `piece`.
template <class V>
struct Place {
  V steps, rest;
  IntsOf<V> piece;

  explicit Place(V x) {
    constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    steps = smaller((V)((IntsOf<V>)x & 0x7fffffff) * float(1 / kStep), fill<V>(kPieces - 1));
    const V shifted = steps + kRound;
    piece = (IntsOf<V>)shifted;
    rest = steps - (shifted - kRound);
  }
};

// x Phi(x) as max(x, 0) - |x| Q(|x|).
template <class V>
inline V gelu_by_pieces(V x) {
  const Place<V> at(x);
  const auto pair = [&](int n) {
    return look_up(at.piece, kTail<5>.power[n]) + look_up(at.piece, kTail<5>.power[n + 1]) * at.rest;
  };
  const V square = at.rest * at.rest, tail = (pair(4) * square + pair(2)) * square + pair(0);
  return larger(V{}, x) - at.steps * tail;
}
// The slope is Q(|x|) + |x| Q'(|x|) for x < 0, and 1 less that otherwise.
template <class V>
inline ActivationValue<V> gelu_with_slope_by_pieces(V x) {
  const Place<V> at(x);
  V tail = look_up(at.piece, kTail<6>.power[6]), change = tail;
  tail = tail * at.rest + look_up(at.piece, kTail<6>.power[5]);
  for (int n = 4; n >= 0; --n) {
    change = change * at.rest + tail;
    tail = tail * at.rest + look_up(at.piece, kTail<6>.power[n]);
  }
  const V slope = (at.steps * change + tail) * float(1 / kStep);
  const V one = x - x + 1;  // but for NaN, which stays
  return {larger(V{}, x) - at.steps * tail, x < 0 ? slope : one - slope};
}
#endif

template <class V>
inline V gelu(V x) {
#ifdef POSMLP_LOOKUP
  if constexpr (std::is_same_v<ElementOf<V>, float>) return gelu_by_pieces(x);
#endif
  return x * normal_cdf(x);
}
template <class V>
inline ActivationValue<V> gelu_with_slope(V x) {
#ifdef POSMLP_LOOKUP
  if constexpr (std::is_same_v<ElementOf<V>, float>) return gelu_with_slope_by_pieces(x);
#endif
  const V phi = normal_cdf(x), density = exponential(x * x * ElementOf<V>(-0.5)) * ElementOf<V>(0.39894228040143267794);
  return {x * phi, phi + x * density};
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
