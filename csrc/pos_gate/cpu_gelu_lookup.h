// GELU with AVX-512, where a register holds a table of 16 numbers, or two do: looking up the coefficients of a polynomial
// for a short piece of Phi takes less time than the division of the rational function that serves the other instruction
// sets, and cancels nowhere.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// Q(a) = 1 - Phi(a) for a >= 0, a polynomial on each piece around 0, 1, ... kPieces - 1 steps. The last piece is zero:
// beyond kEnd nothing is left of Q that could be seen beside an ordinary number.
constexpr int kPieces = 16;

// A polynomial of degree kDegree gives Q to a rounding of 1, one of kSlopeDegree its slope too. kRound is 1.5 * 2^(bits of
// the mantissa): adding it leaves the nearest integer in the low bits.
template <class A>
struct Tail;
template <>
struct Tail<float> {
  static constexpr double kEnd = 5.55, kStep = kEnd / (kPieces - 1.5);
  static constexpr int kDegree = 5, kSlopeDegree = 6;
  static constexpr float kRound = 12582912.f;
};
template <>
struct Tail<double> {
  static constexpr double kEnd = 8.9, kStep = kEnd / (kPieces - 1.5);
  static constexpr int kDegree = 13, kSlopeDegree = 15;
  static constexpr double kRound = 6755399441055744.;
};

// By the series of Phi(a) - 1/2, all of whose terms have one sign, or by Laplace's continued fraction where the difference
// from 1/2 would leave few digits.
constexpr long double normal_tail(long double a) {
  long double density = 1, power = 1;  // e^(-a^2 / 2), first its 64th root
  for (int n = 1; n < 20; ++n) density += power *= -a * a / 2 / 64 / n;
  for (int n = 0; n < 6; ++n) density *= density;
  density *= 0.398942280401432677939946L;
  if (a > 1.2L) {
    long double below = a;
    for (int n = 300; n > 0; --n) below = a + n / below;
    return density / below;
  }
  long double term = a, sum = a;
  for (int n = 3; n < 80; n += 2) sum += term *= a * a / n;
  return 0.5L - density * sum;
}

// Coefficients of kStep Q by powers of the distance from the piece's centre, in steps: Newton's interpolation in the
// roots of a Chebyshev polynomial.
template <class A, int kDegree>
struct TailTable {
  alignas(64) A power[kDegree + 1][kPieces] = {};

  constexpr TailTable() {
    constexpr long double kStep = Tail<A>::kStep;
    long double node[kDegree + 1] = {};
    for (int k = 0; k <= kDegree; ++k) {
      const long double angle = 3.14159265358979323846L * (k + 0.5L) / (kDegree + 1);
      long double term = 0.5L;  // of half the cosine
      for (int n = 1; n < 40; term *= -angle * angle / (n * (n + 1)), n += 2) node[k] += term;
    }
    for (int piece = 0; piece < kPieces - 1; ++piece) {
      long double value[kDegree + 1] = {}, sum[kDegree + 1] = {};
      for (int k = 0; k <= kDegree; ++k) {
        const long double at = kStep * (piece + node[k]);
        value[k] = kStep * (at < 0 ? 1 - normal_tail(-at) : normal_tail(at));
      }
      for (int order = 1; order <= kDegree; ++order)
        for (int k = kDegree; k >= order; --k) value[k] = (value[k] - value[k - 1]) / (node[k] - node[k - order]);
      for (int k = kDegree; k >= 0; --k) {
        for (int n = kDegree; n > 0; --n) sum[n] = sum[n - 1] - node[k] * sum[n];
        sum[0] = value[k] - node[k] * sum[0];
      }
      for (int n = 0; n <= kDegree; ++n) power[n][piece] = A(sum[n]);
    }
  }
};
template <class A, int kDegree>
constexpr TailTable<A, kDegree> kTail{};

