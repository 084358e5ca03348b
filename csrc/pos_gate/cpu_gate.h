// The gate on a CPU, forward and backward, for one instruction set.
//
// Equation, per window and group: Z = (P X1 + b) * X2 with P from the relative table. Backward recomputes Y = P X1 and,
// with dU = dZ * X2: dX2 = dZ * (Y + b), dX1 = P^T dU, db = rows of dU summed; the table's gradient comes from dU, X1 and Y
// (cpu_table_gradient.h), or where that does not apply from dP = dU X1^T.
//
// Tiling: the columns of a group are the long axis (window, channel of the group), cut into panels as wide as a
// register tile. A unit is a group and a share of its columns. P is prepared once per window class, and panels stream
// past it. A panel of X1 is gathered by address (activation and norm on the way) and stays near the first-level cache;
// then, tile of rows by tile of rows, the product is made, and bias, X2 and the way out are applied to the tile while
// it is at hand. X2, dZ, Z and dX are touched nowhere else, a tile ahead of their use they are asked for, and nothing
// of the size of x is ever stored. Of P and of its transpose the products need the table alone (3 KB for N = 196, or 6
// with differences), unless there is a free matrix: N x N (196^2 floats: 154 KB), which stays in the second-level
// cache.
// Flops: 2 N C a token forward, 8 N C forward and backward, less what P leaves out, and up to a quarter less where three
// products do for four (cpu_packing.h). Bytes: 3 C and 5 C elements a token.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class T>
class Gate {
 public:
  using A = typename AccumulationOf<T>::type;
  using E = typename OperandOf<T>::type;
  static constexpr int kLanes = VectorOf<A>::kLanes;
  static constexpr int64_t kPanel = kPanelOf<A>, kTile = kTileRows * kPanel;
  static constexpr bool kIsPaired = kDepthOf<E> == 2;
  static constexpr int64_t kPanels = std::max<int64_t>(1, 96 / kPanel);  // that dP takes at once

  explicit Gate(const Call& call)
      : call_(call), shape_(call.shape), depth_(shape_.group_channels()), columns_(call, kPanel),
        workspace_(Workspace<A, E>::of_thread()), mixing_(call, kEpsilonOf<T>, workspace_.mixing) {
    int64_t most_tokens = 0;
    for (const auto& cls : window_classes(shape_)) {
      windows_.push_back(columns_.window<T, A>(cls));
      most_tokens = std::max(most_tokens, cls.tokens());
    }
    ld_ = round_up(round_up(most_tokens, kTileRows), std::max(kLanes, kStepsAtOnce * kDepthOf<E>));
  }
  ~Gate() { workspace_.release_if_large(); }

  void forward(int64_t thread) {
    Allotment<A> allot(workspace_.storage, ld_ * kPanel + 2 * kTile + common_size(), 4);
    take(allot, {{&x1_, ld_ * kPanel}, {&products_.y, kTile}, {&products_.done, kTile}});
    take(allot, {{&products_.common, common_size()}});
    Allotment<E> operands(workspace_.operands, kIsPaired ? ld_ / 2 * kPanel : 0, 1);
    take(operands, {{&products_.factor, kIsPaired ? ld_ / 2 * kPanel : 0}});
    if (int64_t(workspace_.groups.size()) < kept_groups()) workspace_.groups.resize(kept_groups());
    for (auto& group : workspace_.groups) group.window = nullptr;
    for (size_t i = 0; i < windows_.size(); ++i) {
      const Window& window = windows_[i];
      Deal& deal = call_.deals[i];
      gather_bias(window);
      int64_t share = -1;
      for_each_panel(window, [&] { return deal.take(thread); }, [&](int64_t) {
        find_group(window);
        if (call_.streams && std::exchange(share, panel_.share) != panel_.share)
          ask_for_next_share(window, deal.end(thread));
        load_panel<A>(call_, window, panel_, x_map(window, panel_, 0), x1_);
        forward_panel(window);
      });
    }
  }

  void backward(int64_t thread) {
    const bool mixing = call_.dtable_parts || call_.dmatrix_parts;
    const int64_t panel = ld_ * kPanel, matrix = mixing ? ld_ * ld_ : 0;
    Allotment<A> allot(workspace_.storage, (2 + 2 * kPanels) * panel + 2 * kTile + common_size() + matrix + kPanel, 9);
    take(allot, {{&x1_, panel}, {&slope1_, panel}, {&du_, kPanels * panel}, {&x1_columns_, kPanels * panel}});
    take(allot, {{&products_.y, kTile}, {&products_.done, kTile}, {&dp_, matrix}, {&mean_, kPanel}});
    take(allot, {{&products_.common, common_size()}});
    const int64_t pairs = kIsPaired ? panel / 2 : 0;
    Allotment<E> operands(workspace_.operands, (1 + 2 * kPanels) * pairs, 3);
    take(operands, {{&products_.factor, pairs}, {&left_, kPanels * pairs}, {&right_, kPanels * pairs}});
    for (int64_t unit; (unit = call_.deals->take(thread)) >= 0;) {
      clear_parts(unit);
      for (const Window& window : windows_) backward_class(window, unit);
    }
  }

