// The gradient of a relative table, without that of P.
//
// Equation: P(i, j) = scale(i) * weight(j - i), and dP(i, j) = dU(i) . X1(j), a sum over columns. With dU scaled like its
// rows of P, and Y as the product leaves it, unscaled, the table's gradient is
//   dR(d) = sum over i of dU(i) . X1(i + d)                                             without a softmax,
//   dR(d) = weight(d) * sum over i of (dU(i) . X1(i + d) - scale(i) * dU(i) . Y(i))     under one,
// where i and i + d are tokens of the window: a correlation, of which a softmax takes off what all keys have in common.
//
// So there is no dP, which would go through the second-level cache with every panel, and nothing is transposed or folded: tiles
// of both panels are correlated (cpu_correlate.h).
//
// Three correlations in the place of four: let E(d) be the sum over pairs of even rows of tokens, d rows apart, and O(d)
// that over odd ones. Of rows an odd number apart one is even, and it comes first or second. Both kinds of pairs are among those
// of sums of two rows, v(t) = dU(2t - 1) + dU(2t) and w(t) = X1(2t) + X1(2t + 1): the sum over v(t) and w(t + k) is what is
// wanted for 2k + 1, and E(2k) and O(2k + 2), which are there anyway. It has half as many pairs.
// Flops: 2 for each pair of tokens and column, but where no displacement of two tiles has a weight that counts; half of them
// for rows an odd number apart.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

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

