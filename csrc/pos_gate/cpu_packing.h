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
    const int64_t tokens = window().tokens, *place = window().place.data();
    packed.clear();
    packed.weights.clear();
    if (weights_.shared()) share_table<kRows>(packed);
    if (!kRows) {
      b_.mirrored_limit.resize(tokens + kLanes);
      std::reverse_copy(weights_.limit(), weights_.limit() + tokens, b_.mirrored_limit.begin());
    }
    for (const Tile& tile : window().tiles) {
      if (weights_.shared() && place[tile.last - 1] == place[tile.first] + tile.rows() - 1)
        pack_shared<kRows>(packed, tile);
      else
        pack_tile<kRows>(packed, tile);
      if (!packed.has_tile()) add_zeros(packed);
      packed.end_tile();
    }
  }

 private:
  static constexpr int64_t kDepth = kDepthOf<E>;
  static constexpr int kLanes = VectorOf<A>::kLanes;

  const Window& window() const { return weights_.window(); }

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
    find_peaks(entries, size);
  }

  // The largest |entry| among as many from each one on as a tile has rows, or a lower one.
  void find_peaks(const double* entries, int64_t size) {
    b_.peak.assign(size + kLanes + kTileRows, A(0));  // vectors begin up to a tile's rows late
    for (int64_t e = 0; e < size; ++e)                // NaN is to be seen
      b_.peak[e] = A(entries[e] == entries[e] ? std::abs(entries[e]) : std::numeric_limits<double>::infinity());
    const int64_t rows = window().tiles.back().rows();  // no tile is higher
    const int64_t most = rows - few_of(rows), low = std::max<int64_t>(1, rows - 1);
    if (most < low) {
      widen_peaks(b_.peak, 1, most);
      b_.most_peak = b_.peak;
    }
    widen_peaks(b_.peak, most < low ? most : 1, low);
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

  // A tile that finds its weights in the shared table. Of each row of the tokens that are summed over, or each 64 of them,
  // it takes what lies between the first and the last that count: for its first rows until others count too, from where
  // none but its last rows count for these.
  template <bool kRows>
  void pack_shared(Packed<E>& packed, const Tile& tile) const {
    const int64_t *place = window().place.data(), length = window().cls.box[2], tokens = window().tokens;
    const int64_t origin = weights_.centre() + place[tile.first];
    // Small windows have little that only few rows want. A panel of large ones lies in the second-level cache, which had
    // better be read once and in order.
    const int64_t few = tokens > 64 && divide_up(tokens, kDepth) <= kMostSteps ? few_of(tile.rows()) : 0;
    const A* const peak = (tile.rows() == window().tiles.back().rows() ? b_.peak : b_.low_peak).data() + origin;
    const A* const most_peak = few > 0 ? b_.most_peak.data() + origin : nullptr;
    const A *const limit = weights_.limit(), *const mirrored_limit = b_.mirrored_limit.data() + (kRows ? 0 : tokens);
    const auto least = fill<Vec<A>>(*std::min_element(limit + tile.first, limit + tile.last));
    int64_t done = 0;  // steps
    for (int64_t row = 0, end = length; row < tokens; row = end, end += length)
      for (int64_t begin = row, count; begin < end; begin += count) {
        count = std::min<int64_t>(64, end - begin);
        // A bit for each, the last token's first: whether any row counts, any but the first ones, any but the last ones.
        // No branches: where runs end no processor foresees.
        const int64_t first = begin + count;
        uint64_t counts = 0, not_first = 0, not_last = 0;
        for (int64_t i = 0; i < count; i += kLanes) {
          const auto limits = kRows ? least : load<A>(mirrored_limit - first + i);
          const int64_t entry = i - place[first - 1];
          counts |= bits_of(load<A>(peak + entry) > limits) << i;
          if (few == 0) continue;
          not_first |= bits_of(load<A>(most_peak + entry + few) > limits) << i;
          not_last |= bits_of(load<A>(most_peak + entry) > limits) << i;
        }
        counts &= ~uint64_t(0) >> (64 - count);
        if (counts == 0) continue;
        const auto first_of = [=](uint64_t bits) { return first - 64 + __builtin_clzll(bits); };
        const auto end_of = [=](uint64_t bits) { return first - __builtin_ctzll(bits); };
        const int64_t from = first_of(counts), to = end_of(counts);
        const int64_t last = divide_up(to, kDepth);
        int64_t step = std::max(from / kDepth, done);
        // A pair of which one lies in another row has weights of its own.
        if (kDepth > 1 && step < divide_up(row, kDepth)) add_step<kRows>(packed, tile, step++);
        const int64_t inner = std::max(step, std::min(last, end / kDepth));
        not_first = few > 0 ? not_first & counts : counts;
        not_last = few > 0 ? not_last & counts : counts;
        const int64_t all_begin = not_first ? std::clamp(first_of(not_first) / kDepth, step, inner) : inner;
        const int64_t all_end = not_last ? std::clamp(divide_up(end_of(not_last), kDepth), all_begin, inner) : all_begin;
        const auto add = [&](Rows rows, int64_t begin, int64_t end) {
          if (begin < end) packed.add(rows, origin - place[begin * kDepth], begin * kPanelOf<A>, end - begin, -kDepth);
        };
        add(kFirstRows, step, all_begin);
        add(kAllRows, all_begin, all_end);
        add(kLastRows, all_end, inner);
        if (kDepth > 1 && inner < last) add_step<kRows>(packed, tile, inner);
        done = last;
      }
  }

  template <bool kRows>
  void pack_tile(Packed<E>& packed, const Tile& tile) const {
    for (int64_t step = 0; step * kDepth < window().tokens; ++step) add_step<kRows>(packed, tile, step);
  }

  // A tile without a weight that counts.
  static void add_zeros(Packed<E>& packed) {
    packed.add(kAllRows, int64_t(packed.weights.size()), 0, 1, 0);
    packed.weights.insert(packed.weights.end(), kTileRows, E{});
  }

  // Adds a step with weights of its own, unless none counts or the tile has it already.
  template <bool kRows>
  void add_step(Packed<E>& packed, const Tile& tile, int64_t step) const {
    const int32_t row = int32_t(step * kPanelOf<A>);
    Run* const run = packed.last_of_tile();
    if (run && run->row + (run->count - 1) * kPanelOf<A> == row) return;
    E weights[kTileRows] = {};
    bool counts = false;
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
      ++run->count;
    else
      packed.add(kAllRows, at, row, 1, kTileRows);
  }

  const int64_t table_size_;
  const Weights<A>& weights_;
  PackingBuffers<A>& b_;
};
