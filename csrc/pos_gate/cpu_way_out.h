// The ways of products out: what becomes of their sums, meeting what lies in the maps and going there.
//
// Each has its equation once, for vectors of any width, and two ways to apply it: to the rows of a full panel, `rows`, which
// are in registers, and to a piece of a tile in memory, `piece`, after whose last one `tile` is called. `y` is the product.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// Z = (P X1 + b) * act(X2)
template <Activation kActivate, class A, class T>
struct WayToZ {
  static constexpr Activation kActivation = kActivate;
  const Map<const T> x2;
  const Map<T> z;
  const A *scale, *bias;  // of all tokens

  template <class V>
  __attribute__((always_inline)) static V gated(V y, A scale, A bias, V x2) {
    return (y * scale + bias) * activated<kActivation>(x2);
  }

  template <Seating kSeating>
  auto rows(const Panel& panel) const {
    return [x2 = Seats<kSeating, A, const T>(x2, panel), z = Seats<kSeating, A, T>(z, panel), scale = scale,
            bias = bias](const Tile& tile) {
      const int64_t first = tile.first;
      return [x2 = x2.from(first), z = z.from(first), scale = scale + first, bias = bias + first](
                 int64_t k, const PanelRow<A>& y) __attribute__((always_inline)) {
        PanelRow<A> row;
        x2.load(k, row);
        POSMLP_UNROLL for (int v = 0; v < kTileVectors; ++v) row[v] = gated(y[v], scale[k], bias[k], row[v]);
        z.store(k, row);
      };
    };
  }
  void piece(const Piece& piece, const Tile& tile, const A* y) const {
    const auto x2_rows = x2.rows(piece, tile.first);
    const auto z_rows = z.rows(piece, tile.first);
    const A *const scales = scale + tile.first, *const biases = bias + tile.first;
    for_each_vector<A, T>(tile.rows(), piece.count, [=](auto lanes, int64_t k, int64_t c) {
      const auto sum = load_as<A>(lanes, y + k * kPanelOf<A> + c);
      store_as(lanes, z_rows(k) + c, gated(sum, scales[k], biases[k], load_as<A>(lanes, x2_rows(k) + c)));
    });
  }
  void tile(const Tile&, const A*) const {}
};

// dX2 = dZ * (P X1 + b) * act'(X2), and dU = dZ * act(X2), rows scaled, into a panel; with the sums over columns that gradients
// of parameters want.
template <Activation kActivate, class A, class T>
struct WayToX2 {
  static constexpr Activation kActivation = kActivate;
  static constexpr int64_t kPanel = kPanelOf<A>;
  const Map<const T> x2, dz;
  const Map<T> dx2;
  const A *scale, *bias;  // of all tokens
  const A* mean;          // of a panel's columns, what P X1 lacks
  A* du;                  // a panel
  RowSums<A>& bias_sums;
  RowSums<A>& dots;

  template <class V>
  struct Gradients {
    V dx2, du;
  };
  template <class V>
  __attribute__((always_inline)) static Gradients<V> gradients(V y, A scale, A bias, V mean, V x2, V dz) {
    const auto gate = activated_with_slope<kActivation>(x2);
    return {dz * (y * scale + bias + mean) * gate.slope, dz * gate.value * scale};
  }

  template <Seating kSeating>
  auto rows(const Panel& panel) const {
    return [this, x2 = Seats<kSeating, A, const T>(x2, panel), dz = Seats<kSeating, A, const T>(dz, panel),
            dx2 = Seats<kSeating, A, T>(dx2, panel)](const Tile& tile) {
      const int64_t first = tile.first;
      return [x2 = x2.from(first), dz = dz.from(first), dx2 = dx2.from(first), scale = scale + first, bias = bias + first,
              mean = mean, to = du + first * kPanel,
              sums = row_sums(first)](int64_t k, const PanelRow<A>& y) __attribute__((always_inline)) {
        PanelRow<A> gradient, row, du, means;
        dz.load(k, gradient);
        x2.load(k, row);
        load_row(mean, means);
        POSMLP_UNROLL for (int v = 0; v < kTileVectors; ++v) {
          const auto of = gradients(y[v], scale[k], bias[k], means[v], row[v], gradient[v]);
          row[v] = of.dx2;
          du[v] = of.du;
        }
        dx2.store(k, row);
        store_row(to + k * kPanel, du);
        sums.add(k, du, y);
      };
    };
  }
  void piece(const Piece& piece, const Tile& tile, const A* y) const {
    const auto x2_rows = x2.rows(piece, tile.first), dz_rows = dz.rows(piece, tile.first);
    const auto dx2_rows = dx2.rows(piece, tile.first);
    const A *const scales = scale + tile.first, *const biases = bias + tile.first, *const means = mean + piece.column;
    A* const to = du + tile.first * kPanel + piece.column;
    for_each_vector<A, T>(tile.rows(), piece.count, [=](auto lanes, int64_t k, int64_t c) {
      const auto of = gradients(load_as<A>(lanes, y + k * kPanel + c), scales[k], biases[k], load_as<A>(lanes, means + c),
                                load_as<A>(lanes, x2_rows(k) + c), load_as<A>(lanes, dz_rows(k) + c));
      store_as(lanes, dx2_rows(k) + c, of.dx2);
      store_as(lanes, to + k * kPanel + c, of.du);
    });
  }
  void tile(const Tile& tile, const A* y) const {
    const auto sums = row_sums(tile.first);
    for (int64_t k = 0; k < tile.rows(); ++k) {
      PanelRow<A> du_row, y_row;
      load_row(du + (tile.first + k) * kPanel, du_row);
      load_row(y + k * kPanel, y_row);
      sums.add(k, du_row, y_row);
    }
  }

 private:
  PanelRowSums<A> row_sums(int64_t token) const { return {{bias_sums, token}, {dots, token}}; }
};

// dX1 = P^T dU, times act'(X1) if that is not 1 everywhere. U: what the map holds.
template <bool kHasSlopes, class A, class U>
struct WayToX1 {
  static constexpr Activation kActivation = Activation::none;
  const Map<U> dx1;
  const A* slopes;  // a panel

  template <Seating kSeating>
  auto rows(const Panel& panel) const {
    return [dx1 = Seats<kSeating, A, U>(dx1, panel), slopes = slopes](const Tile& tile) {
      return [dx1 = dx1.from(tile.first), slopes = of(slopes, tile.first * kPanelOf<A>)](
                 int64_t k, PanelRow<A>& y) __attribute__((always_inline)) {
        if constexpr (kHasSlopes) {
          PanelRow<A> slope;
          load_row(slopes + k * kPanelOf<A>, slope);
          POSMLP_UNROLL for (int v = 0; v < kTileVectors; ++v) y[v] *= slope[v];
        }
        dx1.store(k, y);
      };
    };
  }
  void piece(const Piece& piece, const Tile& tile, const A* y) const {
    const auto rows = dx1.rows(piece, tile.first);
    const A* const slope = of(slopes, tile.first * kPanelOf<A> + piece.column);
    for_each_vector<A, U>(tile.rows(), piece.count, [=](auto lanes, int64_t k, int64_t c) {
      const auto sum = load_as<A>(lanes, y + k * kPanelOf<A> + c);
      if constexpr (kHasSlopes)
        store_as(lanes, rows(k) + c, sum * load_as<A>(lanes, slope + k * kPanelOf<A> + c));
      else
        store_as(lanes, rows(k) + c, sum);
    });
  }
  void tile(const Tile&, const A*) const {}

 private:
  static const A* of(const A* slopes, int64_t at) { return kHasSlopes ? slopes + at : nullptr; }
};
