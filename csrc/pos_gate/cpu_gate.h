// The gate on a CPU, forward and backward, for one instruction set.
//
// Equation, per window and group: Z = (P X1 + b) * X2 with P from the relative table. Backward recomputes Y = P X1 and,
// with dU = dZ * X2: dX2 = dZ * (Y + b), dX1 = P^T dU, dP = dU X1^T, db = rows of dU summed.
//
// Tiling: the columns of a group are the long axis (window, channel of the group), cut into chunks of kChunk. A unit is
// a group and a share of its chunks. It builds P once per window class and streams chunks past it: gather the chunk's
// tokens by address (activation and norm on the way), multiply, gate, scatter. Nothing of the size of x is ever stored.
// P is N x N (196^2 floats: 154 KB), a chunk N x 96 (75 KB): both stay in the second-level cache.
// Flops: 2 N C a token forward, 6 N C backward. Bytes: 3 C and 5 C elements a token.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// A thread's buffers, kept from call to call so that no pages are faulted in again.
template <class A>
class Scratch {
 public:
  Scratch() : storage_(thread_storage()), used_(0) {}
  ~Scratch() {
    if (storage_.size() * sizeof(A) > kKeptBytes) std::vector<A>().swap(storage_);
  }
  // Sizes are known before anything is handed out, so that no buffer moves.
  void reserve(int64_t count, int64_t buffers) {
    const size_t wanted = size_t(count + buffers * kAlign);
    if (storage_.size() < wanted) storage_.resize(wanted);
  }
  A* take(int64_t count) {
    const size_t address = size_t(storage_.data() + used_);
    used_ += ((64 - address % 64) % 64) / sizeof(A);
    A* buffer = storage_.data() + used_;
    used_ += count;
    return buffer;
  }

 private:
  static constexpr int64_t kAlign = 64 / sizeof(A);
  static constexpr size_t kKeptBytes = size_t(64) << 20;
  static std::vector<A>& thread_storage() {
    static thread_local std::vector<A> storage;
    return storage;
  }
  std::vector<A>& storage_;
  int64_t used_;
};

template <class T>
class Gate {
 public:
  using A = typename AccumulationOf<T>::type;
  static constexpr int kLanes = VectorOf<A>::kLanes;

  explicit Gate(const Call& call)
      : call_(call), shape_(call.shape), depth_(shape_.group_channels()), z_view_(shape_.contiguous(shape_.channels)),
        dx_view_(shape_.contiguous(2 * shape_.channels)), token_view_(shape_.contiguous(1)),
        classes_(window_classes(shape_)), builder_(call) {}

  void forward(int64_t first_unit, int64_t last_unit) {
    allocate(false, 3);
    A *x1 = take_chunk(), *x2 = take_chunk(), *y = take_chunk();
    for (int64_t unit = first_unit; unit < last_unit; ++unit)
      for_each_chunk(unit, [&](const Window& window, int64_t columns) {
        load_x(window, 0, columns, x1, nullptr);
        load_x(window, shape_.channels, columns, x2, nullptr);
        if (call_.norm_weight) normalise(window, x1);
        multiply<A, Layout::rows>(p_, ld_, x1, kChunk, y, kChunk, padded_rows(window), columns, window.tokens);
        add_bias(window, columns, y);
        scale(window.tokens * kChunk, y, x2);
        scatter(pieces_, y, static_cast<T*>(call_.z) + first_channel(), &Piece::z, window.z);
      }, [](const Window&) {});
  }

