// P as the products read it: runs of steps whose weights lie side by side.
//
// Tiles whose tokens lie side by side in the table find their weights in the table itself, or in its mirror image, and need
// no copy of them. What such a tile takes of a row of tokens depends only on how many rows and planes that lies away from
// the tile's own: it is found once for all tiles above each other. Other tiles have weights of their own.
//
// Three products in the place of four: rows of tokens 2t and 2t + 1, twins, have nearly the same weights, one row shifted. Let
// R(d) be what a row takes of one that is d rows before it, x0 and x1 the even and the odd rows of the panel, y0 and y1 those of
// the product, and C(d) = R(d + 1) - R(d):
//   m(t)  = sum over s of R(2 (t - s)) (x0(s) + x1(s)), what both have in common,
//   y0(t) = sum over s of R(2 (t - s)) x0(s) + R(2 (t - s) - 1) x1(s) = m(t) - sum over s of C(2 (t - s) - 1) x1(s),
//   y1(t) = sum over s of R(2 (t - s) + 1) x0(s) + R(2 (t - s)) x1(s) = m(t) + sum over s of C(2 (t - s)) x0(s).
// All three sums are half as long as one over all rows. They round less, too, as long as m, which is large, is added last.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class A, class E>
struct PackingBuffers {
  std::vector<double> entries;
  std::vector<A> rounded;
  std::vector<typename Packed<E>::Mark> marks;
  struct Stretch {
    int32_t from, to;
  };
  std::vector<Stretch> stretches;
  std::vector<int32_t> begins;
  // Tiles above each other, number `across` in rows of tokens first to last, whose limit is the same. What they take
  // of rows of tokens is number `base` and those that follow.
  struct Stack {
    int64_t across, first, last, base;
    A limit;
  };
  std::vector<Stack> stacks;
};

// E: what the products multiply.
template <class A, class E>
class Packing {
 public:
  Packing(const Call& call, const Weights<A>& weights, PackingBuffers<A, E>& buffers)
      : table_size_(call.shape.table_size()), weights_(weights), b_(buffers) {}

  template <bool kRows>
  void pack(Packed<E>& packed) {
    packed.weights.clear();
    const bool twins = has_twins();
    all_ = weights_.shared() && weights_.takes_all();
    if (weights_.shared()) share_table<kRows>(packed);
    if (twins) subtract_rows(packed);
    const size_t shared = packed.weights.size();
    // Where all weights are taken, their runs in the table depend on the window alone: those that are there may do.
    if (all_ && packed.complete == weights_.sizes_of_window() && packed.has_twins == twins) return;
    packed.clear();
    packed.has_twins = twins;
    together_ = twins ? 2 : 1;
    if (weights_.shared() && length() >= kLeastRows) {
      across_ = int64_t(window().tiles.size()) * length() / window().tokens;
      stack_tiles(kRows && window().cls.box[0] == 1 && weights_.has_levels());
      if constexpr (kDepth > 1)
        pack_pairs<kRows>(packed);
      else
        twins ? pack_twins(packed) : pack_runs(packed);
    } else {
      for (const Tile& tile : window().tiles) {
        const Mark begin = packed.mark();
        for (int64_t step = 0; step * kDepth < window().tokens; ++step) add_step<kRows>(packed, tile, step);
        end_tile(packed, begin, packed.mark(), 0);
      }
    }
    packed.finish();
    if (all_ && packed.weights.size() == shared) packed.complete = weights_.sizes_of_window();
  }

 private:
  using Mark = typename Packed<E>::Mark;
  static constexpr int64_t kDepth = kDepthOf<E>;
  static constexpr int kLanes = VectorOf<A>::kLanes;
  static_assert(kTilesKeepToRows);

