// Products of P or its transpose with a panel, tile by tile, while the cache lines that are wanted next are asked for.
//
// What becomes of a tile is said in cpu_way_out.h. It is best done with the sums still in registers, which takes a panel that
// lies in the maps by whole vectors or simple parts of them (cpu_seats.h). Others go piece by piece, out of a tile in memory.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class T>
class Products {
 public:
  using A = typename AccumulationOf<T>::type;
  using E = typename OperandOf<T>::type;
  static constexpr int64_t kPanel = kPanelOf<A>;
  // Whether there is code for a way out of registers: for what training and inference use.
  template <Activation kActivation>
  static constexpr bool kMayPassThrough = std::is_same_v<T, float> && std::is_same_v<E, A> &&
                                          kActivation != Activation::gelu_tanh;

  // Tiles [kTileRows, kPanel]: the one at hand, and the one before it. For a row of tokens [length, kPanel], and room for a tile,
  // what products of twins have in common. And room for a panel of pairs.
  A *y = nullptr, *done = nullptr, *common = nullptr;
  E* factor = nullptr;

  // The panel that is multiplied, whichever it is then, and what is asked for meanwhile.
  Products(const Panel& panel, Wanted& wanted) : panel_(panel), wanted_(wanted) {}

  // How many lines all products of a panel may ask for at an even pace.
  static int64_t asks(const Window& window, const Packed<E>& weights) {
    const int64_t steps = kAsksOfFew * int64_t(window.tiles.size()) * steps_of(window);
    return weights.has_twins ? steps * 3 / 4 : steps;
  }

  // The product of packed weights and a panel, and its way out, while the wanted rows of its tokens are asked for.
  template <class WayOut>
  void multiply_panel(const Window& window, const Packed<E>& weights, const A* panel, const WayOut& way_out) {
    if constexpr (kMayPassThrough<WayOut::kActivation>) {
      const auto pass = [&](auto seating) {
        multiply_through(window, weights, panel, way_out.template rows<seating>(panel_));
      };
      if (passes_through(window, weights) && with_seating<A>(panel_, pass)) return;
    }
    multiply_by_memory(window, weights, panel, way_out);
  }
  // Whether sums leave from registers: where the panel has seats, no sum is one of short sums, and no tile lower than the
  // products'.
  bool passes_through(const Window& window, const Packed<E>& weights) const {
    return panel_.seating != Seating::none && weights.most_steps <= kMostSteps && window.tiles.front().rows() >= kLeastRows;
  }

 private:
  // By way of memory. A tile is taken from `done` after the next one's product: by then the rows are there, and what lies across
  // two vectors of the product can be read without waiting for its stores.
  template <class WayOut>
  void multiply_by_memory(const Window& window, const Packed<E>& weights, const A* panel, const WayOut& way_out) {
    const E* operands = operands_of_rows<E>(panel, window.tokens, kPanel, factor);
    if constexpr (kStepsAtOnce > 1) {  // the last steps' zeros, where a larger window may have left anything
      const int64_t steps = steps_of(window);
      std::fill(factor + steps * kPanel, factor + round_up(steps, kStepsAtOnce) * kPanel, E{});
    }
    const auto finish = [&](const Tile& tile) {
      for (const Piece& piece : panel_.pieces) way_out.piece(piece, tile, done + piece.column);
      way_out.tile(tile, done);
    };
    for (Walk walk(window, weights); walk.tile < window.tiles.size(); walk.go_on()) {
      const Tile& tile = window.tiles[walk.tile];
      if (walk.at_twins()) multiply_twins(window, weights, panel, walk);
      wanted_.begin_tile(tile, weights.runs_of(walk.packed()).steps);
      multiply(kernel_for<A*>(window, weights, tile), weights, walk.packed(), operands, y, wanted_);
      wanted_.end_tile();
      if (walk.twins > 0) {
        const auto [common, sign] = common_of(window, walk);
        for (int64_t k = 0; k < tile.rows() * kPanel; ++k) y[k] = common[k] + sign * y[k];
      }
      if (walk.tile > 0) finish(window.tiles[walk.tile - 1]);
      std::swap(y, done);
    }
    finish(window.tiles.back());
  }