// table[index], of whose bits the lowest four count.
template <class Index, class A>
inline auto look_up(Index index, const A* table) {
  constexpr int kLanes = kLanesOf<Index>;
  if constexpr (sizeof(Index) == 64 && sizeof(A) == 4) {
    return (Vec<A, kLanes>)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, _mm512_load_ps(table));
  } else if constexpr (sizeof(Index) == 64) {
    return (Vec<A, kLanes>)_mm512_permutex2var_pd(_mm512_load_pd(table), (__m512i)index, _mm512_load_pd(table + 8));
  } else if constexpr (sizeof(Index) == 32 && sizeof(A) == 4) {
    return (Vec<A, kLanes>)_mm256_permutex2var_ps(_mm256_load_ps(table), (__m256i)index, _mm256_load_ps(table + 8));
  } else if constexpr (sizeof(Index) == 16 && sizeof(A) == 4) {
    const __m256i wide = _mm256_castsi128_si256((__m128i)index);
    return (Vec<A, kLanes>)_mm256_castps256_ps128(
        _mm256_permutex2var_ps(_mm256_load_ps(table), wide, _mm256_load_ps(table + 8)));
  } else {
    Vec<A, kLanes> values{};
    for (int i = 0; i < kLanes; ++i) values[i] = table[index[i] & (kPieces - 1)];
    return values;
  }
}

// In single in one instruction, which the compiler does not dare to choose for NaN's sake.
template <class V>
inline V smaller(V a, V b) { return a < b ? a : b; }
inline Vec<float, 16> smaller(Vec<float, 16> a, Vec<float, 16> b) {
  return (Vec<float, 16>)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
}
inline Vec<float, 8> smaller(Vec<float, 8> a, Vec<float, 8> b) {
  return (Vec<float, 8>)_mm256_min_ps((__m256)a, (__m256)b);
}
template <class V>
inline V larger(V a, V b) { return a > b ? a : b; }
inline Vec<float, 16> larger(Vec<float, 16> a, Vec<float, 16> b) {
  return (Vec<float, 16>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
}
inline Vec<float, 8> larger(Vec<float, 8> a, Vec<float, 8> b) {
  return (Vec<float, 8>)_mm256_max_ps((__m256)a, (__m256)b);
}

// Where |x| lies: that many steps from 0, and `rest` from the centre of `piece`.
template <class V>
struct Place {
  using A = ElementOf<V>;
  V steps, rest;
  IntsOf<V> piece;

  explicit Place(V x) {
    constexpr auto kMagnitude = std::numeric_limits<ElementOf<IntsOf<V>>>::max();  // all bits but the sign
    steps = smaller((V)((IntsOf<V>)x & kMagnitude) * A(1 / Tail<A>::kStep), fill<V>(kPieces - 1));
    const V shifted = steps + Tail<A>::kRound;
    piece = (IntsOf<V>)shifted;
    rest = steps - (shifted - Tail<A>::kRound);
  }
};

// x Phi(x) as max(x, 0) - |x| Q(|x|).
template <class V>
inline V gelu_by_pieces(V x) {
  using A = ElementOf<V>;
  constexpr int kDegree = Tail<A>::kDegree;
  const Place<V> at(x);
  const auto pair = [&](int n) {
    return look_up(at.piece, kTail<A, kDegree>.power[n]) + look_up(at.piece, kTail<A, kDegree>.power[n + 1]) * at.rest;
  };
  const V square = at.rest * at.rest;
  V tail = pair(kDegree - 1);
  for (int n = kDegree - 3; n >= 0; n -= 2) tail = tail * square + pair(n);
  return larger(V{}, x) - at.steps * tail;
}
// The slope is Q(|x|) + |x| Q'(|x|) for x < 0, and 1 less that otherwise.
template <class V>
inline ActivationValue<V> gelu_with_slope_by_pieces(V x) {
  using A = ElementOf<V>;
  constexpr int kDegree = Tail<A>::kSlopeDegree;
  const Place<V> at(x);
  const auto power = [&](int n) { return look_up(at.piece, kTail<A, kDegree>.power[n]); };
  V tail = power(kDegree), change = tail;
  tail = tail * at.rest + power(kDegree - 1);
  for (int n = kDegree - 2; n >= 0; --n) {
    change = change * at.rest + tail;
    tail = tail * at.rest + power(n);
  }
  const V slope = (at.steps * change + tail) * A(1 / Tail<A>::kStep);
  const V one = x - x + 1;  // but for NaN, which stays
  return {larger(V{}, x) - at.steps * tail, x < 0 ? slope : one - slope};
}