struct TableGradientBuffers {
  std::vector<double> sums, odd;  // odd: over pairs of odd rows, where they are apart from even ones
  std::vector<Pairs> pairs;       // of each two tiles of a row, by displacement of rows
  std::vector<char> thirds;       // by displacement of rows
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
    constexpr int64_t kSomeRows = 4;
    if (!kTilesKeepToRows || !weights_.shared() || window().cls.box[2] < kLeastRows) return false;
    return is_line() ? window().cls.box[2] % tiles_of_row() == 0 : rows() >= kSomeRows;
  }

  // For the weights' group and windows. Rows and tiles meet where a displacement has a weight that counts. Without a
  // softmax a gradient does not depend on its weight.
  void begin() {
    const int64_t size = shape_.table_size() + VectorOf<A>::kLanes;
    b_.sums.assign(size, 0.);
    meetings_.clear();
    thirds_.clear();
    table_ = shape_.table_view();
    least_ = call_.softmax ? weights_.limit() : -std::numeric_limits<double>::infinity();
    if (is_line()) return meet_in_line();
    find_pairs();
    find_thirds();
    for_each_two_tiles([&](int64_t both, const Tile& queries, const Tile& keys) {
      const Pairs* const pairs = &b_.pairs[both * displacements()];
      for_each_displacement([&](int64_t n, int64_t d0, int64_t d1) {
        if (pairs[n] != kNoPairs) meet(queries, keys, n, d0, d1, pairs[n]);
      });
    });
    if (!thirds_.empty()) b_.odd.assign(size, 0.);
  }

  // A panel's X1 [tokens, kPanel], while it is in the first-level cache. `room` is for two panels, until the panel's `add`.
  void begin_panel(const A* x1, A* room) {
    x1_ = x1;
    sums_ = room;
    if (!thirds_.empty()) add_up_rows(x1, 0, sums_);
  }
  // The panel's part, given dU.
  void add(const A* du, int64_t columns) {
    const int64_t vectors = divide_up(columns, int64_t(VectorOf<A>::kLanes));
    for (const Meeting& meeting : meetings_)
      meeting.correlate(du, x1_, meeting.pairs, vectors, &(meeting.odd ? b_.odd : b_.sums)[meeting.entry]);
    if (thirds_.empty()) return;
    const A* const keys = sums_;
    A* const queries = sums_ + box()[0] * plane_of_sums();
    add_up_rows(du, -1, queries);
    for (const Meeting& meeting : thirds_)
      meeting.correlate(queries, keys, meeting.pairs, vectors, &b_.sums[meeting.entry]);
  }

  // Adds the gradient, given the sums of dU * Y.
  void add_to(int64_t part, const RowSums<A>& dots) {
    const int64_t size = shape_.table_size();
    A* to = static_cast<A*>(call_.dtable_parts) + part * size;
    if (!thirds_.empty()) join_thirds();
    if (!call_.softmax) {
      for (int64_t e = 0; e < size; ++e) to[e] += A(b_.sums[e]);
      return;
    }
    // Each query's part goes to the entries of all its keys: in the table's mirror image those of which it is in the box.
    const int64_t *place = window().place.data(), room = size + weights_.box_reach();
    b_.shares.values.assign(room + 2 * kDoubles, 0.);
    dots.for_each(window().tokens, [&](int64_t i, double dot) {
      b_.shares.values[weights_.centre() + place[i] - place[0]] = weights_.scale()[i] * dot;
    });
    const double* const shares = weights_.sum_boxes(room, b_.shares);
    for (int64_t e = 0; e < size; ++e) {
      const double weight = weights_.weight()[e];
      to[e] += A(weight <= least_ ? 0 : weight * (b_.sums[e] - shares[size - 1 - e]));
    }
  }

 private:
  static constexpr int64_t kPanel = kPanelOf<A>;

  // Tiles whose displacement is the same.
  struct Meeting {
    TilePairs pairs;
    int64_t entry;  // of the table: that of the last query and the first key
    Correlate<A> correlate;
    bool odd;  // whether of odd rows alone
  };

  const Window& window() const { return weights_.window(); }
  const int64_t* box() const { return window().cls.box; }
  int64_t rows() const { return box()[0] * box()[1]; }
  bool is_line() const { return rows() == 1; }
  int64_t tiles_of_row() const { return int64_t(window().tiles.size()) / rows(); }

  // ---- displacements of rows of tokens, by planes and rows ----

  // Their numbers, which have room at both ends of a plane's.
  int64_t displacements() const { return (2 * box()[0] - 1) * (2 * box()[1] + 1); }
  template <class Work>
  void for_each_displacement(const Work& work) const {
    int64_t n = 0;
    for (int64_t d0 = 1 - box()[0]; d0 < box()[0]; ++d0, n += 2)
      for (int64_t d1 = 1 - box()[1]; d1 < box()[1]; ++d1) work(++n, d0, d1);
  }
  template <class Work>
  void for_each_two_tiles(const Work& work) const {
    const Tile* const tiles = window().tiles.data();  // the first ones are the first row's
    const int64_t count = tiles_of_row();
    for (int64_t both = 0; both < count * count; ++both) work(both, tiles[both / count], tiles[both % count]);
  }
  // The table's entry for the last query and the first key of two tiles.
  int64_t entry_of(const Tile& queries, const Tile& keys, int64_t d0, int64_t d1) const {
    return weights_.centre() + d0 * table_.map[0] + d1 * table_.map[1] + keys.first - (queries.last - 1);
  }
  // Which pairs of two tiles have weights that count.
  Pairs pairs_of(const Tile& queries, const Tile& keys, int64_t entry) const {
    const int64_t count = queries.rows() + keys.rows() - 1;
    uint64_t bits = 0;  // one for each displacement that counts
    for (int64_t i = 0; i < count; i += kDoubles)
      bits |= bits_where_not_within(load<double>(weights_.weight() + entry + i), fill<DoubleVec>(least_)) << i;
    bits &= (uint64_t(1) << count) - 1;
    if (bits == 0) return kNoPairs;
    const uint64_t own = uint64_t(1) << (queries.rows() - 1);  // of a query and the key that is as far along
    return bits < 2 * own ? kKeysBefore : bits % own == 0 ? kKeysAfter : kAllPairs;
  }
  // Those of all tiles. Where no row is so far away nothing is missing.
  void find_pairs() {
    const int64_t tiles = tiles_of_row() * tiles_of_row();
    b_.pairs.assign(tiles * displacements(), kAllPairs);
    for_each_two_tiles([&](int64_t both, const Tile& queries, const Tile& keys) {
      Pairs* const pairs = &b_.pairs[both * displacements()];
      for_each_displacement([&](int64_t n, int64_t d0, int64_t d1) {
        pairs[n] = pairs_of(queries, keys, entry_of(queries, keys, d0, d1));
      });
    });
  }

  // ---- rows an odd number apart, by sums of two ----

  // Those displacements whose pairs all come one row nearer and one farther too. Few rows are not worth it, and sums over
  // few columns are so exact by themselves that the difference would show.
  void find_thirds() {
    constexpr int64_t kManyColumns = 192;
    const bool apply = box()[1] >= kManyRows && window().columns >= kManyColumns && weights_.alike();
    b_.thirds.assign(displacements(), apply);
    if (!apply) return;
    for_each_displacement([&](int64_t n, int64_t, int64_t d1) { b_.thirds[n] &= char(d1 & 1); });
    for (size_t at = 0; at < b_.pairs.size(); at += displacements())
      for_each_displacement([&](int64_t n, int64_t, int64_t) {
        const Pairs *const pairs = &b_.pairs[at + n], own = pairs[0];
        const auto come = [=](Pairs others) { return others == kAllPairs || others == own; };
        b_.thirds[n] &= char(own == kNoPairs || (come(pairs[-1]) && come(pairs[1])));
      });
    for (int64_t n = 0; n < displacements(); n += 2 * box()[1] + 1) b_.thirds[n] = b_.thirds[n + 2 * box()[1]] = false;
  }
  int64_t plane_of_sums() const { return (box()[1] / 2 + 1) * box()[2] * kPanel; }
  // Of each plane rows 2t + first and 2t + first + 1, as far as there are any.
  void add_up_rows(const A* from, int64_t first, A* to) const {
    const int64_t rows = box()[1], size = box()[2] * kPanel;
    for (int64_t plane = 0; plane < box()[0]; ++plane, from += rows * size)
      for (int64_t row = first; row < first + 2 * (rows / 2 + 1); row += 2, to += size)
        for (int64_t c = 0; c < size; c += VectorOf<A>::kLanes) {
          const Vec<A> one = row >= 0 && row < rows ? load<A>(from + row * size + c) : Vec<A>{};
          store(to + c, row + 1 < rows ? one + load<A>(from + (row + 1) * size + c) : one);
        }
  }
  // Takes off what pairs of sums have besides, and adds up what was apart.
  void join_thirds() {
    const Tile all = {0, box()[2]};
    for_each_displacement([&](int64_t n, int64_t d0, int64_t d1) {
      if (!b_.thirds[n]) return;
      double* const sums = &b_.sums[entry_of(all, all, d0, d1)];
      const double* const odd = &b_.odd[entry_of(all, all, d0, d1)];
      for (int64_t e = 0; e < 2 * all.last - 1; ++e) {
        if (d1 - 1 > -box()[1]) sums[e] -= sums[e - table_.map[1]];
        if (d1 + 1 < box()[1]) sums[e] -= odd[e + table_.map[1]];
      }
    });
    for (size_t e = 0; e < b_.sums.size(); ++e) b_.sums[e] += b_.odd[e];
  }

  // ---- meetings ----

  void meet(const Tile& queries, const Tile& keys, int64_t n, int64_t d0, int64_t d1, Pairs pairs) {
    const int64_t entry = entry_of(queries, keys, d0, d1), row = box()[2] * kPanel;
    const Correlate<A> correlate = correlate_for<A>(queries.rows(), keys.rows(), pairs);
    // The first row of either tile, how many there are, and how far apart.
    const auto add = [&](std::vector<Meeting>& to, int64_t query_row, int64_t key_row, int64_t rows, int64_t step,
                         int64_t plane, bool odd) {
      if (rows == 0) return;
      Meeting& meeting = to.emplace_back();
      meeting.pairs = {std::max<int64_t>(0, -d0) * plane + query_row * row + queries.first * kPanel,
                       std::max<int64_t>(0, d0) * plane + key_row * row + keys.first * kPanel,
                       box()[0] - std::abs(d0), rows, plane, step * row};
      meeting.entry = entry;
      meeting.correlate = correlate;
      meeting.odd = odd;
    };
    const int64_t first = std::max<int64_t>(0, -d1), count = box()[1] - std::abs(d1), plane = box()[1] * row;
    if (b_.thirds[n]) {
      const int64_t k = (d1 - 1) / 2, own = std::max<int64_t>(0, -k);
      const int64_t query_rows = box()[1] / 2 + 1, key_rows = divide_up(box()[1], int64_t(2));
      add(thirds_, own, own + k, std::min(query_rows, key_rows - k) - own, 1, plane_of_sums(), false);
    } else if (b_.thirds[n - 1] || b_.thirds[n + 1]) {
      add(meetings_, first, first + d1, divide_up(count, int64_t(2)), 2, plane, false);
      add(meetings_, first + 1, first + 1 + d1, count / 2, 2, plane, true);
    } else {
      add(meetings_, first, first + d1, count, 1, plane, false);
    }
  }

  void meet_in_line() {
    const Tile* const tiles = window().tiles.data();
    const int64_t count = tiles_of_row();
    for (int64_t d2 = 1 - count; d2 < count; ++d2) {
      const Tile &queries = tiles[std::max<int64_t>(0, -d2)], &keys = tiles[std::max<int64_t>(0, d2)];
      const int64_t entry = entry_of(queries, keys, 0, 0);
      const Pairs pairs = pairs_of(queries, keys, entry);
      if (pairs == kNoPairs) continue;
      const TilePairs of_line = {queries.first * kPanel, keys.first * kPanel, 1, count - std::abs(d2), 0,
                                 queries.rows() * kPanel};
      meetings_.push_back({of_line, entry, correlate_for<A>(queries.rows(), keys.rows(), pairs), false});
    }
  }

  const Call& call_;
  const Shape& shape_;
  const Weights<A>& weights_;
  TableGradientBuffers& b_;
  std::vector<Meeting> meetings_, thirds_;  // of rows, and of sums of rows
  const A* x1_ = nullptr;  // of the panel at hand,
  A* sums_ = nullptr;      // and sums of its rows
  View table_;
  double least_ = 0;  // what a weight must exceed to count
};
