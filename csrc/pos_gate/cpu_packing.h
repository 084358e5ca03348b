// P as the products read it: runs of steps whose weights lie side by side.
//
// Tiles of queries whose tokens lie side by side find their weights in the table itself, or its mirror image, and need no
// copy of them; other tiles have weights of their own.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class A>
struct PackingBuffers {
  std::vector<double> entries;
  std::vector<A> peak, low_peak, most_peak, mirrored_limit;
};

// E: what the products multiply.
template <class A, class E>
class Packing {
 public:
  Packing(const Call& call, const Weights<A>& weights, PackingBuffers<A>& buffers)
      : table_size_(call.shape.table_size()), weights_(weights), b_(buffers) {}

  template <bool kRows>
  void pack(Packed<E>& packed) {
    const int64_t* const place = window().place.data();
    packed.weights.clear();
    if (weights_.shared()) share_table<kRows>(packed);
    const size_t shared = packed.weights.size();
    // Where all weights are taken, their runs in the table depend on the window alone: those that are there may do.
    all_ = weights_.shared() && weights_.takes_all();
    if (all_ && packed.complete == weights_.sizes_of_window()) return;
    packed.clear();
    if (weights_.shared() && !all_) find_peaks();
    if (!kRows && !all_) {
      const int64_t tokens = window().tokens;
      b_.mirrored_limit.resize(tokens + kLanes);
      std::reverse_copy(weights_.limit(), weights_.limit() + tokens, b_.mirrored_limit.begin());
    }
    for (const Tile& tile : window().tiles) {
      if (weights_.shared() && place[tile.last - 1] == place[tile.first] + tile.rows() - 1)
        all_ ? pack_whole<kRows>(packed, tile) : pack_shared<kRows>(packed, tile);
      else
        pack_tile<kRows>(packed, tile);
      if (!packed.has_steps()) add_zeros(packed);
      packed.end_tile();
    }
    if (all_ && packed.weights.size() == shared) packed.complete = weights_.sizes_of_window();
  }

 private:
  static constexpr int64_t kDepth = kDepthOf<E>;
  static constexpr int kLanes = VectorOf<A>::kLanes;

  const Window& window() const { return weights_.window(); }

  // Whether to find the steps of a tile's first or last rows: not where few panels use them, nor in small windows, where
  // there are few. A panel of large ones lies in the second-level cache, which had better be read once and in order. What
  // an image gives must not depend on the others of its batch: the order of its sums does on this.
  bool pays_to_split() const {
    constexpr int64_t kFewTokens = 64;
    const int64_t tokens = window().tokens;
    return few_of(kTileRows) > 0 && kDepth == 1 && tokens > kFewTokens && tokens <= kMostSteps &&
           window().image_columns >= 2 * kPanelOf<A>;
  }

  // The table, for tiles whose tokens lie side by side along the last dimension: their weights do so too, in the table's
  // mirror image for queries, in the table itself for keys. Of a pair the second is that of the next token, one before.
  template <bool kRows>
  void share_table(Packed<E>& packed) {
    const int64_t size = table_size_, shared = round_up(size, kDoubles) + kDoubles;
    const double* weight = weights_.weight();
    make_room(b_.entries, 1 + size);
    double* entries = b_.entries.data() + 1;  // behind a zero
    entries[-1] = 0;
    if (kRows)
      std::reverse_copy(weight, weight + size, entries);
    else
      std::copy(weight, weight + size, entries);
    packed.weights.resize(shared);
    for (int64_t e = 0; e < shared; e += kDoubles)
      store_operands(&packed.weights[e], load<double>(entries + e), load<double>(entries + e - 1));
  }

