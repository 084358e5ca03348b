// The three matrix products of the gate, as one micro-kernel: c[i, j] (+)= sum_k a(i, k) b[k, j].
//
// A tile of kTileRows x (kTileVectors vectors) of c stays in registers while k runs: per step it loads kTileVectors
// vectors of b, broadcasts kTileRows values of a, and issues their product of fused multiply-adds. With AVX-512 that is
// 7 x 3: 21 accumulators, 10 loads for 21 multiply-adds, and neither windows of 7 and 14 nor groups of 12, 24, 32 or 48
// channels leave a remainder. Sums run over k in order whatever the tile, so results do not depend on the blocking.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// How a(i, k) lies in memory: a[i * lda + k], or a[k * lda + i].
enum class Layout { rows, columns };

template <class A, int kVectors, Layout kLayout, bool kAdd>
inline void tile(const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc, int64_t depth) {
  constexpr int kLanes = VectorOf<A>::kLanes;
  Vec<A> sums[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vec<A>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load<A>(b + k * ldb + v * kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const A value = kLayout == Layout::rows ? a[r * lda + k] : a[k * lda + r];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += value * row[v];
    }
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      A* to = c + r * ldc + v * kLanes;
      // Added last, not first: a sum of short sums rounds less than one long one.
      store<A>(to, kAdd ? load<A>(to) + sums[r][v] : sums[r][v]);
    }
}

// rows is a multiple of kTileRows, columns one of the lanes. A panel of b is used by all rows before the next one.
template <class A, Layout kLayout, bool kAdd = false>
void multiply(const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc, int64_t rows, int64_t columns,
              int64_t depth) {
  constexpr int kLanes = VectorOf<A>::kLanes;
  constexpr int64_t kWidth = kTileVectors * kLanes;
  for (int64_t j = 0; j < columns; j += kWidth) {
    const int64_t vectors = std::min<int64_t>(kTileVectors, (columns - j) / kLanes);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const A* first = kLayout == Layout::rows ? a + i * lda : a + i;
      A* to = c + i * ldc + j;
      if (vectors == 3)
        tile<A, 3, kLayout, kAdd>(first, lda, b + j, ldb, to, ldc, depth);
      else if (vectors == 2)
        tile<A, 2, kLayout, kAdd>(first, lda, b + j, ldb, to, ldc, depth);
      else
        tile<A, 1, kLayout, kAdd>(first, lda, b + j, ldb, to, ldc, depth);
    }
  }
}
static_assert(kTileVectors == 3);

// a[0] b[0] a[1] b[1] ... from the first (kHalf = 0) or the second halves of two vectors.
template <class A, int kHalf, int... kIndex>
inline Vec<A> interleave(Vec<A> a, Vec<A> b, std::integer_sequence<int, kIndex...>) {
  constexpr int kLanes = VectorOf<A>::kLanes, kFirst = kHalf * kLanes / 2;
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kFirst + kIndex / 2 + kIndex % 2 * kLanes)...);
#else
  const typename VectorOf<A>::ints order = {(kFirst + kIndex / 2 + kIndex % 2 * kLanes)...};
  return __builtin_shuffle(a, b, order);
#endif
}

// to[j, i] = from[i, j] by blocks of lanes x lanes; both sizes are multiples of the lanes. Each of the log2(lanes)
// rounds interleaves the first half of the rows with the second.
template <class A>
void transpose(const A* from, int64_t ld_from, A* to, int64_t ld_to, int64_t rows, int64_t columns) {
  constexpr int kLanes = VectorOf<A>::kLanes;
  constexpr auto kLaneNumbers = std::make_integer_sequence<int, kLanes>();
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec<A> block[2][kLanes];
      for (int r = 0; r < kLanes; ++r) block[0][r] = load<A>(from + (i + r) * ld_from + j);
      int now = 0;
      for (int round = 1; round < kLanes; round *= 2, now = 1 - now)
        for (int r = 0; r < kLanes / 2; ++r) {
          const Vec<A> a = block[now][r], b = block[now][r + kLanes / 2];
          block[1 - now][2 * r] = interleave<A, 0>(a, b, kLaneNumbers);
          block[1 - now][2 * r + 1] = interleave<A, 1>(a, b, kLaneNumbers);
        }
      for (int r = 0; r < kLanes; ++r) store<A>(to + (j + r) * ld_to + i, block[now][r]);
    }
}
