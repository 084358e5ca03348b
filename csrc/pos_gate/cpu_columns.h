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

// A window class with the addresses of its tokens, relative to the first one, in each map.
struct Window {
  WindowClass cls;
  int64_t tokens;
  std::vector<int64_t> index, place, x, dz, z, dx, token;

  Window(const Call& call, const WindowClass& c, const View& z_view, const View& dx_view, const View& token_view)
      : cls(c), tokens(c.tokens()), index(c.token_indices(call.shape)),
        place(c.token_offsets(call.shape.table_view())), x(c.token_offsets(call.x_view)),
        dz(c.token_offsets(call.dz_view)), z(c.token_offsets(z_view)), dx(c.token_offsets(dx_view)),
        token(c.token_offsets(token_view)) {}
};

// One map as the pieces of a panel see it: `data` at the group's first channel, the origin of each piece, and the
// offsets of the tokens.
template <class U>
struct Map {
  U* data;
  int64_t Piece::*origin;
  const std::vector<int64_t>& offset;

  U* at(const Piece& piece, int64_t token) const {
    return data + piece.*origin + piece.channel + offset[token];
  }
  // The rows of the tokens from `first` on: row(k)[channel], as few loads as can be.
  auto rows(const Piece& piece, int64_t first) const {
    return [start = data + piece.*origin + piece.channel, place = &offset[first]](int64_t k) { return start + place[k]; };
  }
};

// Rows that will be wanted soon. Rows as short and as far apart as these no hardware prefetcher foresees, and a core has
// too few buffers to ask for a panel at once: the products ask for a cache line or two in each of their steps.
class Wanted {
 public:
  // The lines of some tokens, their addresses known beforehand: a step has no time to find them.
  class Queue {
   public:
    // Asks for a line if there is one left.
    __attribute__((always_inline)) void ask() {
      if (next_ == end_) return;
      fetch(*next_++);
    }
    void ask_for_the_rest() {
      while (next_ != end_) fetch(*next_++);
    }

   private:
    friend class Wanted;

    // Intel's cores can wait for few lines on their way to the first-level cache, and what a product misses there is
    // among them: no farther than the second level, then.
    __attribute__((always_inline)) void fetch(const char* line) const {
      if (to_second_level_)
        __builtin_prefetch(line, 0, 2);
      else
        __builtin_prefetch(line, 0, 3);
    }

    const char *const *next_ = nullptr, *const *end_ = nullptr;
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
      const char* row = reinterpret_cast<const char*>(map.at(piece, 0));
      const char* end = row + piece.count * int64_t(sizeof(U));
      for (const char* line = row - size_t(row) % kLine; line < end; line += kLine) {
        Line& wanted = lines_.emplace_back();  // filled in place: a copy would wait for the single stores
        wanted.first = line;
        wanted.offset = map.offset.data();
        wanted.size = int64_t(sizeof(U));
      }
    }
  }
  void of_tokens(int64_t first, int64_t last) {
    const size_t count = lines_.size() * size_t(last - first);
    if (addresses_.size() < count) addresses_.resize(count);
    const char** to = addresses_.data();
    for (const Line& line : lines_)
      for (int64_t token = first; token < last; ++token) *to++ = line.first + line.offset[token] * line.size;
    queue.next_ = addresses_.data();
    queue.end_ = to;
  }

 private:
  static constexpr size_t kLine = 64;
  struct Line {  // of the row of each token
    const char* first;
    const int64_t* offset;
    int64_t size;
  };

  std::vector<Line> lines_;
  std::vector<const char*> addresses_;
};