 private:
  // ---- the work on a panel ----

  // A unit's columns of one class of windows.
  void backward_class(const Window& window, int64_t unit) {
    const bool mixing = call_.dtable_parts || call_.dmatrix_parts;
    const int64_t size = ld_ * kPanel;
    int64_t left = unit;
    const int64_t panels = for_each_panel(window, [&] { return std::exchange(left, -1); }, [&](int64_t index) {
      if (index == 0) begin_class(window, mixing);
      const int64_t slot = table_gradient_ ? 0 : index % kPanels;
      A* du = du_ + slot * size;
      if (panel_.columns < kPanel)
        clear({{x1_, size}, {du, size}, {products_.y, kTile}, {products_.done, kTile}, {products_.common, common_size()}});
      load_panel(call_, window, panel_, x_map(window, panel_, 0), x1_, slope1_);
      if (table_gradient_ && call_.softmax) centre_columns(x1_, window.tokens, mean_);
      if (table_gradient_ && mixing) table_gradient_->begin_panel(x1_, x1_columns_);
      backward_panel_to_x2(window, du);
      backward_panel_to_x1(window, du);
      if (!mixing) return;
      if (table_gradient_) return table_gradient_->add(du, panel_.columns);
      transpose(x1_, kPanel, x1_columns_ + slot * size, ld_, round_up(window.tokens, kLanes), kPanel);
      if (slot + 1 == kPanels || next_panel_.columns == 0) add_mixing_gradient(window, slot + 1);
    });
    if (panels == 0) return;
    if (mixing && table_gradient_)
      table_gradient_->add_to(unit, workspace_.dots);
    else if (mixing)
      mixing_.add_gradient(unit, dp_, ld_);
    if (call_.dbias_parts) store_bias_gradient(window, unit);
  }

  void begin_class(const Window& window, bool mixing) {
    if (workspace_.groups.empty()) workspace_.groups.resize(1);
    group_ = &workspace_.groups[0];
    prepare_group(window, panel_.group);
    mixing_.pack_columns(group_->columns);
    gather_bias(window);
    clear({{mean_, kPanel}});
    table_gradient_ = mixing_.table_gradient();
    if (mixing && table_gradient_) {
      table_gradient_->begin();
    } else if (mixing) {
      find_active(window);
      clear({{dp_, ld_ * ld_}});
    }
    workspace_.bias_sums.clear(window.tokens);
    workspace_.dots.clear(window.tokens);
  }

  // Z = (P X1 + b) * X2
  void forward_panel(const Window& window) {
    const auto want = [&](const Panel& panel) {
      wanted_.add(x_map(window, panel, shape_.channels), panel.pieces);
      wanted_.add(z_map(window, panel), panel.pieces);
      wanted_.early();
      wanted_.add(x_map(window, next_panel_, 0), next_panel_.pieces);
    };
    const bool through = products_.passes_through(window, group_->rows);
    if (!call_.streams) {
      wanted_.clear(group_->rows.has_twins);
      want(panel_);
      wanted_.then();
      if (through) want(next_panel_);
    }
    with_constant(call_.activation, [&](auto activation) {
      const WayToZ<activation, A, T> way_out{x_map(window, panel_, shape_.channels), z_map(window, panel_),
                                             group_->scale.data(), workspace_.bias.data()};
      products_.multiply_panel(window, group_->rows, x1_, way_out);
    });
  }

  // dX2 = dZ * (P X1 + b), and dU = dZ * X2, rows scaled, into `du`.
  void backward_panel_to_x2(const Window& window, A* du) {
    const bool through = products_.passes_through(window, group_->rows);
    wanted_.clear(group_->rows.has_twins);
    want_x2_and_gradients(window, panel_);
    wanted_.then();
    if (through) want_dx1(window);
    with_constant(call_.activation, [&](auto activation) {
      const WayToX2<activation, A, T> way_out{x_map(window, panel_, shape_.channels), dz_map(window, panel_),
                                              dx_map(window, panel_, shape_.channels), group_->scale.data(),
                                              workspace_.bias.data(), mean_, du, workspace_.bias_sums, workspace_.dots};
      products_.multiply_panel(window, group_->rows, x1_, way_out);
    });
  }