  // The largest |entry| among as many from each one on as a tile has rows, or a lower one, or all but a few of them.
  void find_peaks() {
    const int64_t size = table_size_, rows = window().tiles.back().rows();  // no tile is higher
    const double* const entries = b_.entries.data() + 1;
    b_.peak.assign(size + kLanes + kTileRows, A(0));  // vectors begin up to a tile's rows late
    for (int64_t e = 0; e < size; ++e)                // NaN is to be seen
      b_.peak[e] = A(entries[e] == entries[e] ? std::abs(entries[e]) : std::numeric_limits<double>::infinity());
    const int64_t few = pays_to_split() ? few_of(rows) : 0;
    const int64_t most = few > 0 ? rows - few : 1, low = std::max<int64_t>(most, rows - 1);
    if (few > 0) {
      widen_peaks(b_.peak, 1, most);
      b_.most_peak = b_.peak;
    }
    widen_peaks(b_.peak, most, low);
    b_.low_peak = b_.peak;
    widen_peaks(b_.peak, low, rows);
  }

  // Each is the largest of `reach` entries from there on, and becomes the largest of `wanted`.
  static void widen_peaks(std::vector<A>& peaks, int64_t reach, int64_t wanted) {
    A* const peak = peaks.data();
    for (int64_t step; reach < wanted; reach += step) {
      step = std::min(reach, wanted - reach);  // runs may overlap
      for (int64_t e = 0; e + step < int64_t(peaks.size()); ++e) peak[e] = std::max(peak[e], peak[e + step]);
    }
  }

  // A tile that finds its weights in the shared table and takes all of them.
  template <bool kRows>
  void pack_whole(Packed<E>& packed, const Tile& tile) const {
    const int64_t *place = window().place.data(), length = window().cls.box[2];
    const int64_t origin = weights_.centre() + place[tile.first];
    int64_t done = 0;  // steps
    for (int64_t row = 0, end = length; row < window().tokens; row = end, end += length)
      for (int64_t from = row, count; from < end; from += count) {
        count = std::min<int64_t>(kMostSteps, end - from);
        if constexpr (kDepth > 1)
          add_pairs<kRows>(packed, tile, row, from, from + count, done);
        else
          packed.add(origin - place[from], from * kPanelOf<A>, count, -1);
      }
  }

  // Another one that finds its weights there. Of each row of the tokens that are summed over, or each 64 of them, it takes
  // what lies between the first and the last that count.
  template <bool kRows>
  void pack_shared(Packed<E>& packed, const Tile& tile) const {
    const int64_t *place = window().place.data(), length = window().cls.box[2], tokens = window().tokens;
    const int64_t origin = weights_.centre() + place[tile.first], few = pays_to_split() ? few_of(tile.rows()) : 0;
    const bool highest = tile.rows() == window().tiles.back().rows();
    const A* const peak = (few > 0 ? b_.most_peak : highest ? b_.peak : b_.low_peak).data() + origin;
    const A *const limit = weights_.limit(), *const mirrored_limit = b_.mirrored_limit.data() + (kRows ? 0 : tokens);
    const auto least = fill<Vec<A>>(*std::min_element(limit + tile.first, limit + tile.last));
    auto runs = packed.make_room(divide_up(length, 64) * (tokens / length));
    int64_t done = 0;  // steps
    for (int64_t row = 0, end = length; row < tokens; row = end, end += length)
      for (int64_t begin = row, count; begin < end; begin += count) {
        count = std::min<int64_t>(64, end - begin);
        // A bit for each, the last token's first: whether any row counts but the last few, any but the first few, any at
        // all. No branches: where runs end no processor foresees.
        const int64_t next = begin + count, entry = -place[next - 1];
        uint64_t not_last = 0, not_first = 0;
        for (int64_t i = 0; i < count; i += kLanes) {
          const auto limits = kRows ? least : load<A>(mirrored_limit - next + i);
          not_last |= bits_of(load<A>(peak + entry + i) > limits) << i;
          if (few > 0) not_first |= bits_of(load<A>(peak + entry + few + i) > limits) << i;
        }
        not_last &= ~uint64_t(0) >> (64 - count);
        not_first = few > 0 ? not_first & ~uint64_t(0) >> (64 - count) : not_last;
        const uint64_t counts = not_first | not_last;
        if (counts == 0) continue;
        const int64_t from = next - 64 + __builtin_clzll(counts), to = next - __builtin_ctzll(counts);
        if constexpr (kDepth > 1) {
          add_pairs<kRows>(packed, tile, row, from, to, done);
        } else {
          // For the first rows alone until others count too, for the last rows alone once no others do.
          const int64_t at = origin + entry + next - 1;  // the row's entries lie side by side
          if (few == 0) {
            runs.add(kAllRows, at - from, from * kPanelOf<A>, to - from);
            continue;
          }
          const int64_t all_begin = not_first ? next - 64 + __builtin_clzll(not_first) : to;
          const int64_t all_end = std::max(all_begin, not_last ? next - __builtin_ctzll(not_last) : from);
          runs.add(kAllRows, at - all_begin, all_begin * kPanelOf<A>, all_end - all_begin);
          runs.add(kFirstRows, at - from, from * kPanelOf<A>, all_begin - from);
          runs.add(kLastRows, at - all_end, all_end * kPanelOf<A>, to - all_end);
        }
      }
    if constexpr (kDepth == 1) packed.take(runs);
  }

