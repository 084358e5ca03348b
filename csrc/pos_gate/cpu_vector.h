// Vectors of W lanes through the compiler's vector extension, and the few functions of them that the gate needs.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

#define POSMLP_UNROLL _Pragma("GCC unroll 16")  // all of a short loop
#ifndef POSMLP_KEEP
#define POSMLP_KEEP(v) (void)(v)  // in a register from here on, where that has to be said
#endif
#define POSMLP_IN_MEMORY(v) __asm__ volatile("" : "+m"(v))  // from here on read from memory, not kept in registers

// L numbers side by side; without L, as many as a register holds.
template <class A, int L = kVectorBytes / int(sizeof(A))>
struct VectorOf {
  static constexpr int kLanes = L;
  using Integer = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef A type __attribute__((vector_size(L * sizeof(A))));
  typedef Integer ints __attribute__((vector_size(L * sizeof(A))));
};
template <class A, int L = VectorOf<A>::kLanes>
using Vec = typename VectorOf<A, L>::type;
using DoubleVec = Vec<double>;

// What a vector is made of.
template <class V>
using ElementOf = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
template <class V>
constexpr int kLanesOf = int(sizeof(V) / sizeof(ElementOf<V>));
template <class V>
using IntsOf = typename VectorOf<ElementOf<V>, kLanesOf<V>>::ints;

template <class A, int L = VectorOf<A>::kLanes>
inline Vec<A, L> load(const A* p) {
  Vec<A, L> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class A, class V>
inline void store(A* p, V v) {
  static_assert(std::is_same_v<A, ElementOf<V>>);
  __builtin_memcpy(p, &v, sizeof v);
}
// A row of a panel, in registers.
template <class A>
using PanelRow = Vec<A>[kTileVectors];
template <class A>
__attribute__((always_inline)) inline void load_row(const A* p, PanelRow<A>& row) {
  POSMLP_UNROLL for (int v = 0; v < kTileVectors; ++v) row[v] = load<A>(p + v * VectorOf<A>::kLanes);
}
template <class A>
__attribute__((always_inline)) inline void store_row(A* p, const PanelRow<A>& row) {
  POSMLP_UNROLL for (int v = 0; v < kTileVectors; ++v) store(p + v * VectorOf<A>::kLanes, row[v]);
}
// A vector of two halves, and the first (kPart = 0) or a later part of a vector.
template <class V, class H, int... kIndex>
inline V join(H first, H second, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(first, second, kIndex...);
#else
  V v;
  __builtin_memcpy(&v, &first, sizeof first);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + sizeof first, &second, sizeof second);
  return v;
#endif
}
template <class V, class H>
inline V join(H first, H second) {
  return join<V>(first, second, std::make_integer_sequence<int, kLanesOf<V>>());
}
template <class H, int kPart, class V, int... kIndex>
inline H part_of(V v, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, (kPart * kLanesOf<H> + kIndex)...);
#else
  H part;
  __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + kPart * sizeof part, sizeof part);
  return part;
