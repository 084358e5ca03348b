// The gate on a CPU, forward and backward, for one instruction set.
//
// Equation, per window and group: Z = (P X1 + b) * X2 with P from the relative table. Backward recomputes Y = P X1 and,
// with dU = dZ * X2: dX2 = dZ * (Y + b), dX1 = P^T dU, dP = dU X1^T, db = rows of dU summed.
//
// Tiling: the columns of a group are the long axis (window, channel of the group), cut into panels as wide as a register
// tile. A unit is a group and a share of its columns. It prepares P once per window class and streams panels past it. A
// panel of X1 is gathered by address (activation and norm on the way) and stays in the first-level cache; then, tile of
// rows by tile of rows, the product is made, and bias, X2 and the way out are applied to the tile while it is at hand.
// X2, dZ, Z and dX are touched nowhere else, a tile ahead of their use they are asked for, and nothing of the size of x
// is ever stored. Of P the product by rows needs the table alone (3 KB for N = 196); its transpose, N x N (196^2 floats:
// 154 KB), stays in the second-level cache.
// Flops: 2 N C a token forward, 8 N C forward and backward, less what P leaves out. Bytes: 3 C and 5 C elements a token.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// A thread's buffers, kept from call to call so that no pages are faulted in again.
template <class A, class E>
struct Workspace {
  std::vector<A> storage, bias, scale;  // bias, zeros if there is none, and scale: [tokens] of the window class at hand
  std::vector<E> operands;
  std::vector<double> bias_sums;  // [tokens, lanes] of the window class at hand
  MixingBuffers<A> mixing;
  Packed<E> rows, columns;

  static Workspace& of_thread() {
    static thread_local Workspace workspace;
    return workspace;
  }
  void release_if_large() {
    constexpr size_t kKeptBytes = size_t(64) << 20;
    const size_t numbers = storage.size() + mixing.dense.size() + rows.weights.size() + columns.weights.size() +
                           operands.size();
    if (numbers * sizeof(A) > kKeptBytes) *this = Workspace();
  }
};

// Buffers out of one vector, aligned to cache lines.
template <class A>
class Allotment {
 public:
  // Sizes are known before anything is handed out, so that no buffer moves.
  Allotment(std::vector<A>& storage, int64_t count, int64_t buffers) {
    const size_t wanted = size_t(count + buffers * kAlign);
    if (storage.size() < wanted) storage.resize(wanted);
    free_ = storage.data();
  }
  A* take(int64_t count) {
    free_ += (64 - size_t(free_) % 64) % 64 / sizeof(A);
    A* buffer = free_;
    std::fill(buffer, buffer + count, A{});
    free_ += count;
    return buffer;
  }

 private:
  static constexpr int64_t kAlign = 64 / sizeof(A);
  A* free_;
};

template <class T>
class Gate {
 public:
  using A = typename AccumulationOf<T>::type;
  using E = typename OperandOf<T>::type;
  static constexpr int kLanes = VectorOf<A>::kLanes;
  static constexpr int64_t kPanel = kPanelOf<A>, kTile = kTileRows * kPanel;
  static constexpr bool kIsPaired = kDepthOf<E> == 2;
  static constexpr int64_t kPanels = std::max<int64_t>(1, 48 / kPanel);  // that dP takes at once

  explicit Gate(const Call& call)
      : call_(call), shape_(call.shape), depth_(shape_.group_channels()), z_view_(shape_.contiguous(shape_.channels)),
        dx_view_(shape_.contiguous(2 * shape_.channels)), token_view_(shape_.contiguous(1)),
        workspace_(Workspace<A, E>::of_thread()), mixing_(call, kEpsilonOf<T>, workspace_.mixing) {
    int64_t most_tokens = 0;
    for (const auto& cls : window_classes(shape_)) {
      windows_.emplace_back(call_, cls, z_view_, dx_view_, token_view_);
      most_tokens = std::max(most_tokens, cls.tokens());
    }
    ld_ = round_up(round_up(most_tokens, kTileRows), kLanes);
  }
  ~Gate() { workspace_.release_if_large(); }