  void backward(int64_t first_unit, int64_t last_unit) {
    const bool mixing = call_.dtable_parts || call_.dmatrix_parts;
    T* dx = static_cast<T*>(call_.dx);
    allocate(mixing, 8);
    A *x1 = take_chunk(), *x2 = take_chunk(), *slope1 = take_chunk(), *slope2 = take_chunk();
    A *du = take_chunk(), *y = take_chunk(), *dx1 = take_chunk();
    A* x1_columns = mixing ? scratch_.take(kChunk * ld_) : nullptr;  // X1 with tokens side by side
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      clear_parts(unit);
      for_each_chunk(unit, [&](const Window& window, int64_t columns) {
        load_x(window, 0, columns, x1, slope1);
        load_x(window, shape_.channels, columns, x2, slope2);
        if (call_.norm_weight) normalise(window, x1);
        gather(pieces_, static_cast<const T*>(call_.dz) + first_channel(), &Piece::dz, window.dz, columns, du);
        const int64_t rows = padded_rows(window), count = window.tokens * kChunk;
        multiply<A, Layout::rows>(p_, ld_, x1, kChunk, y, kChunk, rows, columns, window.tokens);
        add_bias(window, columns, y);
        scale(count, y, du);
        if (call_.activation != Activation::none) scale(count, y, slope2);
        scatter(pieces_, y, dx + first_channel() + shape_.channels, &Piece::dx, window.dx);
        scale(count, du, x2);
        add_bias_gradient(window, columns, du);
        multiply<A, Layout::columns>(p_, ld_, du, kChunk, dx1, kChunk, rows, columns, window.tokens);
        if (call_.norm_weight) {
          scatter(pieces_, dx1, static_cast<A*>(call_.dx_normed) + first_channel(), &Piece::z, window.z);
        } else {
          if (call_.activation != Activation::none) scale(count, dx1, slope1);
          scatter(pieces_, dx1, dx + first_channel(), &Piece::dx, window.dx);
        }
        if (mixing) {
          transpose(x1, kChunk, x1_columns, ld_, round_up(window.tokens, kLanes), columns);
          multiply<A, Layout::rows, true>(du, kChunk, x1_columns, ld_, dp_, ld_, rows,
                                          round_up(window.tokens, kLanes), columns);
        }
      }, [&](const Window& window) {
        if (mixing) builder_.add_gradient(window, unit, p_, dp_, ld_);
      });
      store_bias_gradient(unit);
    }
  }

 private:
  // ---- units, chunks and buffers ----

  // Room for P, for dP if it is wanted, and for `chunks` chunks, with the padding that tiles and vectors read.
  void allocate(bool mixing_gradient, int64_t chunks) {
    int64_t tokens = 0;
    for (const auto& cls : classes_) tokens = std::max(tokens, cls.tokens());
    ld_ = round_up(round_up(tokens, kTileRows), kLanes);
    const int64_t matrices = mixing_gradient ? 2 : 1;
    scratch_.reserve(matrices * ld_ * ld_ + chunks * ld_ * kChunk, matrices + chunks);
    p_ = scratch_.take(ld_ * ld_);
    if (mixing_gradient) dp_ = scratch_.take(ld_ * ld_);
  }
  A* take_chunk() {
    A* buffer = scratch_.take(ld_ * kChunk);
    std::fill(buffer, buffer + ld_ * kChunk, A(0));
    return buffer;
  }
  int64_t padded_rows(const Window& window) const { return round_up(window.tokens, kTileRows); }

  // Calls `chunk(window, columns)` for each chunk of a unit, with P and the chunk's pieces in place, and `end(window)`
  // after the last chunk of each window class.
  template <class Chunk, class End>
  void for_each_chunk(int64_t unit, Chunk&& chunk, End&& end) {
    group_ = unit / call_.splits;
    const int64_t split = unit % call_.splits;
    for (const auto& cls : classes_) {
      const int64_t columns = cls.windows(shape_.batch) * depth_;
      const int64_t chunks = divide_up(columns, kChunk);
      const int64_t first = chunks * split / call_.splits, last = chunks * (split + 1) / call_.splits;
      if (first == last) continue;
      const Window window(call_, cls, z_view_, dx_view_, token_view_);
      builder_.build(window, group_, p_, ld_);
      if (dp_) std::fill(dp_, dp_ + ld_ * ld_, A(0));
      for (int64_t i = first; i < last; ++i) {
        const int64_t from = i * kChunk, to = std::min(columns, from + kChunk);
        find_pieces(window, from, to);
        chunk(window, round_up(to - from, kLanes));
      }
      end(window);
    }
  }

  void find_pieces(const Window& window, int64_t from, int64_t to) {
    pieces_.clear();
    for (int64_t q = from; q < to;) {
      Piece piece;
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
      pieces_.push_back(piece);
      q += piece.count;
    }
  }

  // ---- chunks: gather, norm, gate, scatter ----

  void load_x(const Window& window, int64_t channel, int64_t columns, A* values, A* slopes) const {
    gather(pieces_, static_cast<const T*>(call_.x) + first_channel() + channel, &Piece::x, window.x, columns, values);
    activate(call_.activation, values, slopes, window.tokens * kChunk);
  }

  void normalise(const Window& window, A* values) const {
    const A *mean = static_cast<const A*>(call_.norm_mean), *rstd = static_cast<const A*>(call_.norm_rstd);
    const A* weight = static_cast<const A*>(call_.norm_weight) + group_ * depth_;
    const A* bias = static_cast<const A*>(call_.norm_bias) + group_ * depth_;
    for (int64_t k = 0; k < window.tokens; ++k)
      for (const Piece& piece : pieces_) {
        A* row = values + k * kChunk + piece.column;
        const A m = mean[piece.token + window.token[k]], r = rstd[piece.token + window.token[k]];
        for (int64_t c = 0; c < piece.count; ++c)
          row[c] = (row[c] - m) * r * weight[piece.channel + c] + bias[piece.channel + c];
      }
  }

  void add_bias(const Window& window, int64_t columns, A* y) const {
    if (!call_.bias) return;
    const A* bias = static_cast<const A*>(call_.bias);
    for (int64_t k = 0; k < window.tokens; ++k)
      for (int64_t c = 0; c < columns; c += kLanes)
        store<A>(y + k * kChunk + c, load<A>(y + k * kChunk + c) + bias[window.index[k]]);
  }

  void add_bias_gradient(const Window& window, int64_t columns, const A* du) {
    if (!call_.dbias_parts) return;
    for (int64_t k = 0; k < window.tokens; ++k) {
      Vec<A> sums{};
      for (int64_t c = 0; c < columns; c += kLanes) sums += load<A>(du + k * kChunk + c);
      bias_sums_[window.index[k]] += sum_lanes<A>(sums);
    }
  }
  void store_bias_gradient(int64_t unit) const {
    if (!call_.dbias_parts) return;
    A* part = static_cast<A*>(call_.dbias_parts) + unit * shape_.window_tokens();
    for (size_t i = 0; i < bias_sums_.size(); ++i) part[i] = A(bias_sums_[i]);
  }

  static void scale(int64_t count, A* values, const A* factors) {
    for (int64_t i = 0; i < count; i += kLanes) store<A>(values + i, load<A>(values + i) * load<A>(factors + i));
  }

  int64_t first_channel() const { return group_ * depth_; }

  void clear_parts(int64_t unit) {
    const int64_t n = shape_.window_tokens();
    const auto clear = [&](void* parts, int64_t size) {
      if (parts) std::fill_n(static_cast<A*>(parts) + unit * size, size, A(0));
    };
    clear(call_.dtable_parts, shape_.table_size());
    clear(call_.dmatrix_parts, n * n);
    bias_sums_.assign(n, 0.);
  }

  const Call& call_;
  const Shape& shape_;
  const int64_t depth_;  // D
  const View z_view_, dx_view_, token_view_;
  const std::vector<WindowClass> classes_;
  std::vector<Piece> pieces_;
  std::vector<double> bias_sums_;
  Mixing<A> builder_;
  Scratch<A> scratch_;
  A *p_ = nullptr, *dp_ = nullptr;  // of the group and window class at hand, [ld_, ld_], zeros beyond the tokens
  int64_t ld_ = 0, group_ = 0;
};
