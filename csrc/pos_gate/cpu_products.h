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

  // Tiles [kTileRows, kPanel]: the one at hand, and the one before it. And room for a panel of pairs.
  A *y = nullptr, *done = nullptr;
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
    for (size_t i = 0; i < window.tiles.size(); ++i) {
      const Tile& tile = window.tiles[i];
      wanted_.begin_tile(tile, weights.runs_of(i).steps);
      multiply(kernel_for<A*>(window, weights, tile), weights, i, operands, y, wanted_);
      wanted_.end_tile();
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
    using Out = decltype(way_out(window.tiles[0]));
    const size_t count = window.tiles.size();
    for (size_t i = 0; i < count; ++i) {
      const Tile& tile = window.tiles[i];
      const bool last = i + 1 == count;
      const TileRuns& runs = weights.runs_of(i);
      wanted_.begin_tile(window.tiles[last ? 0 : i + 1], runs.steps, last);
      kernel_for<Out>(window, weights, tile)(runs, weights.weights.data(), panel + runs.row, way_out(tile), wanted_);
      wanted_.end_tile();
    }
  }
  // Whether to do so: where no sum is one of short sums, and no tile lower than the products'.
  bool passes_through(const Window& window, const Packed<E>& weights) const {
    return panel_.seating != Seating::none && weights.most_steps <= kMostSteps && window.tiles.front().rows() >= kLeastRows;
  }

 private:
  static constexpr bool kMaySplit = few_of(kTileRows) > 0 && kDepthOf<E> == 1;  // runs for a tile's first or last rows
  static constexpr int kAsksOfFew = kStepsAsk ? 2 : 1;  // lines that a step may ask for where a sum has few

  static int64_t steps_of(const Window& window) { return divide_up(window.tokens, kDepthOf<E>); }  // of a whole sum

  template <class Out>
  Multiply<E, Out> kernel_for(const Window& window, const Packed<E>& weights, const Tile& tile) const {
    // Sums of few steps have more lines to ask for than steps; otherwise two at a time get in each other's way. Windows of
    // so few are never split.
    const int64_t rows = tile.rows(), columns = panel_.columns;
    if (steps_of(window) <= 64) return multiply_for<A, E, Out, kAsksOfFew, false>(rows, columns);
    if (weights.is_split()) return multiply_for<A, E, Out, 1, kMaySplit>(rows, columns);
    return multiply_for<A, E, Out, 1, false>(rows, columns);
  }

  const Panel& panel_;
  Wanted& wanted_;
};