  void forward(int64_t first_unit, int64_t last_unit) {
    Allotment<A> allot(workspace_.storage, ld_ * kPanel + 2 * kTile, 3);
    take(allot, {{&x1_, ld_ * kPanel}, {&y_, kTile}, {&done_, kTile}});
    Allotment<E> operands(workspace_.operands, kIsPaired ? ld_ / 2 * kPanel : 0, 1);
    take(operands, {{&factor_, kIsPaired ? ld_ / 2 * kPanel : 0}});
    for (int64_t unit = first_unit; unit < last_unit; ++unit)
      for_each_class(unit, [&](const Window& window, int64_t first, int64_t last) {
        mixing_.pack_rows(workspace_.rows);
        for_each_panel(window, first, last, [&](int64_t, int64_t columns) {
          if (columns < kPanel) clear({{x1_, ld_ * kPanel}});
          load_x1(window, nullptr);
          forward_panel(window, columns);
        });
      });
  }

  void backward(int64_t first_unit, int64_t last_unit) {
    const bool mixing = call_.dtable_parts || call_.dmatrix_parts;
    const int64_t panel = ld_ * kPanel, matrix = mixing ? ld_ * ld_ : 0;
    Allotment<A> allot(workspace_.storage, (2 + 2 * kPanels) * panel + 2 * kTile + matrix, 7);
    take(allot, {{&x1_, panel}, {&slope1_, panel}, {&du_, kPanels * panel}, {&x1_columns_, kPanels * panel}});
    take(allot, {{&y_, kTile}, {&done_, kTile}, {&dp_, matrix}});
    const int64_t pairs = kIsPaired ? panel / 2 : 0;
    Allotment<E> operands(workspace_.operands, (1 + 2 * kPanels) * pairs, 3);
    take(operands, {{&factor_, pairs}, {&left_, kPanels * pairs}, {&right_, kPanels * pairs}});
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      clear_parts(unit);
      for_each_class(unit, [&](const Window& window, int64_t first, int64_t last) {
        mixing_.pack_rows(workspace_.rows);
        mixing_.pack_columns(workspace_.columns);
        if (mixing) find_active(window);
        clear({{dp_, matrix}});
        workspace_.bias_sums.assign(ld_ * kLanes, 0.);
        for_each_panel(window, first, last, [&](int64_t index, int64_t columns) {
          const int64_t slot = index % kPanels;
          A* du = du_ + slot * panel;
          if (columns < kPanel) clear({{x1_, panel}, {du, panel}});
          load_x1(window, slope1_);
          backward_panel_to_x2(window, columns, du);
          if (call_.dbias_parts) add_bias_gradient(window, du);
          backward_panel_to_x1(window, columns, du);
          if (!mixing) return;
          transpose(x1_, kPanel, x1_columns_ + slot * kPanel * ld_, ld_, round_up(window.tokens, kLanes), kPanel);
          if (slot + 1 == kPanels || next_pieces_.empty()) add_mixing_gradient(window, slot + 1);
        });
        if (mixing) mixing_.add_gradient(unit, dp_, ld_);
        if (call_.dbias_parts) store_bias_gradient(window, unit);
      });
    }
  }

 private:
  // ---- the work on a panel ----

  // Z = (P X1 + b) * X2
  void forward_panel(const Window& window, int64_t columns) {
    const auto x2_map = x_map(window, shape_.channels);
    const Map<T> z_map{static_cast<T*>(call_.z) + first_channel(), &Piece::z, window.z};
    wanted_.clear();
    wanted_.add(x2_map, pieces_);
    wanted_.add(z_map, pieces_);
    wanted_.add(x_map(window, 0), next_pieces_);
    multiply_panel(window, workspace_.rows, x1_, columns, [&](const Piece& piece, int64_t from, int64_t to) {
      const auto x2 = x2_map.rows(piece, from);
      const auto z = z_map.rows(piece, from);
      const A *y = done_ + piece.column, *bias = &workspace_.bias[from], *scale = &workspace_.scale[from];
      const Activation activation = call_.activation;
      for_each_vector<A>(to - from, piece.count, [=](auto lanes, int64_t k, int64_t c) {
        const auto sum = load<A, lanes>(y + k * kPanel + c) * scale[k] + bias[k];
        store_as(z(k) + c, sum * activated(activation, load_as<A, lanes>(x2(k) + c)));
      });
    });
  }

  // dX2 = dZ * (P X1 + b), and dU = dZ * X2 into `to_du`.
  void backward_panel_to_x2(const Window& window, int64_t columns, A* to_du) {
    const auto x2_map = x_map(window, shape_.channels);
    const auto dx2_map = dx_map(window, shape_.channels);
    const Map<const T> dz_map{static_cast<const T*>(call_.dz) + first_channel(), &Piece::dz, window.dz};
    wanted_.clear();
    wanted_.add(x2_map, pieces_);
    wanted_.add(dz_map, pieces_);
    wanted_.add(dx2_map, pieces_);
    multiply_panel(window, workspace_.rows, x1_, columns, [&](const Piece& piece, int64_t from, int64_t to) {
      const auto x2 = x2_map.rows(piece, from);
      const auto dz = dz_map.rows(piece, from);
      const auto dx2 = dx2_map.rows(piece, from);
      const A *y = done_ + piece.column, *bias = &workspace_.bias[from], *scale = &workspace_.scale[from];
      const Activation activation = call_.activation;
      A* du = to_du + from * kPanel + piece.column;
      for_each_vector<A>(to - from, piece.count, [=](auto lanes, int64_t k, int64_t c) {
        const auto gradient = load_as<A, lanes>(dz(k) + c);
        const auto gate = activated_with_slope(activation, load_as<A, lanes>(x2(k) + c));
        const auto sum = load<A, lanes>(y + k * kPanel + c) * scale[k] + bias[k];
        store_as(dx2(k) + c, gradient * sum * gate.slope);
        store(du + k * kPanel + c, gradient * gate.value);
      });
    });
  }

  // dX1 = P^T dU; what the norm's gradient starts from where there is one.
  void backward_panel_to_x1(const Window& window, int64_t columns, const A* du) {
    if (!call_.norm_weight) return multiply_into(dx_map(window, 0), window, columns, du, slope1_);
    multiply_into(Map<A>{static_cast<A*>(call_.dx_normed) + first_channel(), &Piece::z, window.z}, window, columns, du,
                  nullptr);
  }
  template <class U>
  void multiply_into(const Map<U>& out, const Window& window, int64_t columns, const A* du, const A* slopes) {
    if (call_.activation == Activation::none) slopes = nullptr;
    wanted_.clear();
    wanted_.add(out, pieces_);
    wanted_.add(x_map(window, 0), next_pieces_);
    multiply_panel(window, workspace_.columns, du, columns, [&](const Piece& piece, int64_t from, int64_t to) {
      const auto dx1 = out.rows(piece, from);
      const A *y = done_ + piece.column, *slope = slopes ? slopes + from * kPanel + piece.column : nullptr;
      for_each_vector<A>(to - from, piece.count, [=](auto lanes, int64_t k, int64_t c) {
        const auto sum = load<A, lanes>(y + k * kPanel + c);
        store_as(dx1(k) + c, slope ? sum * load<A, lanes>(slope + k * kPanel + c) : sum);
      });
    });
  }

  // dP += dU X1^T over the last panels.
  void add_mixing_gradient(const Window& window, int64_t panels) {
    const E* left = operands_along_rows<E>(du_, panels * ld_ * kPanel, left_);
    const E* right = operands_of_rows<E>(x1_columns_, panels * kPanel, ld_, right_);
    for_each_tile(window, [&](int64_t tile, int64_t from, int64_t) {
      add_outer(left + from * kPanel / kDepthOf<E>, ld_, panels, right, active_[tile], dp_ + from * ld_, ld_);
    });
  }

  // ---- units, classes, panels, tiles ----

  // Calls `work(window, first, last)` with a unit's columns of each window class, and the mixing matrix prepared.
  template <class Work>
  void for_each_class(int64_t unit, Work&& work) {
    group_ = unit % shape_.groups;
    const int64_t split = unit / shape_.groups;
    for (const Window& window : windows_) {
      const int64_t columns = window.cls.windows(shape_.batch) * depth_;
      const int64_t panels = divide_up(columns, kPanel);
      const int64_t first = panels * split / call_.splits * kPanel;
      const int64_t last = std::min(columns, panels * (split + 1) / call_.splits * kPanel);
      if (first >= last) continue;
      mixing_.prepare(window, group_);
      gather_bias_and_scale(window);
      work(window, first, last);
    }
  }

  void gather_bias_and_scale(const Window& window) {
    const A* bias = static_cast<const A*>(call_.bias);
    workspace_.bias.resize(window.tokens);
    workspace_.scale.resize(window.tokens);
    for (int64_t k = 0; k < window.tokens; ++k) {
      workspace_.bias[k] = bias ? bias[window.index[k]] : A(0);
      workspace_.scale[k] = mixing_.row_scale(k);
    }
  }

  // Calls `work(index, columns)` for each panel of the columns first <= q < last, with the places of its pieces and of
  // the next panel's at hand.
  template <class Work>
  void for_each_panel(const Window& window, int64_t first, int64_t last, Work&& work) {
    find_pieces(window, first, std::min(last, first + kPanel), next_pieces_);
    for (int64_t from = first, index = 0; from < last; from += kPanel, ++index) {
      std::swap(pieces_, next_pieces_);
      find_pieces(window, from + kPanel, std::min(last, from + 2 * kPanel), next_pieces_);
      work(index, std::min(kPanel, last - from));
    }
  }

  // Calls `work(tile, first, last)` for each tile of the window's tokens.
  template <class Work>
  void for_each_tile(const Window& window, Work&& work) const {
    for (int64_t tile = 0, first = 0; first < window.tokens; ++tile, first += kTileRows)
      work(tile, first, std::min(window.tokens, first + kTileRows));
  }

  // The product of packed weights and a panel, tile by tile, while the wanted rows of the tile's tokens are asked for.
  // `finish(piece, from, to)` takes a tile from `done_` after the next one's product: by then the rows are there, and what
  // lies across two vectors of the product can be read without waiting for its stores.
  template <class Finish>
  void multiply_panel(const Window& window, const Packed<E>& weights, const A* panel, int64_t columns,
                      Finish&& finish) {
    const E* factor = operands_of_rows<E>(panel, window.tokens, kPanel, factor_);
    for_each_tile(window, [&](int64_t tile, int64_t from, int64_t to) {
      wanted_.of_tokens(from, to);
      multiply(weights, tile, factor, divide_up(columns, kLanes), y_, wanted_);
      if (tile > 0)
        for (const Piece& piece : pieces_) finish(piece, from - kTileRows, from);
      std::swap(y_, done_);
      if (to == window.tokens)
        for (const Piece& piece : pieces_) finish(piece, from, to);
    });
  }
  template <class U>
  static void take(Allotment<U>& allot, std::initializer_list<std::pair<U**, int64_t>> buffers) {
    for (const auto& [buffer, count] : buffers) *buffer = allot.take(count);
  }

  // Where the columns from <= q < to lie.
  void find_pieces(const Window& window, int64_t from, int64_t to, Pieces& pieces) const {
    pieces.clear();
    for (int64_t q = from; q < to;) {
      Piece& piece = pieces.emplace_back();
      int64_t position[kRank];
      const int64_t batch = window.cls.locate(shape_, q / depth_, position);
      piece.column = q - from;
      piece.channel = q % depth_;
      piece.count = std::min(depth_ - piece.channel, to - q);
      piece.x = call_.x_view.offset(batch, position);
      piece.dz = call_.dz_view.offset(batch, position);
      piece.z = z_view_.offset(batch, position);
      piece.dx = dx_view_.offset(batch, position);
      piece.token = token_view_.offset(batch, position);
      q += piece.count;
    }
  }

  int64_t first_channel() const { return group_ * depth_; }

  Map<const T> x_map(const Window& window, int64_t channel) const {
    return {static_cast<const T*>(call_.x) + first_channel() + channel, &Piece::x, window.x};
  }

  Map<T> dx_map(const Window& window, int64_t channel) const {
    return {static_cast<T*>(call_.dx) + first_channel() + channel, &Piece::dx, window.dx};
  }

  static void clear(std::initializer_list<std::pair<A*, int64_t>> buffers) {
    for (const auto& [buffer, count] : buffers) std::fill(buffer, buffer + count, A(0));
  }

  // ---- what happens to a panel and to a tile ----

  // The panel is activated as a whole: by then no vector has to be pieced together out of stores under way.
  void load_x1(const Window& window, A* slopes) const {
    const auto map = x_map(window, 0);
    for_each_tile(window, [&](int64_t, int64_t from, int64_t to) {
      for (const Piece& piece : pieces_) {
        const auto x = map.rows(piece, from);
        A* x1 = x1_ + from * kPanel + piece.column;
        for_each_vector<A>(to - from, piece.count, [=](auto lanes, int64_t k, int64_t c) {
          store(x1 + k * kPanel + c, load_as<A, lanes>(x(k) + c));
        });
      }
    });
    activate(window.tokens * kPanel, slopes);
    if (call_.norm_weight) normalise(window);
  }

  void activate(int64_t count, A* slopes) const {
    if (call_.activation == Activation::none) return;
    for (int64_t i = 0; i < count; i += kLanes)
      store_activated(call_.activation, load<A>(x1_ + i), x1_ + i, slopes ? slopes + i : nullptr);
  }

  void normalise(const Window& window) const {
    const A *mean = static_cast<const A*>(call_.norm_mean), *rstd = static_cast<const A*>(call_.norm_rstd);
    const A* weight = static_cast<const A*>(call_.norm_weight) + first_channel();
    const A* bias = static_cast<const A*>(call_.norm_bias) + first_channel();
    for (int64_t k = 0; k < window.tokens; ++k)
      for (const Piece& piece : pieces_) {
        A* row = x1_ + k * kPanel + piece.column;
        const A m = mean[piece.token + window.token[k]], r = rstd[piece.token + window.token[k]];
        for (int64_t c = 0; c < piece.count; ++c)
          row[c] = (row[c] - m) * r * weight[piece.channel + c] + bias[piece.channel + c];
      }
  }

  // ---- gradients of the parameters ----

  // The vectors of keys in which a tile of queries has weights: elsewhere the gradient of the logits is as small. Without
  // a softmax a gradient does not depend on its weight.
  void find_active(const Window& window) {
    active_.assign(workspace_.rows.tiles(), {});
    for (int64_t tile = 0; tile < workspace_.rows.tiles(); ++tile) {
      auto& vectors = active_[tile];
      if (!call_.softmax)
        for (int64_t v = 0; v < window.tokens; v += kLanes) vectors.push_back(int32_t(v));
      else
        for (int64_t e = workspace_.rows.begin[tile]; e < workspace_.rows.begin[tile + 1]; ++e) {
          const int32_t vector = int32_t(workspace_.rows.row[e] / kPanel * kDepthOf<E> / kLanes * kLanes);
          if (vectors.empty() || vectors.back() != vector) vectors.push_back(vector);
        }
    }
  }

  // A panel's sums are short; those over many panels are taken in double.
  void add_bias_gradient(const Window& window, const A* du) {
    for (int64_t k = 0; k < window.tokens; ++k) {
      A lanes[kLanes];
      Vec<A> sums = load<A>(du + k * kPanel);
      for (int64_t c = kLanes; c < kPanel; c += kLanes) sums += load<A>(du + k * kPanel + c);
      store(lanes, sums);
      double* total = &workspace_.bias_sums[k * kLanes];
      for (int l = 0; l < kLanes; l += VectorOf<double>::kLanes)
        store(total + l, load<double>(total + l) + load_wide(lanes + l));
    }
  }
  void store_bias_gradient(const Window& window, int64_t unit) const {
    A* part = static_cast<A*>(call_.dbias_parts) + unit * shape_.window_tokens();
    for (int64_t k = 0; k < window.tokens; ++k) {
      const double* total = &workspace_.bias_sums[k * kLanes];
      part[window.index[k]] += A(std::accumulate(total, total + kLanes, 0.));
    }
  }

  void clear_parts(int64_t unit) {
    const int64_t n = shape_.window_tokens();
    const auto clear = [&](void* parts, int64_t size) {
      if (parts) std::fill_n(static_cast<A*>(parts) + unit * size, size, A(0));
    };
    clear(call_.dtable_parts, shape_.table_size());
    clear(call_.dmatrix_parts, n * n);
    clear(call_.dbias_parts, n);
  }

  const Call& call_;
  const Shape& shape_;
  const int64_t depth_;  // D
  const View z_view_, dx_view_, token_view_;
  std::vector<Window> windows_;  // one for each class
  Workspace<A, E>& workspace_;
  Mixing<A, E> mixing_;
  Pieces pieces_, next_pieces_;  // of the panel at hand and of the one after it
  Wanted wanted_;
  std::vector<std::vector<int32_t>> active_;
  // Panels [tokens, kPanel], and kPanels of them for dP: dU, and X1 with tokens side by side.
  A *x1_ = nullptr, *slope1_ = nullptr, *du_ = nullptr, *x1_columns_ = nullptr;
  // Tiles [kTileRows, kPanel]; y is the one at hand, done the one before it.
  A *y_ = nullptr, *done_ = nullptr;
  E *factor_ = nullptr, *left_ = nullptr, *right_ = nullptr;  // room for pairs: of a product's panel, and for dP
  A* dp_ = nullptr;  // [tokens, tokens] of the window class at hand
  int64_t ld_ = 0, group_ = 0;
};
