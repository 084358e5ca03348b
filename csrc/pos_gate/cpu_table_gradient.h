// The gradient of a relative table, without that of P.
//
// Equation: P(i, j) = scale(i) * weight(j - i), and dP(i, j) = dU(i) . X1(j), a sum over columns. With dU scaled like its
// rows of P, and Y as the product leaves it, unscaled, the table's gradient is
//   dR(d) = sum over i of dU(i) . X1(i + d)                                             without a softmax,
//   dR(d) = weight(d) * sum over i of (dU(i) . X1(i + d) - scale(i) * dU(i) . Y(i))     under one,
// where i and i + d are tokens of the window: a correlation, of which a softmax takes off what all keys have in common.
//
// Tiling: a queries and b keys, each side by side in a row of tokens, are only a + b - 1 displacements apart: of 7 and 7
// there are 49 products and 13 sums, a vector of columns each. These stay in registers over all pairs of tiles that lie as
// far apart. So there is no dP, which would go through the second-level cache with every panel, and nothing is transposed
// or folded: 14 loads for 49 multiply-adds.
// Flops: 2 for each pair of tokens and column, but where no displacement of two tiles has a weight that counts.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// For each of a window's tokens a sum over all columns: those of a panel are short, those over many panels are in double.
template <class A>
class RowSums {
 public:
  void clear(int64_t tokens) { totals_.assign(tokens * kLanes, 0.); }

  // A panel's part for the tokens from `token` on, one by one: the sum of its vectors, which are given in turn.
  class Rows {
   public:
    Rows(RowSums& sums, int64_t token) : totals_(&sums.totals_[token * kLanes]) {}

    __attribute__((always_inline)) void add(int64_t k, int vector, Vec<A> term) {
      sum_ = vector == 0 ? term : sum_ + term;
      if (vector + 1 == kTileVectors) add_wide<A>(totals_ + k * kLanes, sum_);
    }

   private:
    double* totals_;
    Vec<A> sum_{};
  };
  double of(int64_t k) const { return std::accumulate(&totals_[k * kLanes], &totals_[k * kLanes] + kLanes, 0.); }

 private:
  static constexpr int kLanes = VectorOf<A>::kLanes;
  std::vector<double> totals_;
};

// Of a panel's rows what the bias's gradient wants, the sum of dU, and what a table's does, that of dU * Y.
template <class A>
struct PanelRowSums {
  typename RowSums<A>::Rows of_du, of_products;

  __attribute__((always_inline)) void add(int64_t k, int vector, Vec<A> du, Vec<A> y) {
    of_du.add(k, vector, du);
    of_products.add(k, vector, du * y);
  }
};

// Takes its mean off each column of a panel, but where there is none that is finite. The rows of P sum to one, so that what
// all keys have in common is in each Y and counts nothing in the table's gradient; there, a difference of two sums, its
// rounding would.
template <class A>
void centre_columns(A* panel, int64_t tokens, A* means) {
  constexpr int kLanes = VectorOf<A>::kLanes;
  Vec<A> mean[kTileVectors] = {};
  for (int64_t k = 0; k < tokens; ++k)
    for (int v = 0; v < kTileVectors; ++v) mean[v] += load<A>(panel + k * kPanelOf<A> + v * kLanes);
  for (int v = 0; v < kTileVectors; ++v) {
    mean[v] /= A(tokens);
    mean[v] = mean[v] - mean[v] == 0 ? mean[v] : Vec<A>{};
    store(means + v * kLanes, mean[v]);
  }
  for (int64_t k = 0; k < tokens; ++k)
    for (int v = 0; v < kTileVectors; ++v) {
      A* const at = panel + k * kPanelOf<A> + v * kLanes;
      store(at, load<A>(at) - mean[v]);
    }
}