  // dX1 = P^T dU; what the norm's gradient starts from where there is one.
  void backward_panel_to_x1(const Window& window, const A* du) {
    if (!call_.norm_weight) return multiply_into(dx_map(window, panel_, 0), window, du, slope1_);
    multiply_into(dx_normed_map(window), window, du, nullptr);
  }
  template <class U>
  void multiply_into(const Map<U>& out, const Window& window, const A* du, const A* slopes) {
    if (call_.activation == Activation::none) slopes = nullptr;
    const bool through = products_.passes_through(window, group_->columns);
    wanted_.clear(group_->rows.has_twins);
    want_dx1(window);
    wanted_.then();
    if (through) want_x2_and_gradients(window, next_panel_);
    if (slopes)
      products_.multiply_panel(window, group_->columns, du, WayToX1<true, A, U>{out, slopes});
    else
      products_.multiply_panel(window, group_->columns, du, WayToX1<false, A, U>{out, nullptr});
  }

  // What the two products of a backward touch besides panels; the second one's, while X1 of the next panel is asked for.
  void want_x2_and_gradients(const Window& window, const Panel& panel) {
    wanted_.add(x_map(window, panel, shape_.channels), panel.pieces);
    wanted_.add(dz_map(window, panel), panel.pieces);
    wanted_.early();
    wanted_.add(dx_map(window, panel, shape_.channels), panel.pieces);
  }
  void want_dx1(const Window& window) {
    if (call_.norm_weight)
      wanted_.add(dx_normed_map(window), panel_.pieces);
    else
      wanted_.add(dx_map(window, panel_, 0), panel_.pieces);
    wanted_.early();
    wanted_.add(x_map(window, next_panel_, 0), next_panel_.pieces);
  }

  // dP += dU X1^T over the last panels.
  void add_mixing_gradient(const Window& window, int64_t panels) {
    const E* left = operands_along_rows<E>(du_, panels * ld_ * kPanel, left_);
    const E* right = operands_of_rows<E>(x1_columns_, panels * kPanel, ld_, right_);
    for (size_t i = 0; i < window.tiles.size(); ++i) {
      const auto& [from, to] = window.tiles[i];
      add_outer(to - from, left + from * kPanel / kDepthOf<E>, ld_, panels, right, active_[i], dp_ + from * ld_, ld_);
    }
  }

  // ---- groups, units, panels, tiles ----

  // A forward comes back to a group with every share of the columns and keeps what it made, if there is room.
  int64_t kept_groups() const { return call_.splits > 1 && keeps_groups(shape_) ? shape_.groups : 1; }

  // P of the panel's group, for the windows at hand.
  void find_group(const Window& window) {
    group_ = &workspace_.groups[kept_groups() > 1 ? panel_.group : 0];
    if (group_->window == &window && group_->group == panel_.group) return;
    prepare_group(window, panel_.group);
  }
  void prepare_group(const Window& window, int64_t group) {
    mixing_.prepare(window, group);
    mixing_.pack_rows(group_->rows);
    mixing_.row_scales(group_->scale);
    group_->window = &window;
    group_->group = group;
  }

  int64_t common_size() const { return ld_ / kManyRows * kPanel + kTile; }  // of products_.common

  void gather_bias(const Window& window) {
    const A* bias = static_cast<const A*>(call_.bias);
    workspace_.bias.resize(window.tokens);
    for (int64_t k = 0; k < window.tokens; ++k) workspace_.bias[k] = bias ? bias[window.index[k]] : A(0);
  }

  template <class NextUnit, class Work>
  int64_t for_each_panel(const Window& window, NextUnit&& next_unit, Work&& work) {
    return columns_.for_each_panel(window, next_unit, panel_, next_panel_, work);
  }

  // All rows of as many columns as are at hand, of those that follow before `last_unit`: of each row of tokens X1 and X2,
  // and Z.
  void ask_for_next_share(const Window& window, int64_t last_unit) {
    const int64_t begin = columns_.first(window, panel_.share), end = columns_.first(window, panel_.share + 1);
    const int64_t last = last_unit > 0 ? columns_.first(window, call_.share_of(last_unit - 1) + 1) : 0;
    Panel next;
    next.columns = std::clamp<int64_t>(last - end, 0, end - begin);  // none where the unit was another thread's
    columns_.find(window, end, next);
    const int64_t length = window.cls.box[2], bytes = length * shape_.channels * int64_t(sizeof(T));
    std::vector<const void*> rows;
    for (const Piece& piece : next.pieces) {
      if (piece.channel > 0) continue;  // that window is at hand
      for (int64_t k = 0; k < window.tokens; k += length) {
        const char* x = reinterpret_cast<const char*>(static_cast<const T*>(call_.x) + piece.x) + window.x[k];
        for (int half = 0; half < 2; ++half) rows.push_back(x + half * bytes);  // the row's tokens lie side by side
        rows.push_back(reinterpret_cast<const char*>(static_cast<const T*>(call_.z) + piece.z) + window.z[k]);
      }
    }
    const int64_t panels = divide_up(end - begin, kPanel) * shape_.groups;
    wanted_.spread(rows, bytes, Products<T>::asks(window, group_->rows) * panels);
  }

