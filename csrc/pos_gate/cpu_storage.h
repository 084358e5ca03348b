// Loads and stores of the storage types. bfloat16 and float16 are 16 bits here; arithmetic is in the accumulation type.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};

// What a rounded result keeps apart from one.
template <class T>
constexpr double kEpsilonOf = double(std::numeric_limits<T>::epsilon());
template <>
constexpr double kEpsilonOf<Bfloat16> = 0x1p-7;
template <>
constexpr double kEpsilonOf<Float16> = 0x1p-10;

inline uint32_t bits_of(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float a;
  __builtin_memcpy(&a, &bits, 4);
  return a;
}

inline float widen(float a) { return a; }
inline double widen(double a) { return a; }
inline float widen(Bfloat16 a) { return float_of(uint32_t(a.bits) << 16); }
inline float widen(Float16 a) {
  const uint32_t magnitude = a.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);  // infinity and NaN
  const uint32_t subnormal = bits_of(float(int32_t(magnitude)) * 0x1p-24f);
  return float_of((magnitude < 0x0400u ? subnormal : normal) | uint32_t(a.bits & 0x8000u) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
inline void narrow(float a, float& to) { to = a; }
inline void narrow(double a, double& to) { to = a; }
inline void narrow(float a, Bfloat16& to) {
  const uint32_t bits = bits_of(a);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = uint16_t(a != a ? 0x7fc0u : rounded);
}
inline void narrow(float a, Float16& to) {
  const uint32_t bits = bits_of(a), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Normal results: rebias, round on the 13 dropped bits. Subnormal ones: let a float addition do the rounding.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = uint16_t(half | sign);
}

// 16-bit types, kLanes numbers at a time.
template <int kLanes>
struct Lanes {
  typedef float floats __attribute__((vector_size(4 * kLanes)));
  typedef uint32_t words __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t halves __attribute__((vector_size(2 * kLanes)));
};
template <int kLanes>
inline void widen(const Bfloat16* from, float* to) {
  typename Lanes<kLanes>::halves bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  const auto wide = __builtin_convertvector(bits, typename Lanes<kLanes>::words) << 16;
  __builtin_memcpy(to, &wide, sizeof wide);
}
template <int kLanes>
inline void narrow(const float* from, Bfloat16* to) {
#ifdef POSMLP_BF16_DOT
  if constexpr (kLanes == 16) {
    const auto narrowed = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
    __builtin_memcpy(to, &narrowed, sizeof narrowed);
    return;
  } else if constexpr (kLanes == 8) {
    const auto narrowed = _mm256_cvtneps_pbh(_mm256_loadu_ps(from));
    __builtin_memcpy(to, &narrowed, sizeof narrowed);
    return;
  }
#endif
  typename Lanes<kLanes>::words bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto result = (bits & 0x7fffffffu) > 0x7f800000u ? rounded * 0u + 0x7fc0u : rounded;
  const auto narrowed = __builtin_convertvector(result, typename Lanes<kLanes>::halves);
  __builtin_memcpy(to, &narrowed, sizeof narrowed);
}
template <int kLanes>
inline void widen(const Float16* from, float* to) {
#ifdef POSMLP_F16C
  if constexpr (kLanes >= 8) {
    for (int i = 0; i < kLanes; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    return;
  } else if constexpr (kLanes == 4) {
    _mm_storeu_ps(to, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    return;
  }
#endif
  for (int i = 0; i < kLanes; ++i) to[i] = widen(from[i]);
}
template <int kLanes>
inline void narrow(const float* from, Float16* to) {
#ifdef POSMLP_F16C
  if constexpr (kLanes >= 8) {
    for (int i = 0; i < kLanes; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    return;
  } else if constexpr (kLanes == 4) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtps_ph(_mm_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
  for (int i = 0; i < kLanes; ++i) narrow(from[i], to[i]);
}

// L numbers of a storage type as a vector of the accumulation type, and back.
template <class A, int L, class T>
inline Vec<A, L> load_as(const T* from) {
  if constexpr (std::is_same_v<T, A>) {
    return load<A, L>(from);
  } else {
    Vec<A, L> v;
    widen<L>(from, reinterpret_cast<float*>(&v));
    return v;
  }
}
template <class T, class V>
inline void store_as(T* to, V v) {
  if constexpr (std::is_same_v<T, ElementOf<V>>)
    store(to, v);
  else
    narrow<kLanesOf<V>>(reinterpret_cast<const float*>(&v), to);
}

// As many lanes as a constant says.
template <class A, int L, class T>
inline Vec<A, L> load_as(std::integral_constant<int, L>, const T* from) {
  return load_as<A, L>(from);
}
template <int L, class T, class V>
inline void store_as(std::integral_constant<int, L>, T* to, V v) {
  store_as(to, v);
}
#ifdef POSMLP_LANE_MASKS
// The first lanes of a vector of floats: a bit for each of them.
struct FirstLanes {
  __mmask16 mask;
};
template <class A>
inline Vec<float> load_as(FirstLanes lanes, const float* from) {
  return (Vec<float>)_mm512_maskz_loadu_ps(lanes.mask, from);
}
inline void store_as(FirstLanes lanes, float* to, Vec<float> v) { _mm512_mask_storeu_ps(to, lanes.mask, (__m512)v); }
#endif

// Calls `body(lanes, row, channel)` for `count` channels of some rows: by whole vectors, then by halves of them, so that
// nothing is done twice, or by the first lanes of one more where more than one half would be left. `lanes` is for load_as
// and store_as, of T too.
template <class A, class T, int L = VectorOf<A>::kLanes, class Body>
__attribute__((always_inline)) inline void for_each_vector(int64_t rows, int64_t count, const Body& body,
                                                           int64_t channel = 0) {
  for (; channel + L <= count; channel += L)
    for (int64_t row = 0; row < rows; ++row) body(std::integral_constant<int, L>(), row, channel);
#ifdef POSMLP_LANE_MASKS
  if constexpr (std::is_same_v<T, float> && L == 16) {
    const int64_t rest = count - channel;
    if ((rest & (rest - 1)) != 0) {
      const FirstLanes lanes{__mmask16((1 << rest) - 1)};
      for (int64_t row = 0; row < rows; ++row) body(lanes, row, channel);
      return;
    }
  }
#endif
  if constexpr (L > 1)
    if (channel < count) for_each_vector<A, T, L / 2>(rows, count, body, channel);
}