// The sum of each of as many vectors as one has lanes. Each of the log2(lanes) rounds interleaves the first half of them
// with the second.
template <class A, int kHalf = VectorOf<A>::kLanes / 2>
inline Vec<A> sum_of_each(Vec<A>* vectors) {
  if constexpr (kHalf > 0) {
    constexpr auto kLaneNumbers = std::make_integer_sequence<int, VectorOf<A>::kLanes>();
    for (int r = 0; r < kHalf; ++r) {
      const Vec<A> a = vectors[r], b = vectors[r + kHalf];
      vectors[r] = interleave<A, 0>(a, b, kLaneNumbers) + interleave<A, 1>(a, b, kLaneNumbers);
    }
    return sum_of_each<A, kHalf / 2>(vectors);
  }
  return vectors[0];
}

// Pairs of tiles equally far apart: where the first one's begin in two panels, and those in other rows of tokens; in a line,
// which has one row, those that follow.
struct TilePairs {
  int64_t left, right;
  int64_t planes, rows, plane_stride, row_stride;
};

// Which pairs of a query r and a key s of two tiles: all of them, or those of one direction along a row of tokens, which
// are little more than half.
enum Pairs { kAllPairs, kKeysBefore, kKeysAfter };  // s <= r, s >= r

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
// For tiles of so many queries and keys, of which the pairs from one displacement up to another count, counted as above.
template <class A, int kQueries = kTileRows, int kKeys = kTileRows>
inline Correlate<A> correlate_for(int64_t queries, int64_t keys, int64_t from, int64_t to) {
  if constexpr (kQueries > kLeastRows)
    if (queries < kQueries) return correlate_for<A, kQueries - 1, kKeys>(queries, keys, from, to);
  if constexpr (kKeys > kLeastRows)
    if (keys < kKeys) return correlate_for<A, kQueries, kKeys - 1>(queries, keys, from, to);
  if constexpr (kTilesKeepToRows && few_of(std::min(kQueries, kKeys)) > 0) {  // with less to multiply, loads would decide
    if (to < kQueries) return correlate_tiles<A, kQueries, kKeys, kKeysBefore>;
    if (from >= kQueries - 1) return correlate_tiles<A, kQueries, kKeys, kKeysAfter>;
  }
  if constexpr (kTilesKeepToRows) return correlate_tiles<A, kQueries, kKeys, kAllPairs>;
  return nullptr;
}

struct TableGradientBuffers {
  std::vector<double> sums;
  BoxBuffers<double> shares;
};

template <class A>
class TableGradient {
 public:
  TableGradient(const Call& call, const Weights<A>& weights, TableGradientBuffers& buffers)
      : call_(call), shape_(call.shape), weights_(weights), b_(buffers) {}

  // Whether that is how to find it: where products read the table, by tiles that lie within rows of tokens, and where many
  // pairs of them are equally far apart.
  bool applies() const {
    constexpr int64_t kManyRows = 4;
    if (!kTilesKeepToRows || !weights_.shared() || window().cls.box[2] < kLeastRows) return false;
    return is_line() ? window().cls.box[2] % tiles_of_row() == 0 : rows() >= kManyRows;
  }

