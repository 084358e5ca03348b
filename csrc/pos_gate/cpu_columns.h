// Chunks of columns: where they lie in the maps, and the way in and out.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

constexpr int64_t kChunk = 96;  // columns; a multiple of every tile width, and of 12, 24, 32 and 48 channels
constexpr int64_t kAhead = 24;  // tokens: rows this short and far apart are asked for in advance

// Part of a chunk that lies in one window: `count` channels from `channel` of the group on.
struct Piece {
  int64_t column, channel, count;
  int64_t x, dz, z, dx;  // addresses of the window's first token
  int64_t token;         // its number in [B * map], for the norm
};

// A window class with the addresses of its tokens, relative to the first one, in each map.
struct Window {
  const WindowClass& cls;
  int64_t tokens;
  std::vector<int64_t> index, x, dz, z, dx, token;

  Window(const Call& call, const WindowClass& c, const View& z_view, const View& dx_view, const View& token_view)
      : cls(c), tokens(c.tokens()), index(c.token_indices(call.shape)), x(c.token_offsets(call.x_view)),
        dz(c.token_offsets(call.dz_view)), z(c.token_offsets(z_view)), dx(c.token_offsets(dx_view)),
        token(c.token_offsets(token_view)) {}
};

// The chunk `to` [tokens, kChunk] from a map; columns beyond the pieces become zeros.
template <class U, class A>
void gather(const std::vector<Piece>& pieces, const U* from, int64_t Piece::*origin,
            const std::vector<int64_t>& offsets, int64_t columns, A* to) {
  const int64_t *offset = offsets.data(), tokens = int64_t(offsets.size());
  for (const Piece& piece : pieces) {
    const U* first = from + piece.*origin + piece.channel;
    const int64_t column = piece.column, count = piece.count;
    for (int64_t k = 0; k < tokens; ++k) {
      const U* ahead = first + offset[std::min(k + kAhead, tokens - 1)];
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + count - 1);
      load_row(first + offset[k], to + k * kChunk + column, count);
    }
  }
  const int64_t used = pieces.back().column + pieces.back().count;
  if (used < columns)
    for (int64_t k = 0; k < tokens; ++k) std::fill(to + k * kChunk + used, to + k * kChunk + columns, A(0));
}

// The chunk `from` [tokens, kChunk] into a map.
template <class U, class A>
void scatter(const std::vector<Piece>& pieces, const A* from, U* to, int64_t Piece::*origin,
             const std::vector<int64_t>& offsets) {
  const int64_t *offset = offsets.data(), tokens = int64_t(offsets.size());
  for (const Piece& piece : pieces) {
    U* first = to + piece.*origin + piece.channel;
    const int64_t column = piece.column, count = piece.count;
    for (int64_t k = 0; k < tokens; ++k) {
      U* ahead = first + offset[std::min(k + kAhead, tokens - 1)];
      __builtin_prefetch(ahead, 1);
      __builtin_prefetch(ahead + count - 1, 1);
      store_row(from + k * kChunk + column, first + offset[k], count);
    }
  }
}
