// The three matrix products of the gate, as register tiles.
//
// A tile of kTileRows x (kTileVectors vectors) of the result stays in registers while the sum runs: per step it loads
// kTileVectors vectors, broadcasts kTileRows values, and issues their product of fused multiply-adds. With AVX-512 that
// is 7 x 3: 21 accumulators, 10 loads for 21 multiply-adds, and neither windows of 7 and 14 nor groups of 12, 24, 32 or
// 48 channels leave a remainder. Sums run in order, so results do not depend on how the work is cut.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// P or its transpose, cut into tiles of kTileRows rows. Only what matters is there: for each tile the columns k in which
// any of its rows has a weight worth adding, with the tile's kTileRows weights side by side.
template <class A>
struct Packed {
  std::vector<int64_t> begin;    // [tiles + 1], into `row`
  std::vector<int32_t> row;      // k * kPanel: where the multiplied panel has row k
  std::vector<A> weights;        // [entries, kTileRows], and room for a vector to stick out

  int64_t tiles() const { return int64_t(begin.size()) - 1; }
  void clear(int64_t most_entries) {
    begin.assign(1, 0);
    row.resize(most_entries);
    weights.resize(most_entries * kTileRows + 64);
  }
};

// to[r, :] = sum over the tile's entries of weight[r] * from[row, :]; both have rows of kPanel. Meanwhile the wanted cache
// lines are asked for.
template <class A, int kVectors>
__attribute__((noinline)) void multiply_tile(const Packed<A>& packed, int64_t tile, const A* from, A* to,
                                             Wanted& wanted) {
  constexpr int kLanes = VectorOf<A>::kLanes, kPanel = kTileVectors * kLanes;
  Vec<A> sums[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vec<A>{};
  const int64_t entries = packed.begin[tile + 1] - packed.begin[tile];
  const int32_t* row = packed.row.data() + packed.begin[tile];
  const A* weights = packed.weights.data() + packed.begin[tile] * kTileRows;
  int64_t e = 0;
  do {
    wanted.ask();
    const A* values = from + row[e];
    Vec<A> vectors[kVectors];
    for (int v = 0; v < kVectors; ++v) vectors[v] = load<A>(values + v * kLanes);
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] += weights[r] * vectors[v];
    weights += kTileRows;
  } while (++e < entries);
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(to + r * kPanel + v * kLanes, sums[r][v]);
  wanted.ask_for_the_rest();
}

template <class A>
inline void multiply(const Packed<A>& packed, int64_t tile, const A* from, int64_t vectors, A* to,
                     Wanted& wanted) {
  if (vectors == 3) return multiply_tile<A, 3>(packed, tile, from, to, wanted);
  if (vectors == 2) return multiply_tile<A, 2>(packed, tile, from, to, wanted);
  return multiply_tile<A, 1>(packed, tile, from, to, wanted);
}
static_assert(kTileVectors == 3);

// The outer product that is dP: to[r, at[v] + lane] += sum over columns c of left[r, c] * right[c, at[v] + lane].
// left has rows of kPanel and `panels` panels `left_step` apart; right has rows of ld; so does to.
template <class A, int kVectors>
__attribute__((noinline)) void add_outer_tile(const A* left, int64_t left_step, int64_t panels, const A* right,
                                              const int32_t* at, A* to, int64_t ld) {
  constexpr int kLanes = VectorOf<A>::kLanes, kPanel = kTileVectors * kLanes;
  Vec<A> sums[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vec<A>{};
  for (int64_t panel = 0; panel < panels; ++panel, left += left_step)
    for (int64_t c = 0; c < kPanel; ++c, right += ld) {
      Vec<A> vectors[kVectors];
      for (int v = 0; v < kVectors; ++v) vectors[v] = load<A>(right + at[v]);
      for (int r = 0; r < kTileRows; ++r)
        for (int v = 0; v < kVectors; ++v) sums[r][v] += left[r * kPanel + c] * vectors[v];
    }
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      A* sum = to + r * ld + at[v];
      // Added last, not first: a sum of short sums rounds less than one long one.
      store(sum, load<A>(sum) + sums[r][v]);
    }
}

template <class A>
inline void add_outer(const A* left, int64_t left_step, int64_t panels, const A* right, const std::vector<int32_t>& at,
                      A* to, int64_t ld) {
  const int64_t count = int64_t(at.size());
  int64_t v = 0;
  for (; v + 3 <= count; v += 3) add_outer_tile<A, 3>(left, left_step, panels, right, &at[v], to, ld);
  if (count - v == 2) add_outer_tile<A, 2>(left, left_step, panels, right, &at[v], to, ld);
  if (count - v == 1) add_outer_tile<A, 1>(left, left_step, panels, right, &at[v], to, ld);
}

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
      for (int r = 0; r < kLanes; ++r) store(to + (j + r) * ld_to + i, block[now][r]);
    }
}