  template <class U>
  static void take(Allotment<U>& allot, std::initializer_list<std::pair<U**, int64_t>> buffers) {
    for (const auto& [buffer, count] : buffers) *buffer = allot.take(count);
  }

  int64_t first_channel() const { return panel_.group * depth_; }

  Map<const T> x_map(const Window& window, const Panel& panel, int64_t channel) const {
    return {static_cast<const T*>(call_.x) + panel.group * depth_ + channel, &Piece::x, window.x};
  }

  Map<T> z_map(const Window& window, const Panel& panel) const {
    return {static_cast<T*>(call_.z) + panel.group * depth_, &Piece::z, window.z};
  }

  Map<const T> dz_map(const Window& window, const Panel& panel) const {
    return {static_cast<const T*>(call_.dz) + panel.group * depth_, &Piece::dz, window.dz};
  }

  Map<T> dx_map(const Window& window, const Panel& panel, int64_t channel) const {
    return {static_cast<T*>(call_.dx) + panel.group * depth_ + channel, &Piece::dx, window.dx};
  }
  Map<A> dx_normed_map(const Window& window) const {
    return {static_cast<A*>(call_.dx_normed) + first_channel(), &Piece::z, window.dx_normed};
  }

  static void clear(std::initializer_list<std::pair<A*, int64_t>> buffers) {
    for (const auto& [buffer, count] : buffers) std::fill(buffer, buffer + count, A(0));
  }

  // ---- gradients of the parameters ----

  // The vectors of keys in which a tile of queries has weights: elsewhere the gradient of the logits is as small. Without
  // a softmax a gradient does not depend on its weight.
  void find_active(const Window& window) {
    active_.assign(group_->rows.tiles(), {});
    for (int64_t tile = 0; tile < group_->rows.tiles(); ++tile) {
      auto& vectors = active_[tile];
      const TileRuns& runs = group_->rows.runs_of(tile);
      if (!call_.softmax)
        for (int64_t v = 0; v < window.tokens; v += kLanes) vectors.push_back(int32_t(v));
      else
        for (const auto& kind : runs.of)
          for (const Run* run = kind.begin; run < kind.end; ++run) {
            const int64_t first = (runs.row + run->row) / kPanel * kDepthOf<E>, last = first + run->count * kDepthOf<E> - 1;
            for (int64_t v = first / kLanes * kLanes; v <= last; v += kLanes) vectors.push_back(int32_t(v));
          }
      std::sort(vectors.begin(), vectors.end());
      vectors.erase(std::unique(vectors.begin(), vectors.end()), vectors.end());
    }
  }

  void store_bias_gradient(const Window& window, int64_t unit) const {
    A* part = static_cast<A*>(call_.dbias_parts) + unit * shape_.window_tokens();
    workspace_.bias_sums.for_each(window.tokens, [&](int64_t k, double sum) {
      part[window.index[k]] += A(sum / double(group_->scale[k]));
    });
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
  const Columns columns_;
  std::vector<Window> windows_;  // one for each class
  Workspace<A, E>& workspace_;
  Mixing<A, E> mixing_;
  Panel panel_, next_panel_;  // the one at hand and the one after it
  GroupMixing<A, E>* group_ = nullptr;  // of the panel at hand
  TableGradient<A>* table_gradient_ = nullptr;  // of a backward's group and windows, if that is how to find it
  Wanted wanted_;
  Products<T> products_{panel_, wanted_};
  std::vector<std::vector<int32_t>> active_;
  // Panels [tokens, kPanel], and kPanels of them for dP: dU, and X1 with tokens side by side.
  A *x1_ = nullptr, *slope1_ = nullptr, *du_ = nullptr, *x1_columns_ = nullptr;
  E *left_ = nullptr, *right_ = nullptr;  // room for pairs, for dP
  A* mean_ = nullptr;  // [kPanel], what a backward's x1 lacks
  A* dp_ = nullptr;  // [tokens, tokens] of the window class at hand
  int64_t ld_ = 0;
};