  // For the weights' group and windows. Rows and tiles meet where a displacement has a weight that counts. Without a
  // softmax a gradient does not depend on its weight.
  void begin() {
    const int64_t *box = window().cls.box, size = shape_.table_size();
    b_.sums.assign(size + VectorOf<A>::kLanes, 0.);
    meetings_.clear();
    least_ = call_.softmax ? weights_.limit() : -std::numeric_limits<double>::infinity();
    const Tile* const tiles = window().tiles.data();  // the first ones are the first row's
    const int64_t count = tiles_of_row();
    if (is_line())
      for (int64_t d2 = 1 - count; d2 < count; ++d2)
        meet(tiles[std::max<int64_t>(0, -d2)], tiles[std::max<int64_t>(0, d2)], 0, 0, count - std::abs(d2));
    else
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < count; ++j)
          for (int64_t d0 = 1 - box[0]; d0 < box[0]; ++d0)
            for (int64_t d1 = 1 - box[1]; d1 < box[1]; ++d1) meet(tiles[i], tiles[j], d0, d1, box[1] - std::abs(d1));
  }

  // A panel's part, of dU and X1 [tokens, kPanel].
  void add(const A* du, const A* x1, int64_t columns) {
    const int64_t vectors = divide_up(columns, int64_t(VectorOf<A>::kLanes));
    for (const Meeting& meeting : meetings_)
      meeting.correlate(du, x1, meeting.pairs, vectors, &b_.sums[meeting.entry]);
  }

  // Adds the gradient, given the sums of dU * Y.
  void store(int64_t part, const RowSums<A>& dots) {
    const int64_t size = shape_.table_size();
    A* to = static_cast<A*>(call_.dtable_parts) + part * size;
    if (!call_.softmax) {
      for (int64_t e = 0; e < size; ++e) to[e] += A(b_.sums[e]);
      return;
    }
    // Each query's part goes to the entries of all its keys: in the table's mirror image those of which it is in the box.
    const int64_t *place = window().place.data(), room = size + weights_.box_reach();
    b_.shares.doubled.assign(room + 2 * kDoubles, 0.);
    for (int64_t i = 0; i < window().tokens; ++i)
      b_.shares.doubled[weights_.centre() + place[i] - place[0]] = weights_.scale()[i] * dots.of(i);
    const double* const shares = weights_.sum_boxes(room, b_.shares);
    for (int64_t e = 0; e < size; ++e) {
      const double weight = weights_.weight()[e];
      to[e] += A(weight <= least_ ? 0 : weight * (b_.sums[e] - shares[size - 1 - e]));
    }
  }

 private:
  // Tiles whose displacement is the same.
  struct Meeting {
    TilePairs pairs;
    int64_t entry;  // of the table: that of the last query and the first key
    Correlate<A> correlate;
  };

  const Window& window() const { return weights_.window(); }
  int64_t rows() const { return window().cls.box[0] * window().cls.box[1]; }
  bool is_line() const { return rows() == 1; }
  int64_t tiles_of_row() const { return int64_t(window().tiles.size()) / rows(); }

  // Two tiles, and those of as many rows of a plane as there are pairs.
  void meet(const Tile& queries, const Tile& keys, int64_t d0, int64_t d1, int64_t pairs) {
    const int64_t* box = window().cls.box;
    const View table = shape_.table_view();
    const int64_t entry = weights_.centre() + d0 * table.map[0] + d1 * table.map[1] + keys.first - (queries.last - 1);
    const double* weight = weights_.weight() + entry;
    int64_t from = 0, to = queries.rows() + keys.rows() - 2;  // the first displacement that counts, and the last one
    while (from <= to && weight[from] <= least_) ++from;
    if (from > to) return;
    while (weight[to] <= least_) --to;
    constexpr int64_t kPanel = kPanelOf<A>;
    const int64_t row = box[2] * kPanel, plane = box[1] * row;
    Meeting& meeting = meetings_.emplace_back();
    meeting.pairs = {std::max<int64_t>(0, -d0) * plane + std::max<int64_t>(0, -d1) * row + queries.first * kPanel,
                     std::max<int64_t>(0, d0) * plane + std::max<int64_t>(0, d1) * row + keys.first * kPanel,
                     box[0] - std::abs(d0), pairs, plane, is_line() ? queries.rows() * kPanel : row};
    meeting.entry = entry;
    meeting.correlate = correlate_for<A>(queries.rows(), keys.rows(), from, to);
  }

  const Call& call_;
  const Shape& shape_;
  const Weights<A>& weights_;
  TableGradientBuffers& b_;
  std::vector<Meeting> meetings_;
  double least_ = 0;  // what a weight must exceed to count
};