  const Window& window() const { return weights_.window(); }
  int64_t length() const { return window().cls.box[2]; }  // of a row of tokens

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
    const int64_t size = table_size_, shared = round_up(size, kLanes) + kLanes;
    const auto copy = [=](const auto* from, auto* to) {
      std::fill(kRows ? std::reverse_copy(from, from + size, to) : std::copy(from, from + size, to), to + shared, 0);
    };
    packed.weights.resize(shared);
    if constexpr (kDepth == 1) return copy(weights_.rounded(), packed.weights.data());
    b_.entries.resize(1 + shared);
    double* const entries = b_.entries.data() + 1;  // behind a zero
    entries[-1] = 0;
    copy(weights_.weight(), entries);
    b_.rounded.resize(shared);
    for (int64_t e = 0; e < shared; e += kDoubles) {
      store_operands(&packed.weights[e], load<double>(entries + e), load<double>(entries + e - 1));
      store_rounded(&b_.rounded[e], load<double>(entries + e));
    }
  }

  // ---- twins ----

  // Not where weights or sums of twins are of different orders, which would cost digits.
  bool has_twins() const {
    const int64_t* const box = window().cls.box;
    return kDepth == 1 && box[0] == 1 && box[1] >= kManyRows && box[1] % 2 == 0 && length() >= kLeastRows &&
           weights_.alike() && !weights_.has_levels() && weights_.is_smooth();
  }
  // Behind the table what each entry lacks of the one a row of tokens on. Those that do not count are zeros from now on, so that
  // they are missing in all three products or in none.
  void subtract_rows(Packed<E>& packed) const {
    if constexpr (kDepth == 1) {
      const int64_t size = int64_t(packed.weights.size()), row = weights_.row_stride();
      packed.weights.resize(2 * size);
      A *const weights = packed.weights.data(), limit = all_ ? A(0) : weights_.limit();
      for (int64_t e = 0; e < size; ++e) weights[e] = weights[e] <= limit ? A(0) : weights[e];
      A* const differences = weights + size;
#pragma GCC ivdep
      for (int64_t e = 0; e < size - row; ++e) differences[e] = weights[e + row] - weights[e];
    }
  }

  // ---- what tiles above each other have in common ----

  using Stack = typename PackingBuffers<A, E>::Stack;

  // Tiles above each other are a stack; by levels, those that follow each other on the same one.
  void stack_tiles(bool by_levels) {
    const int64_t *const box = window().cls.box, rows = box[1];
    b_.stacks.clear();
    int64_t base = 0;
    for (int64_t t = 0; t < across_; ++t)
      for (int64_t first = 0, last; first < rows; first = last + 1) {
        const auto level_of = [&](int64_t row) {
          const Tile& tile = tile_of(row, t);
          return by_levels ? weights_.level(tile.first, tile.last) : 0;
        };
        const int level = level_of(first);
        for (last = first; last + 1 < rows && level_of(last + 1) == level;) ++last;
        b_.stacks.push_back({t, first, last, base, together_ > 1 ? A(0) : weights_.limit(level)});
        base += (2 * box[0] - 1) * displacements(b_.stacks.back());
      }
  }
  const Tile& tile_of(int64_t row, int64_t across) const { return window().tiles[row * across_ + across]; }
  int64_t displacements(const Stack& stack) const {  // in a plane
    return (window().cls.box[1] + stack.last - stack.first) / together_;
  }

  // Calls `work` for each stack and each displacement of a row of tokens from its tiles', by planes and rows; of twins from the
  // first one of two rows.
  template <class Work>
  void for_each_displacement(const Work& work) const {
    const int64_t* const box = window().cls.box;
    for (const Stack& stack : b_.stacks)
      for (int64_t d0 = 1 - box[0]; d0 < box[0]; ++d0)
        for (int64_t d1 = together_ - 1 - stack.last; d1 < box[1] - stack.first; d1 += together_) work(stack, d0, d1);
  }
  // Calls `work(tile, i0, i1, stack, first)` for each tile of a row (i0, i1) of tokens, of twins the first one. `first` is the
  // number of the displacement of the first row of tokens; the others of the plane follow, and the next plane's are
  // displacements(stack) farther on.
  template <class Work>
  void for_each_tile(const Work& work) const {
    const int64_t* const box = window().cls.box;
    for (int64_t i0 = 0; i0 < box[0]; ++i0)
      for (int64_t i1 = 0; i1 < box[1]; i1 += together_) for_each_tile(i0, i1, work);
  }
  template <class Work>
  void for_each_tile(int64_t i0, int64_t i1, const Work& work) const {  // of one row
    const int64_t* const box = window().cls.box;
    for (const Stack& stack : b_.stacks)
      if (stack.first <= i1 && i1 <= stack.last)
        work(tile_of(i0 * box[1] + i1, stack.across), i0, i1, stack,
             stack.base + (box[0] - 1 - i0) * displacements(stack) + (stack.last - i1) / together_);
  }

  // Of a row of tokens, counted from the first one of the tile's row, calls `use(at, from, all_from, all_to, to)` for what
  // lies between the first and the last step that count, of each 64. From all_from to all_to others count than the tile's
  // first few rows or its last few ones. A step's weights are at `at - step`.
  template <class Use>
  void for_each_stretch(const A* entries, const Stack& stack, int64_t d0, int64_t d1, const Use& use) const {
    const int64_t *box = window().cls.box, *place = window().place.data();
    const int64_t own = std::max<int64_t>(0, -d0) * box[1] + std::max(stack.first, -d1);  // a row that has another so far away
    const Tile& tile = tile_of(own, stack.across);
    const Vec<A> limit = fill<Vec<A>>(stack.limit);
    const auto counting = [=](const A* from) { return bits_where_not_within(magnitude(load<A>(from)), limit); };
    const int64_t rows = tile.rows(), few = pays_to_split() ? few_of(rows) : 0;
    const int64_t begin = (d0 * box[1] + d1) * length(), end = begin + length();
    const int64_t at = weights_.centre() + place[tile.first] - place[own * length() + begin] + begin;
    for (int64_t first = begin, count; first < end; first += count) {
      count = std::min<int64_t>(64, end - first);
      // A bit for each step, the last one's first: whether any row counts but the last few, or any but the first few. No
      // branches: where stretches end no processor foresees.
      const int64_t next = first + count;
      uint64_t not_last = 0, not_first = 0;
      for (int64_t i = 0; i < count; i += kLanes) {
        const A* const from = entries + at - (next - 1) + i;
        uint64_t last = 0, bits = 0;
        for (int64_t r = 0; r < few; ++r) last |= counting(from + r);
        for (int64_t r = few; r < rows - few; ++r) bits |= counting(from + r);
        last |= bits;
        for (int64_t r = rows - few; r < rows; ++r) bits |= counting(from + r);
        not_last |= last << i;
        not_first |= bits << i;
      }
      const uint64_t all = all_ ? ~uint64_t(0) : 0, steps = ~uint64_t(0) >> (64 - count);
      not_last = (not_last | all) & steps;
      not_first = (not_first | all) & steps;
      const uint64_t counts = not_first | not_last;
      if (counts == 0) continue;
      const int64_t from = next - 64 + __builtin_clzll(counts), to = next - __builtin_ctzll(counts);
      // For the first rows alone until others count too, for the last rows alone once no others do.
      const int64_t all_from = not_first ? next - 64 + __builtin_clzll(not_first) : to;
      const int64_t all_to = std::max(all_from, not_last ? next - __builtin_ctzll(not_last) : from);
      use(at, from, all_from, all_to, to);
    }
  }

  // For each displacement, some rows farther, the runs whose entries count, and a mark where they begin. Weights are in an array
  // behind the table.
  void find_runs(Packed<E>& packed, int64_t array, int64_t farther) {
    for_each_displacement([&](const Stack& stack, int64_t d0, int64_t d1) {
      b_.marks.push_back(packed.mark());
      packed.make_room(divide_up(length(), 64));
      const auto add = [&](Rows rows, int64_t at, int64_t from, int64_t to) {
        packed.add(rows, array + at - from, from * kPanelOf<A>, to - from, -1);
      };
      const auto add_all = [&](int64_t at, int64_t from, int64_t all_from, int64_t all_to, int64_t to) {
        add(kAllRows, at, all_from, all_to);
        add(kFirstRows, at, from, all_from);
        add(kLastRows, at, all_to, to);
      };
      for_each_stretch(packed.weights.data() + array, stack, d0, d1 + farther, add_all);
    });
    b_.marks.push_back(packed.mark());
  }

  // The tiles of sums of two rows of tokens, and then, for the first and the second row of each two, those of odd and even ones.
  void pack_twins(Packed<E>& packed) {
    b_.marks.clear();
    const int64_t rows = window().cls.box[1], behind = int64_t(packed.weights.size()) / 2;
    find_runs(packed, 0, 0);
    const int64_t count = int64_t(b_.marks.size());
    find_runs(packed, behind, 1);
    find_runs(packed, behind, 0);
    const int64_t row = length() * kPanelOf<A>;
    for_each_tile([&](const Tile&, int64_t, int64_t i1, const Stack&, int64_t first) {
      end_tile(packed, b_.marks[first], b_.marks[first + rows / 2], i1 * row, row);
    });
    for (int64_t i1 = 0; i1 < rows; ++i1)
      for_each_tile(0, i1 / 2 * 2, [&](const Tile&, int64_t, int64_t even, const Stack&, int64_t first) {
        const Mark* const marks = &b_.marks[first + (i1 % 2 ? 2 * count : count)];
        end_tile(packed, marks[0], marks[rows / 2], even * row);
      });
  }

  void pack_runs(Packed<E>& packed) {
    const int64_t planes = window().cls.box[0], rows = window().cls.box[1];
    b_.marks.clear();
    find_runs(packed, 0, 0);
    for_each_tile([&](const Tile&, int64_t i0, int64_t i1, const Stack& stack, int64_t first) {
      const Mark* marks = &b_.marks[first];
      const int64_t row = (i0 * rows + i1) * length() * kPanelOf<A>;
      if (planes == 1) return end_tile(packed, marks[0], marks[rows], row);
      const Mark begin = packed.mark();
      for (int64_t j0 = 0; j0 < planes; ++j0, marks += displacements(stack)) packed.repeat(marks[0], marks[rows]);
      end_tile(packed, begin, packed.mark(), row);
    });
  }

  // Pairs of tokens may lie in two rows: they begin where those of all tokens before do.
  template <bool kRows>
  void pack_pairs(Packed<E>& packed) {
    b_.stretches.clear();
    b_.begins.clear();
    for_each_displacement([&](const Stack& stack, int64_t d0, int64_t d1) {
      b_.begins.push_back(int32_t(b_.stretches.size()));
      for_each_stretch(b_.rounded.data(), stack, d0, d1, [&](int64_t, int64_t from, int64_t, int64_t, int64_t to) {
        b_.stretches.push_back({int32_t(from), int32_t(to)});
      });
    });
    b_.begins.push_back(int32_t(b_.stretches.size()));
    for_each_tile([&](const Tile& tile, int64_t i0, int64_t i1, const Stack& stack, int64_t first) {
      const int64_t *box = window().cls.box, own = (i0 * box[1] + i1) * length();
      const Mark begin = packed.mark();
      int64_t done = 0;  // steps
      for (int64_t j0 = 0; j0 < box[0]; ++j0)
        for (int64_t j1 = 0; j1 < box[1]; ++j1) {
          const int32_t* const begins = &b_.begins[first + j0 * displacements(stack) + j1];
          for (int32_t k = begins[0]; k < begins[1]; ++k)
            add_pairs<kRows>(packed, tile, (j0 * box[1] + j1) * length(), own + b_.stretches[k].from,
                             own + b_.stretches[k].to, done);
        }
      end_tile(packed, begin, packed.mark(), 0);
    });
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

  // A tile must have a step: without a weight that counts it is one of zeros.
  static void end_tile(Packed<E>& packed, Mark begin, Mark end, int64_t row, int64_t twin = 0) {
    if (begin.steps == end.steps) {
      begin = packed.mark();
      packed.add(int64_t(packed.weights.size()), 0, 1, 0);
      packed.weights.insert(packed.weights.end(), kTileRows, E{});
      end = packed.mark();
      row = 0;
    }
    packed.end_tile(begin, end, row, twin);
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
        counts |= !(std::abs(pair[d]) <= double(weights_.limit()));
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
  PackingBuffers<A, E>& b_;
  int64_t across_ = 1;    // tiles in a row of tokens
  int64_t together_ = 1;  // rows of tokens whose tiles have runs in common
  bool all_ = false;      // whether to take all weights of the group at hand
};