  // Pairs of tokens of a row, from where counts to where; a pair of which one lies in another row has weights of its own.
  template <bool kRows>
  void add_pairs(Packed<E>& packed, const Tile& tile, int64_t row, int64_t from, int64_t to, int64_t& done) const {
    const int64_t *place = window().place.data(), origin = weights_.centre() + place[tile.first];
    const int64_t last = divide_up(to, kDepth), inner = std::min(last, (row + window().cls.box[2]) / kDepth);
    int64_t step = std::max(from / kDepth, done);
    if (step < divide_up(row, kDepth)) add_step<kRows>(packed, tile, step++);
    if (step < inner) packed.add(origin - place[step * kDepth], step * kPanelOf<A>, inner - step, -kDepth);
    if (inner < last) add_step<kRows>(packed, tile, inner);
    done = last;
  }

  template <bool kRows>
  void pack_tile(Packed<E>& packed, const Tile& tile) const {
    for (int64_t step = 0; step * kDepth < window().tokens; ++step) add_step<kRows>(packed, tile, step);
  }

  // A tile without a weight that counts.
  static void add_zeros(Packed<E>& packed) {
    packed.add(int64_t(packed.weights.size()), 0, 1, 0);
    packed.weights.insert(packed.weights.end(), kTileRows, E{});
  }

  // Adds a step with weights of its own, unless none is to be taken or the tile has it already.
  template <bool kRows>
  void add_step(Packed<E>& packed, const Tile& tile, int64_t step) const {
    const int32_t row = int32_t(step * kPanelOf<A>);
    Run* const run = packed.last_run();
    if (run && run->row + (run->count - 1) * kPanelOf<A> == row) return;
    E weights[kTileRows] = {};
    bool counts = all_;
    for (int64_t r = 0; r < tile.rows(); ++r) {
      double pair[2] = {0, 0};
      for (int64_t d = 0; d < std::min(kDepth, window().tokens - step * kDepth); ++d) {
        const int64_t i = kRows ? tile.first + r : step * kDepth + d;
        const int64_t j = kRows ? step * kDepth + d : tile.first + r;
        pair[d] = weights_.weight_of(i, j);
        counts |= !(std::abs(pair[d]) <= double(weights_.limit()[i]));
      }
      weights[r] = operand<E>(pair[0], pair[1]);
    }
    if (!counts) return;
    const int64_t at = int64_t(packed.weights.size());
    packed.weights.insert(packed.weights.end(), weights, weights + kTileRows);
    const bool follows = run && run->stride == kTileRows && run->count < kMostSteps &&
                         run->at + run->count * kTileRows == at && run->row + run->count * kPanelOf<A> == row;
    if (follows)
      packed.lengthen();
    else
      packed.add(at, row, 1, kTileRows);
  }

  const int64_t table_size_;
  const Weights<A>& weights_;
  PackingBuffers<A>& b_;
  bool all_ = false;  // whether to take all weights of the group at hand
};
