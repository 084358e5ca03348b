// Products of P or its transpose with a panel, tile by tile, while the cache lines that are wanted next are asked for.
//
// What becomes of a tile, the way out, is the gate's. It is best done with the sums still in registers, which takes a panel
// that lies in the maps by whole vectors or simple parts of them (cpu_seats.h). Others go piece by piece, out of a tile in memory.
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

  // Tiles [kTileRows, kPanel]: the one at hand, and the one before it. What the products of twin rows have in common, [length of a
  // row, kPanel] and room for a tile. And room for a panel of pairs.
  A *y = nullptr, *done = nullptr, *common = nullptr;
  E* factor = nullptr;

  // The panel that is multiplied, whichever it is then, and what is asked for meanwhile.
  Products(const Panel& panel, Wanted& wanted) : panel_(panel), wanted_(wanted) {}

  // How many lines all products of a panel may ask for at an even pace.
  static int64_t asks(const Window& window) {
    return kAsksOfFew * int64_t(window.tiles.size()) * steps_of(window);
  }

  // The product of packed weights and a panel, tile by tile, while the wanted rows of the tile's tokens are asked for.
  // `finish(piece, from, to)` takes a tile from `done` after the next one's product: by then the rows are there, and what
  // lies across two vectors of the product can be read without waiting for its stores. `finish_rows(tile)` comes after that.
  template <class Finish, class FinishRows = void (*)(const Tile&)>
  void multiply_panel(const Window& window, const Packed<E>& weights, const A* panel, Finish&& finish,
                      FinishRows&& finish_rows = [](const Tile&) {}) {
    const E* operands = operands_of_rows<E>(panel, window.tokens, kPanel, factor);
    if constexpr (kStepsAtOnce > 1) {  // the last steps' zeros, where a larger window may have left anything
      const int64_t steps = steps_of(window);
      std::fill(factor + steps * kPanel, factor + round_up(steps, kStepsAtOnce) * kPanel, E{});
    }
    const auto finish_tile = [&](const Tile& tile) {
      for (const Piece& piece : panel_.pieces) finish(piece, tile.first, tile.last);
      finish_rows(tile);
    };
    const size_t before = twin_tiles(window, weights);
    for (size_t i = 0; i < window.tiles.size(); ++i) {
      const Tile& tile = window.tiles[i];
      if (before > 0) multiply_twins(window, weights, panel, i);
      wanted_.begin_tile(tile, weights.runs_of(before + i).steps);
      multiply(kernel_for<A*>(window, weights, tile), weights, before + i, operands, y, wanted_);
      wanted_.end_tile();
      if (before > 0) {
        const Common common = common_of(window, tile);
        for (int64_t k = 0; k < tile.rows() * kPanel; ++k) y[k] = common.sums[k] + common.sign * y[k];
      }
      if (i > 0) finish_tile(window.tiles[i - 1]);
      std::swap(y, done);
    }
    finish_tile(window.tiles.back());
  }

  // That for a panel with seats, whose sums go where they belong straight from the registers: `way_out(tile)` is what
  // multiply_tile calls. By then the rows must be there, so that they are asked for a tile ahead, and those of the first tile
  // while the last one of another product is multiplied.
  template <class WayOut>
  void multiply_through(const Window& window, const Packed<E>& weights, const A* panel, const WayOut& way_out) {
    if constexpr (kMayHaveTwins)
      if (const size_t before = twin_tiles(window, weights))
        return multiply_tiles(window, weights, before, panel, [&](const Tile& tile) {
          return [=, out = way_out(tile), common = common_of(window, tile)](int64_t k, int v, Vec<A> y) mutable
              __attribute__((always_inline)) {
            out(k, v, load<A>(common.sums + k * kPanel + v * VectorOf<A>::kLanes) + common.sign * y);
          };
        });
    multiply_tiles(window, weights, 0, panel, way_out);
  }
  // Whether to do so: where no sum is one of short sums, and no tile lower than the products'.
  bool passes_through(const Window& window, const Packed<E>& weights) const {
    return panel_.seating != Seating::none && weights.most_steps <= kMostSteps && window.tiles.front().rows() >= kLeastRows;
  }

 private:
  template <class WayOut>
  void multiply_tiles(const Window& window, const Packed<E>& weights, size_t before, const A* panel, const WayOut& way_out) {
    using Out = decltype(way_out(window.tiles[0]));
    const size_t count = window.tiles.size(), ahead = before > 0 ? 2 : 1;
    for (size_t i = 0; i < count; ++i) {
      const Tile& tile = window.tiles[i];
      if (before > 0) multiply_twins(window, weights, panel, i);
      const TileRuns& runs = weights.runs_of(before + i);
      wanted_.begin_tile(window.tiles[(i + ahead) % count], runs.steps, i + ahead >= count);
      kernel_for<Out>(window, weights, tile)(runs, weights.weights.data(), panel + runs.row, way_out(tile), wanted_);
      wanted_.end_tile();
    }
  }

  // ---- twins, as cpu_packing.h says ----

  struct Common {
    const A* sums;
    A sign;
  };
  // Of a tile's product.
  Common common_of(const Window& window, const Tile& tile) const {
    const int64_t length = window.cls.box[2];
    return {common + tile.first % length * kPanel, A(tile.first / length % 2 ? 1 : -1)};
  }
  // How many tiles are of sums of twin rows; the others come after them.
  static size_t twin_tiles(const Window& window, const Packed<E>& weights) {
    return weights.has_twins ? window.tiles.size() / 2 : 0;
  }
  // What the products of two rows of tokens have in common, if the first tile of them is next.
  void multiply_twins(const Window& window, const Packed<E>& weights, const A* panel, size_t next) {
    if constexpr (kMayHaveTwins) {
      const size_t across = window.tiles.size() / window.cls.box[1];
      if (next % (2 * across) > 0) return;
      for (size_t t = 0; t < across; ++t) {
        const size_t i = next / 2 + t;
        wanted_.begin_twins({window.tiles[2 * i].first, window.tiles[2 * i + 1].last}, weights.runs_of(i).steps);
        const Tile& tile = window.tiles[next + t];
        multiply(kernel_for<A*, true>(window, weights, tile), weights, i, panel, common + tile.first % window.cls.box[2] * kPanel, wanted_);
        wanted_.end_tile();
      }
    }
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
