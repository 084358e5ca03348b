// The three matrix products of the gate, as register tiles.
//
// A tile of up to kTileRows x (kTileVectors vectors) of the result stays in registers while the sum runs: per step it
// loads kTileVectors vectors, broadcasts a value for each row, and issues their product of fused multiply-adds. With
// AVX-512 that is 7 x 3: 21 accumulators, 10 loads for 21 multiply-adds, and neither windows of 7 and 14 nor groups of 12,
// 24, 32 or 48 channels leave a remainder. With AVX2 it is 4 x 3 and 3 x 3, which together make 7. A sum's order is that
// of its steps, so results do not depend on how the work is cut.
//
// Near the end of what a tile's rows reach, few of them have a weight that counts. Where that are its first or its last
// three, a step takes but these, 9 multiply-adds instead of 21, after those of all rows.
//
// What is multiplied are numbers of the accumulation type or, where the processor multiplies bfloat16, pairs of it: two
// numbers that follow each other in the sum, here called a step, in the place of one.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class T>
struct OperandOf {
  using type = typename AccumulationOf<T>::type;
};
#ifdef POSMLP_BF16_DOT
struct Pair {
  uint16_t first, second;
};
template <>
struct OperandOf<Bfloat16> {
  using type = Pair;
};
#endif
template <class E>
constexpr int kDepthOf = std::is_floating_point_v<E> ? 1 : 2;  // numbers in a step

// A vector of operands, and sum + weight * operands for one weight.
template <class E>
struct Operands {
  Vec<E> values;
  Operands() = default;
  explicit Operands(const E* p) : values(load<E>(p)) {}
  __attribute__((always_inline)) Vec<E> times(E weight, Vec<E> sum) const { return sum + weight * values; }
};
#ifdef POSMLP_BF16_DOT
// bfloat16's bits in words of 32, and the pairs (first[i], second[i]).
template <class V, class Words = typename Lanes<kLanesOf<V>>::words>
inline Words rounded_bits(V v) {
  const auto single = __builtin_convertvector(v, typename Lanes<kLanesOf<V>>::floats);
  typename Lanes<kLanesOf<V>>::halves rounded;
  narrow<kLanesOf<V>>(reinterpret_cast<const float*>(&single), reinterpret_cast<Bfloat16*>(&rounded));
  return __builtin_convertvector(rounded, Words);
}
template <class V>
inline void store_pairs(Pair* to, V first, V second) {
  const auto pairs = rounded_bits(first) | rounded_bits(second) << 16;
  __builtin_memcpy(to, &pairs, sizeof pairs);
}

inline void store_pairs(Pair* to, Vec<float> first, Vec<float> second) {
  const auto halves = (Lanes<32>::halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);  // one behind the other
  constexpr Lanes<32>::halves kOrder = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_permutexvar_epi16((__m512i)kOrder, (__m512i)halves);
  __builtin_memcpy(to, &pairs, sizeof pairs);
}

template <>
struct Operands<Pair> {
  __m512bh values;
  Operands() = default;
  explicit Operands(const Pair* p) { __builtin_memcpy(&values, p, sizeof values); }
  __attribute__((always_inline)) Vec<float> times(Pair weight, Vec<float> sum) const {
    int32_t bits;
    __builtin_memcpy(&bits, &weight, sizeof bits);
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), values);
  }
};
#endif

// One step's weight, or a vector of them, out of doubles; without pairs the second ones do not matter.
template <class E>
inline E operand(double first, double second) {
  E rounded;
  if constexpr (kDepthOf<E> == 1) {
    rounded = E(first);
  } else {
    Bfloat16 halves[2];
    narrow(float(first), halves[0]);
    narrow(float(second), halves[1]);
    __builtin_memcpy(&rounded, halves, sizeof rounded);
  }
  return rounded;
}
template <class E>
inline void store_operands(E* to, DoubleVec first, DoubleVec second) {
  if constexpr (kDepthOf<E> == 1)
    store_rounded(to, first);
  else
    store_pairs(to, first, second);
}

#ifdef POSMLP_AMX
constexpr int kStepsAtOnce = 16;  // of one instruction; where a sum has fewer, zeros
#else
constexpr int kStepsAtOnce = 1;
#endif

