// Panels of columns: where they lie in the maps, and the way in and out, a few tokens at a time.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class A>
constexpr int64_t kPanelOf = kTileVectors * VectorOf<A>::kLanes;  // columns of a panel, the width of a register tile

// Part of a panel that lies in one window: `count` channels from `channel` of the group on.
struct Piece {
  int64_t column, channel, count;
  int64_t x, dz, z, dx;  // addresses of the window's first token
  int64_t token;         // its number in [B * map], for the norm
};
using Pieces = std::vector<Piece>;
struct Panel {
  int64_t group = 0, columns = 0;
  Pieces pieces;
};

// A window class, where its tokens lie in the window and the table, and their addresses relative to the first one in each
// map: in bytes, so that a step that asks for a line has nothing to multiply.
struct Window {
  WindowClass cls;
  int64_t tokens;
  std::vector<int64_t> index, place, token;
  std::vector<int64_t> x, dz, z, dx, dx_normed;

  // T, A: what maps and the gradient of the normed X1 hold.
  template <class T, class A>
  static Window make(const Call& call, const WindowClass& c, const View& z_view, const View& dx_view,
                     const View& token_view) {
    const auto bytes = [&](const View& view, size_t size) {
      std::vector<int64_t> offsets = c.token_offsets(view);
      for (int64_t& offset : offsets) offset *= int64_t(size);
      return offsets;
    };
    return {c, c.tokens(),
            c.token_indices(call.shape), c.token_offsets(call.shape.table_view()), c.token_offsets(token_view),
            bytes(call.x_view, sizeof(T)), bytes(call.dz_view, sizeof(T)), bytes(z_view, sizeof(T)),
            bytes(dx_view, sizeof(T)), bytes(z_view, sizeof(A))};
  }
};

// One map as the pieces of a panel see it: `data` at the group's first channel, the origin of each piece, and the
// offsets of the tokens.
template <class U>
struct Map {
  U* data;
  int64_t Piece::*origin;
  const std::vector<int64_t>& offset;

  U* first(const Piece& piece) const { return data + piece.*origin + piece.channel; }
  // The rows of the tokens from `from` on: row(k)[channel], as few loads as can be.
  auto rows(const Piece& piece, int64_t from) const {
    using Byte = std::conditional_t<std::is_const_v<U>, const char, char>;
    return [start = reinterpret_cast<Byte*>(first(piece)), place = &offset[from]](int64_t k) {
      return reinterpret_cast<U*>(start + place[k]);
    };
  }
};

// Rows that will be wanted soon. Rows as short and as far apart as these no hardware prefetcher foresees, and a core has
// too few buffers to ask for a panel at once: the products ask for a cache line or two in each of their steps.
class Wanted {
 public:
  // The lines of some tokens. Few instructions find one: a step has little time for them.
  class Queue {
   public:
    // Asks for a line if there is one left.
    __attribute__((always_inline)) void ask() {
      if (line_ == end_) return;
      fetch(line_->first + line_->offset[token_]);
      if (++token_ != last_) return;
      token_ = first_;
      ++line_;
    }
    // Not inlined: it would slow down the loop over tiles.
    __attribute__((noinline)) void ask_for_the_rest() {
      int64_t token = token_;
      for (const Line* line = line_; line != end_; ++line, token = first_)
        for (; token != last_; ++token) fetch(line->first + line->offset[token]);
      line_ = end_;
    }

   private:
    friend class Wanted;
    struct Line {  // of the row of each token
      const char* first;
      const int64_t* offset;
    };

    // Intel's cores can wait for few lines on their way to the first-level cache, and what a product misses there is
    // among them: no farther than the second level, then.
    __attribute__((always_inline)) void fetch(const char* line) const {
      if (to_second_level_)
        __builtin_prefetch(line, 0, 2);
      else
        __builtin_prefetch(line, 0, 3);
    }

    const Line *line_ = nullptr, *end_ = nullptr;
    int64_t token_ = 0, first_ = 0, last_ = 0;
#ifdef POSMLP_X86_KERNELS
    bool to_second_level_ = __builtin_cpu_is("intel");
#else
    static constexpr bool to_second_level_ = false;
#endif
  };
  Queue queue;  // a product takes it out and puts it back, so that it stays in registers meanwhile

  // From now on rows of no map, of tokens that `of_tokens` names.
  void clear() { lines_.clear(); }

  template <class U>
  void add(const Map<U>& map, const Pieces& pieces) {
    for (const Piece& piece : pieces) {
      const char* row = reinterpret_cast<const char*>(map.first(piece));
      const char* end = row + piece.count * int64_t(sizeof(U));
      for (const char* line = row - size_t(row) % kLine; line < end; line += kLine) {
        Queue::Line& wanted = lines_.emplace_back();  // filled in place: a copy would wait for the single stores
        wanted.first = line;
        wanted.offset = map.offset.data();
      }
    }
  }
  void of_tokens(int64_t first, int64_t last) {
    queue.line_ = lines_.data();
    queue.end_ = queue.line_ + lines_.size();
    queue.token_ = queue.first_ = first;
    queue.last_ = last;
  }

 private:
  static constexpr size_t kLine = 64;
  std::vector<Queue::Line> lines_;
};