#endif
}
template <class H, int kPart, class V>
inline H part_of(V v) {
  return part_of<H, kPart>(v, std::make_integer_sequence<int, kLanesOf<H>>());
}
#ifdef POSMLP_AVX512
constexpr __mmask16 kAllLanes = 0xffff;  // without a mask GCC 12 warns of its own headers
#endif
// From and to vectors of doubles, rounded once. GCC 12 by itself converts a quarter of a register at a time.
template <class A>
using Narrow = Vec<A, VectorOf<double>::kLanes>;
template <class A>
inline DoubleVec widened(Narrow<A> v) {
#ifdef POSMLP_AVX512
  if constexpr (std::is_same_v<A, float>) return (DoubleVec)_mm512_maskz_cvtps_pd(__mmask8(kAllLanes), (__m256)v);
#endif
  return __builtin_convertvector(v, DoubleVec);
}
template <class A>
inline Narrow<A> narrowed(DoubleVec v) {
#ifdef POSMLP_AVX512
  if constexpr (std::is_same_v<A, float>) return (Narrow<A>)_mm512_maskz_cvtpd_ps(__mmask8(kAllLanes), (__m512d)v);
#endif
  return __builtin_convertvector(v, Narrow<A>);
}
template <class A>
inline void store_rounded(A* p, DoubleVec v) { store(p, narrowed<A>(v)); }
template <class A>
inline DoubleVec load_wide(const A* p) { return widened<A>(load<A, VectorOf<double>::kLanes>(p)); }
// to[k] += v[k], in double.
template <class A>
inline void add_wide(double* to, Vec<A> v) {
  store(to, load<double>(to) + widened<A>(part_of<Narrow<A>, 0>(v)));
  if constexpr (sizeof(Narrow<A>) < sizeof v) {
    to += VectorOf<double>::kLanes;
    store(to, load<double>(to) + widened<A>(part_of<Narrow<A>, 1>(v)));
  }
}
// The sum of a vector's parts, each as many numbers as a vector of doubles has.
template <class A>
inline DoubleVec sum_of_parts(Vec<A> v) {
  const DoubleVec first = widened<A>(part_of<Narrow<A>, 0>(v));
  if constexpr (sizeof(Narrow<A>) < sizeof v) return first + widened<A>(part_of<Narrow<A>, 1>(v));
  return first;
}
template <class V>
inline V fill(ElementOf<V> a) {
  return a - V{};  // a minus zero is a, bit for bit; zero plus a is not, and would cost an addition
}
// Bit k: whether a is greater than b in lane k, or one of them NaN.
template <class V>
inline uint64_t bits_where_not_within(V a, V b) {
#ifdef POSMLP_MASK_NOT_WITHIN
  if constexpr (sizeof(V) == kVectorBytes) return POSMLP_MASK_NOT_WITHIN(a, b, sizeof(ElementOf<V>));
#endif
  uint64_t bits = 0;
  for (int k = 0; k < kLanesOf<V>; ++k) bits |= uint64_t(!(a[k] <= b[k])) << k;
  return bits;
}
inline VectorOf<double>::ints lane_numbers() {
  VectorOf<double>::ints numbers;
  for (int i = 0; i < VectorOf<double>::kLanes; ++i) numbers[i] = i;
  return numbers;
}
// What an operation of two makes of all lanes, half a vector and the other, and so on.
template <class V, class Of>
inline ElementOf<V> fold(V v, const Of& of) {
  if constexpr (kLanesOf<V> == 2) {
    return of(v[0], v[1]);
  } else {
    using Half = Vec<ElementOf<V>, kLanesOf<V> / 2>;
    return fold(of(part_of<Half, 0>(v), part_of<Half, 1>(v)), of);
  }
}
template <class A>
inline double sum_lanes(Vec<A> v) {
  return fold(sum_of_parts<A>(v), [](auto a, auto b) { return a + b; });
}

// e^x to about 1 ulp: x = n ln 2 + r, a degree-6 polynomial for e^r, 2^n through the exponent's bits.
// Below the smallest normal number it returns 0: a weight that small cannot change a sum, and subnormals are slow.
template <class V, std::enable_if_t<std::is_same_v<ElementOf<V>, float>, int> = 0>
inline V exponential(V x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves n in the low bits
  constexpr float kSmallest = -87.33654f, kLargest = 88.f;
  const auto tiny = x < kSmallest;
  V y = tiny ? fill<V>(kSmallest) : x;
  y = y > kLargest ? fill<V>(kLargest) : y;
  const V shifted = y * kLog2E + kRound;
  const V n = shifted - kRound;
  const V r = (y - n * kLn2High) - n * kLn2Low;
  V p = fill<V>(1.3814534759e-3f);
  p = p * r + 8.3687463775e-3f;
  p = p * r + 4.1668392718e-2f;
  p = p * r + 1.6666521132e-1f;
  p = p * r + 4.9999994040e-1f;
  p = (p * r) * r + r + 1.f;
  const auto exponent = ((IntsOf<V>)shifted + 127) << 23;  // 2^n
  return tiny ? V{} : p * (V)exponent;
}
// The same in double, by the Taylor series to degree 13, whose next term is 4e-18 for |r| <= ln 2 / 2.
template <class V, std::enable_if_t<std::is_same_v<ElementOf<V>, double>, int> = 0>
inline V exponential(V x) {
  constexpr double kLog2E = 1.4426950408889634, kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  constexpr double kRound = 0x1.8p52, kSmallest = -708.39, kLargest = 709.;
  constexpr double kInverseFactorials[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880,
                                           1. / 40320,      1. / 5040,      1. / 720,      1. / 120,     1. / 24,
                                           1. / 6,          1. / 2,         1.,            1.};
  const auto tiny = x < kSmallest;
  V y = tiny ? fill<V>(kSmallest) : x;
  y = y > kLargest ? fill<V>(kLargest) : y;
  const V shifted = y * kLog2E + kRound;
  const V n = shifted - kRound;
  const V r = (y - n * kLn2High) - n * kLn2Low;
  const V square = r * r;
  V odd{}, even{};  // powers, in two chains at a time
  for (int k = 0; k < 14; k += 2) {
    odd = odd * square + kInverseFactorials[k];
    even = even * square + kInverseFactorials[k + 1];
  }
  const V p = odd * r + even;
  const auto exponent = ((IntsOf<V>)shifted + 1023) << 52;  // 2^n
  return tiny ? V{} : p * (V)exponent;
}