#ifdef POSMLP_AMX
#include "cpu_gemm_amx.h"  // multiply_tile and add_outer_tile by other instructions
#else
// sum[r, :] = sum over the steps of some runs, of all rows unless kSplit, of weight[r] * from[row, :], whose rows are of
// kPanel, of which kVectors vectors count and, if kHalf, half of the next. `out` is where the sums go, in rows of kPanel too,
// or what is called with each row of them, `out(row, sums)`. Meanwhile the wanted cache lines are asked for.
// If kTwins, what is multiplied are sums of a row and the one that is runs.twin numbers on.
// Loops over registers are unrolled early: otherwise the sums leave them from one kind of rows to the next.
template <class A, class E, int kAsks, bool kSplit, bool kTwins, int kRows, int kVectors, bool kHalf, class Out>
__attribute__((noinline)) void multiply_tile(const TileRuns& runs, const E* all_weights, const E* from, const Out& out,
                                             Wanted& wanted) {
  // There are not registers enough for what only the ends of runs want. GCC would keep that in vector registers, and what comes
  // from there waits behind all multiplications in line: the end of a run is then foreseen wrongly for long. So it is in memory.
  struct {
    const TileRuns* runs;
    const E *weights, *from;
    const Out* out;
    Wanted* wanted;
  } given{&runs, all_weights, from, &out, &wanted};
  POSMLP_IN_MEMORY(given);
  constexpr int kLanes = VectorOf<A>::kLanes, kPanel = kTileVectors * kLanes, kFew = kSplit ? few_of(kRows) : 0;
  Vec<A> sums[kRows][kVectors];
  Vec<A, kLanes / 2> halves[kRows];
  POSMLP_UNROLL for (int r = 0; r < kRows; ++r) {
    POSMLP_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = Vec<A>{};
    if (kHalf) halves[r] = Vec<A, kLanes / 2>{};
  }
  [[maybe_unused]] const int64_t twin = given.runs->twin;
  Wanted::Queue queue = given.wanted->queue;
  const auto has = [&](Rows rows) { return given.runs->of[rows].begin < given.runs->of[rows].end; };
  const auto add = [&](Rows rows, auto first, auto last) __attribute__((always_inline)) {
    constexpr int kFirst = first, kLast = last;
    const Run* run = given.runs->of[rows].begin;
    do {
      const E *operands = given.from + run->row, *weights = given.weights + run->at;
      const int64_t stride = run->stride;
      int32_t steps = run->count;
      if constexpr (!kStepsAsk) queue.ask_for_run(steps);
      do {
        if constexpr (kStepsAsk)
          for (int i = 0; i < kAsks; ++i) queue.ask<(kAsks > 1)>();
        Operands<E> vectors[kVectors];
        POSMLP_UNROLL for (int v = 0; v < kVectors; ++v) {
          vectors[v] = Operands<E>(operands + v * kLanes);
          if constexpr (kTwins) vectors[v].values += load<E>(operands + twin + v * kLanes);
          if (kLast - kFirst < kRows) POSMLP_KEEP(vectors[v].values);  // for three rows GCC reads it three times
        }
        POSMLP_UNROLL for (int r = kFirst; r < kLast; ++r)
          POSMLP_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = vectors[v].times(weights[r], sums[r][v]);
        if constexpr (kHalf) {
          auto half = load<E, kLanes / 2>(operands + kVectors * kLanes);
          if constexpr (kTwins) half += load<E, kLanes / 2>(operands + twin + kVectors * kLanes);
          POSMLP_UNROLL for (int r = kFirst; r < kLast; ++r) halves[r] += weights[r] * half;
        }
        operands += kPanel;
        weights += stride;
      } while (--steps > 0);
      POSMLP_IN_MEMORY(given);
    } while (++run < given.runs->of[rows].end);
  };
  constexpr std::integral_constant<int, 0> none;
  constexpr std::integral_constant<int, kRows> all;
  if (!kSplit || has(kAllRows)) add(kAllRows, none, all);
  if constexpr (kFew > 0) {
    if (has(kFirstRows)) add(kFirstRows, none, std::integral_constant<int, kFew>());
    if (has(kLastRows)) add(kLastRows, std::integral_constant<int, kRows - kFew>(), all);
  }
  given.wanted->queue = queue;
  Out way_out = *given.out;  // a copy, which compilers know that no store changes
  POSMLP_UNROLL for (int r = 0; r < kRows; ++r) {
    if constexpr (std::is_pointer_v<Out>) {
      POSMLP_UNROLL for (int v = 0; v < kVectors; ++v) store(way_out + r * kPanel + v * kLanes, sums[r][v]);
      if (kHalf) store(way_out + r * kPanel + kVectors * kLanes, halves[r]);
    } else {
      way_out(r, sums[r]);
    }
  }
}
#endif

// That for a tile's rows, and as many vectors as the columns take. Half a vector is half the work where AVX-512 is done
// in halves.
template <class E, class Out>
using Multiply = void (*)(const TileRuns&, const E*, const E*, const Out&, Wanted&);
template <class A, class E, class Out, int kAsks, bool kSplit, bool kTwins, int kRows = kTileRows>
inline Multiply<E, Out> multiply_for(int64_t rows, int64_t columns) {
  if constexpr (kRows > kLeastRows)
    if (rows < kRows) return multiply_for<A, E, Out, kAsks, kSplit, kTwins, kRows - 1>(rows, columns);
  constexpr int64_t kLanes = VectorOf<A>::kLanes;
  constexpr bool kHalves = kVectorBytes == 64 && kDepthOf<E> == 1;
  const int64_t vectors = divide_up(columns, kLanes);
  const bool half = kHalves && (columns - 1) % kLanes < kLanes / 2;
  if constexpr (std::is_pointer_v<Out>) {  // anything else takes full panels
    if (vectors == 3 && half) return multiply_tile<A, E, kAsks, kSplit, kTwins, kRows, 2, kHalves, Out>;
    if (vectors == 2 && half) return multiply_tile<A, E, kAsks, kSplit, kTwins, kRows, 1, kHalves, Out>;
    if (vectors == 2) return multiply_tile<A, E, kAsks, kSplit, kTwins, kRows, 2, false, Out>;
    if (vectors == 1) return multiply_tile<A, E, kAsks, kSplit, kTwins, kRows, 1, false, Out>;
  }
  return multiply_tile<A, E, kAsks, kSplit, kTwins, kRows, 3, false, Out>;
}
static_assert(kTileVectors == 3);