  // For a panel with seats, whose sums go where they belong straight from the registers: `way_out(tile)` is what multiply_tile
  // calls. By then the rows must be there, so that they are asked for a tile ahead, and those of the first tile while the last
  // one of another product is multiplied.
  template <class WayOut>
  void multiply_through(const Window& window, const Packed<E>& weights, const A* panel, const WayOut& way_out) {
    if (!weights.has_twins)
      return multiply_tiles(window, weights, panel, [&](const Walk& walk) { return way_out(window.tiles[walk.tile]); });
    multiply_tiles(window, weights, panel, [&](const Walk& walk) {
      const auto [common, sign] = common_of(window, walk);
      return [out = way_out(window.tiles[walk.tile]), common = common, sign = sign](int64_t k, PanelRow<A>& y)
          __attribute__((always_inline)) {
        POSMLP_UNROLL for (int v = 0; v < kTileVectors; ++v)
          y[v] = load<A>(common + k * kPanel + v * VectorOf<A>::kLanes) + sign * y[v];
        out(k, y);
      };
    });
  }

  // Through the tiles of a window, row of tokens by row. Where P is packed for twins (cpu_packing.h), tiles of what they have in
  // common, half as many, come before all others.
  struct Walk {
    size_t tile = 0, of_twins = 0;  // of_twins: which one of those of two rows
    const size_t across, twins;     // tiles of a row, and those of what twins have in common; zeros without

    Walk(const Window& window, const Packed<E>& weights)
        : across(weights.has_twins ? window.tiles.size() / window.cls.box[1] : 0),
          twins(weights.has_twins ? window.tiles.size() / 2 : 0) {}
    void go_on() {
      ++tile;
      of_twins = of_twins + 1 == 2 * across ? 0 : of_twins + 1;
    }
    size_t packed() const { return twins + tile; }
    bool at_twins() const { return twins > 0 && of_twins == 0; }
    bool is_odd() const { return of_twins >= across; }
  };

  template <class WayOut>
  void multiply_tiles(const Window& window, const Packed<E>& weights, const A* panel, const WayOut& way_out) {
    using Out = decltype(way_out(Walk(window, weights)));
    const size_t count = window.tiles.size(), ahead = weights.has_twins ? 2 : 1;  // twins have half as many steps
    for (Walk walk(window, weights); walk.tile < count; walk.go_on()) {
      const Tile& tile = window.tiles[walk.tile];
      if (walk.at_twins()) multiply_twins(window, weights, panel, walk);
      const TileRuns& runs = weights.runs_of(walk.packed());
      const size_t next = walk.tile + ahead;
      wanted_.begin_tile(window.tiles[next < count ? next : next - count], runs.steps, next >= count);
      kernel_for<Out>(window, weights, tile)(runs, weights.weights.data(), panel + runs.row, way_out(walk), wanted_);
      wanted_.end_tile();
    }
  }

  // What the products of two rows have in common, before the first tile of them.
  void multiply_twins(const Window& window, const Packed<E>& weights, const A* panel, Walk walk) {
    if constexpr (kMayHaveTwins)
      for (size_t i = walk.tile / 2, last = i + walk.across; i < last; ++i, walk.go_on()) {
        const Tile& tile = window.tiles[walk.tile];
        wanted_.begin_twins({window.tiles[2 * i].first, window.tiles[2 * i + 1].last}, weights.runs_of(i).steps);
        multiply(kernel_for<A*, true>(window, weights, tile), weights, i, panel, common_of(window, walk).first, wanted_);
        wanted_.end_tile();
      }
  }
  // That of a tile, and what the tile's own product is to be multiplied with before it is added.
  std::pair<A*, A> common_of(const Window& window, const Walk& walk) const {
    const Tile *const tile = &window.tiles[walk.tile], *const first = tile - walk.of_twins;
    const int64_t token = tile->first - (walk.is_odd() ? first[walk.across].first : first->first);
    return {common + token * kPanel, A(walk.is_odd() ? 1 : -1)};
  }

  static constexpr bool kMayHaveTwins = std::is_same_v<E, A>;
  static constexpr bool kMaySplit = few_of(kTileRows) > 0 && kDepthOf<E> == 1;  // runs for a tile's first or last rows
  static constexpr int kAsksOfFew = kStepsAsk ? 2 : 1;  // lines that a step may ask for where a sum has few

  static int64_t steps_of(const Window& window) { return divide_up(window.tokens, kDepthOf<E>); }  // of a whole sum

  template <class Out, bool kTwins = false>
  Multiply<E, Out> kernel_for(const Window& window, const Packed<E>& weights, const Tile& tile) const {
    // Sums of few steps have more lines to ask for than steps; otherwise two at a time get in each other's way. Windows of
    // so few are never split.
    const int64_t rows = tile.rows(), columns = panel_.columns;
    if (steps_of(window) <= 64) return multiply_for<A, E, Out, kAsksOfFew, false, kTwins>(rows, columns);
    if (weights.is_split()) return multiply_for<A, E, Out, 1, kMaySplit, kTwins>(rows, columns);
    return multiply_for<A, E, Out, 1, false, kTwins>(rows, columns);
  }

  const Panel& panel_;
  Wanted& wanted_;
};
