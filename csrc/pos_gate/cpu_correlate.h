// The correlation of two panels' tiles, which a relative table's gradient is made of.
//
// Tiling: a queries and b keys, each side by side in a row of tokens, are only a + b - 1 displacements apart: of 7 and 7
// there are 49 products and 13 sums, a vector of columns each. These stay in registers over all pairs of tiles that lie as
// far apart: 14 loads for 49 multiply-adds.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// Pairs of tiles equally far apart: where the first one's begin in two panels, and those in other rows of tokens; in a line,
// which has one row, those that follow.
struct TilePairs {
  int64_t left, right;
  int64_t planes, rows, plane_stride, row_stride;
};

// Which pairs of a query r and a key s of two tiles: none, all of them, or those of one direction along a row of tokens,
// which are little more than half.
enum Pairs : char { kNoPairs, kAllPairs, kKeysBefore, kKeysAfter };  // s <= r, s >= r

// to[s - r + kQueries - 1] += left[r, :] . right[s, :] for the queries r and keys s of two tiles, over all such pairs.
template <class A, int kQueries, int kKeys, Pairs kPairs>
__attribute__((noinline)) void correlate_tiles(const A* left, const A* right, const TilePairs& pairs, int64_t vectors,
                                               double* to) {
  constexpr int kLanes = VectorOf<A>::kLanes, kSums = kQueries + kKeys - 1, kPanel = kPanelOf<A>;
  constexpr int kBegin = kPairs == kKeysAfter ? kQueries - 1 : 0, kEnd = kPairs == kKeysBefore ? kQueries : kSums;
  // Displacements with most pairs have more sums than one, so that none waits for itself too often.
  constexpr int kShorter = std::min(kQueries, kKeys);
  constexpr bool kFew = kShorter <= 3 || kPairs != kAllPairs;  // multiplications for each load
  constexpr int kParts = kFew ? 3 : 2, kFirst = kFew ? 0 : kShorter - 2, kLast = kSums - 1 - kFirst;
  constexpr int kTogether = std::max(1, 64 / kVectorBytes);  // vectors, before sums go to the totals
  Vec<A> totals[round_up(kSums, kLanes)] = {};  // of sums so short that they round little
  left += pairs.left;
  right += pairs.right;
  for (int64_t plane = 0; plane < pairs.planes; ++plane, left += pairs.plane_stride, right += pairs.plane_stride)
    for (int64_t first = 0; first < vectors; first += kTogether) {
      Vec<A> sums[kParts][kSums] = {};
      for (int64_t v = first; v < std::min(vectors, first + kTogether); ++v) {
        const A *queries = left + v * kLanes, *keys = right + v * kLanes;
        for (int64_t row = 0; row < pairs.rows; ++row, queries += pairs.row_stride, keys += pairs.row_stride) {
          Vec<A> query[kQueries];
#pragma GCC unroll 16
          for (int r = 0; r < kQueries; ++r) query[r] = load<A>(queries + r * kPanel);
#pragma GCC unroll 16
          for (int s = 0; s < kKeys; ++s) {
            const Vec<A> key = load<A>(keys + s * kPanel);
#pragma GCC unroll 16
            for (int r = 0; r < kQueries; ++r) {
              const int sum = s - r + kQueries - 1;
              if (sum < kBegin || sum >= kEnd) continue;
              sums[sum >= kFirst && sum <= kLast ? r % kParts : 0][sum] += query[r] * key;
            }
          }
        }
      }
      for (int sum = kBegin; sum < kEnd; ++sum) {
        for (int part = 1; part < kParts; ++part) sums[0][sum] += sums[part][sum];
        totals[sum] += sums[0][sum];
      }
    }
  for (int first = 0; first < kSums; first += kLanes, to += kLanes) add_wide<A>(to, sum_of_each<A>(totals + first));
}
template <class A>
using Correlate = void (*)(const A*, const A*, const TilePairs&, int64_t, double*);
// For tiles of so many queries and keys.
template <class A, int kQueries = kTileRows, int kKeys = kTileRows>
inline Correlate<A> correlate_for(int64_t queries, int64_t keys, Pairs pairs) {
  if constexpr (kQueries > kLeastRows)
    if (queries < kQueries) return correlate_for<A, kQueries - 1, kKeys>(queries, keys, pairs);
  if constexpr (kKeys > kLeastRows)
    if (keys < kKeys) return correlate_for<A, kQueries, kKeys - 1>(queries, keys, pairs);
  if constexpr (kTilesKeepToRows && few_of(std::min(kQueries, kKeys)) > 0) {  // with less to multiply, loads would decide
    if (pairs == kKeysBefore) return correlate_tiles<A, kQueries, kKeys, kKeysBefore>;
    if (pairs == kKeysAfter) return correlate_tiles<A, kQueries, kKeys, kKeysAfter>;
  }
  if constexpr (kTilesKeepToRows) return correlate_tiles<A, kQueries, kKeys, kAllPairs>;
  return nullptr;
}