// A tile of the product. Where a sum has many steps it is one of short sums, which rounds less than a long one.
template <class A, class E>
inline void multiply(Multiply<E, A*> multiply_runs, const Packed<E>& packed, int64_t tile, const E* from, A* to,
                     Wanted& wanted) {
  const TileRuns& runs = packed.runs_of(tile);
  const E* const weights = packed.weights.data();
  from += runs.row;
  if (packed.most_steps <= kMostSteps) return multiply_runs(runs, weights, from, to, wanted);
  constexpr int64_t kTile = kTileRows * kPanelOf<A>;
  A sums[kTile] = {};
  const auto& all = runs.of[kAllRows];  // the only ones where windows are so large
  for (const Run* run = all.begin; run < all.end;) {
    TileRuns part = runs;
    part.of[kFirstRows] = part.of[kLastRows] = {};
    part.of[kAllRows].begin = run;
    const bool first = run == all.begin;
    int64_t steps = run++->count;
    while (run < all.end && steps + run->count <= kMostSteps) steps += run++->count;
    part.of[kAllRows].end = run;
    multiply_runs(part, weights, from, first ? to : sums, wanted);
    if (!first)
      for (int64_t i = 0; i < kTile; ++i) to[i] += sums[i];
  }
}

#ifndef POSMLP_AMX
// The outer product that is dP: to[r, at[v] + lane] += sum over columns c of left[r, c] * right[c, at[v] + lane].
// left has rows of a panel's steps and `panels` panels `left_rows` rows apart; right has a row of ld for each step; to
// has rows of ld.
template <class A, class E, int kRows, int kVectors>
__attribute__((noinline)) void add_outer_tile(const E* left, int64_t left_rows, int64_t panels, const E* right,
                                              const int32_t* at, A* to, int64_t ld) {
  constexpr int kSteps = kTileVectors * VectorOf<A>::kLanes / kDepthOf<E>;
  Vec<A> sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vec<A>{};
  for (int64_t panel = 0; panel < panels; ++panel, left += left_rows * kSteps)
    for (int64_t c = 0; c < kSteps; ++c, right += ld) {
      Operands<E> vectors[kVectors];
      for (int v = 0; v < kVectors; ++v) vectors[v] = Operands<E>(right + at[v]);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sums[r][v] = vectors[v].times(left[r * kSteps + c], sums[r][v]);
    }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      A* sum = to + r * ld + at[v];
      // Added last, not first: a sum of short sums rounds less than one long one.
      store(sum, load<A>(sum) + sums[r][v]);
    }
}
#endif

template <class A, class E, int kRows = kTileRows>
inline void add_outer(int64_t rows, const E* left, int64_t left_rows, int64_t panels, const E* right,
                      const std::vector<int32_t>& at, A* to, int64_t ld) {
  if constexpr (kRows > kLeastRows)
    if (rows < kRows) return add_outer<A, E, kRows - 1>(rows, left, left_rows, panels, right, at, to, ld);
  const int64_t count = int64_t(at.size());
  int64_t v = 0;
  for (; v + 3 <= count; v += 3) add_outer_tile<A, E, kRows, 3>(left, left_rows, panels, right, &at[v], to, ld);
  if (count - v == 2) add_outer_tile<A, E, kRows, 2>(left, left_rows, panels, right, &at[v], to, ld);
  if (count - v == 1) add_outer_tile<A, E, kRows, 1>(left, left_rows, panels, right, &at[v], to, ld);
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

// Numbers as operands of a product that sums over rows or along a row. Numbers that are operands already stay where they
// are; pairs go to `room`, which may be null otherwise.
template <class E, class A>
inline const E* operands_of_rows(const A* from, int64_t rows, int64_t count, E* room) {
  if constexpr (kDepthOf<E> == 1) {
    return from;
  } else {
    for (int64_t k = 0; k < rows; k += 2)
      for (int64_t c = 0; c < count; c += VectorOf<A>::kLanes) {
        const Vec<A> above = load<A>(from + k * count + c);
        const Vec<A> below = k + 1 < rows ? load<A>(from + (k + 1) * count + c) : Vec<A>{};
        store_pairs(room + k / 2 * count + c, above, below);
      }
    return room;
  }
}
template <class E, class A>
inline const E* operands_along_rows(const A* from, int64_t count, E* room) {
  if constexpr (kDepthOf<E> == 1) {
    return from;
  } else {
    for (int64_t i = 0; i < count; i += VectorOf<A>::kLanes)
      narrow<VectorOf<A>::kLanes>(from + i, reinterpret_cast<Bfloat16*>(room) + i);
    return room;
  }
}
