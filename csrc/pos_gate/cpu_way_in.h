// The way of a panel of X1 in: gathered by address, activated and normalised.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class A>
void normalise(const Call& call, const Window& window, const Panel& panel, A* to) {
  const A *mean = static_cast<const A*>(call.norm_mean), *rstd = static_cast<const A*>(call.norm_rstd);
  const int64_t first = panel.group * call.shape.group_channels();
  const A *weight = static_cast<const A*>(call.norm_weight) + first, *bias = static_cast<const A*>(call.norm_bias) + first;
  for (int64_t k = 0; k < window.tokens; ++k)
    for (const Piece& piece : panel.pieces) {
      A* row = to + k * kPanelOf<A> + piece.column;
      const A m = mean[piece.token + window.token[k]], r = rstd[piece.token + window.token[k]];
      for (int64_t c = 0; c < piece.count; ++c)
        row[c] = (row[c] - m) * r * weight[piece.channel + c] + bias[piece.channel + c];
    }
}

// `slopes`, if any, get those of the activation.
template <class A, class T>
void load_panel(const Call& call, const Window& window, const Panel& panel, const Map<const T>& map, A* to,
                A* slopes = nullptr) {
  constexpr int kLanes = VectorOf<A>::kLanes;
  constexpr int64_t kPanel = kPanelOf<A>;
  with_constant(call.activation, [&](auto activation) {
    const auto put = [=](auto lanes, int64_t at, auto x) __attribute__((always_inline)) {
      store_activated<activation>(lanes, x, to + at, slopes ? slopes + at : nullptr);
    };
    const auto from_seats = [&](auto seating) {
      const Seats<seating, A, const T> seats(map, panel);
      for (int64_t k = 0; k < window.tokens; ++k) {
        PanelRow<A> row;
        seats.load(k, row);
        POSMLP_UNROLL for (int v = 0; v < kTileVectors; ++v)
          put(std::integral_constant<int, kLanes>(), k * kPanel + v * kLanes, row[v]);
      }
    };
    if (with_seating<A>(panel, from_seats)) return;
    for (const Tile& tile : window.tiles)
      for (const Piece& piece : panel.pieces) {
        const auto x = map.rows(piece, tile.first);
        for_each_vector<A, T>(tile.rows(), piece.count, [=](auto lanes, int64_t k, int64_t c) {
          store_as(lanes, to + (tile.first + k) * kPanel + piece.column + c, load_as<A>(lanes, x(k) + c));
        });
      }
    // As a whole: by now no vector has to be pieced together out of stores under way.
    if (activation == Activation::none) return;
    for_each_vector<A, A>(window.tokens, panel.columns, [=](auto lanes, int64_t k, int64_t c) {
      put(lanes, k * kPanel + c, load_as<A>(lanes, to + k * kPanel + c));
    });
  });
  if (call.norm_weight) normalise(call, window, panel, to);
}
