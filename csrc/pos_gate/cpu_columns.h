// Panels of columns, and where they lie in the maps.
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

// How the vectors of a full panel lie in its windows, if that is simple. By halves: the first and the last in one each, the
// one between by halves that may be in two; so do groups of 16, 24, 32 or 48 channels in vectors of 16. By quarters: four
// windows of three each, 12 channels.
enum class Seating { none, halves, quarters };

struct Window;
struct Panel {
  int64_t share = 0, group = 0, columns = 0;
  Pieces pieces;
  const Window* window = nullptr;  // whose columns they are,
  int64_t first = 0;               // from this one on
  Seating seating = Seating::none;

  int64_t end() const { return pieces.empty() ? first : first + pieces.back().column + pieces.back().count; }
};

// A tile of a product: the tokens from `first` to `last` are its rows.
struct Tile {
  int64_t first, last;

  int64_t rows() const { return last - first; }
};

constexpr bool kTilesKeepToRows = kLeastRows < kTileRows;

constexpr int64_t kManyRows = 8;  // of tokens: with fewer it does not pay to make sums of two

// The tiles of a window. If they may shrink, a row of tokens has tiles of its own, the last of them the highest and none
// lower by more than one: its tokens lie side by side in the table too. Rows of very few are cut as if they were one.
inline std::vector<Tile> tiles_of(const WindowClass& cls) {
  const int64_t tokens = cls.tokens();
  std::vector<Tile> tiles;
  if (!kTilesKeepToRows) {
    for (int64_t first = 0; first < tokens; first += kTileRows)
      tiles.push_back({first, std::min(tokens, first + kTileRows)});
    return tiles;
  }
  const int64_t row = cls.box[2] >= kLeastRows ? cls.box[2] : tokens, count = divide_up(row, kTileRows);
  for (int64_t begin = 0; begin < tokens; begin += row)
    for (int64_t k = 0; k < count; ++k) tiles.push_back({begin + row * k / count, begin + row * (k + 1) / count});
  return tiles;
}

// A window class, where its tokens lie in the window and the table, and their addresses relative to the first one in each
// map: in bytes, so that a step that asks for a line has nothing to multiply.
struct Window {
  WindowClass cls;
  int64_t tokens, columns, panels;  // columns of all windows of the class, for one group
  int64_t image_columns;            // those of one image
  std::vector<Tile> tiles;
  std::vector<int64_t> index, place, token;
  std::vector<int64_t> x, dz, z, dx, dx_normed;
};

// What the places of a window's tokens depend on: the sizes of whole windows, and of this one.
using WindowSizes = std::array<int64_t, 2 * kRank>;

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

// The columns of a window class: a unit's is a share of them, for one group, and is cut into panels.
class Columns {
 public:
  // width: of a panel.
  Columns(const Call& call, int64_t width)
      : call_(call), shape_(call.shape), width_(width), z_(shape_.contiguous(shape_.channels)),
        dx_(shape_.contiguous(2 * shape_.channels)), token_(shape_.contiguous(1)) {}

  // T, A: what maps and the gradient of the normed X1 hold.
  template <class T, class A>
  Window window(const WindowClass& cls) const {
    const auto bytes = [&](const View& view, size_t size) {
      std::vector<int64_t> offsets = cls.token_offsets(view);
      for (int64_t& offset : offsets) offset *= int64_t(size);
      return offsets;
    };
    const int64_t columns = cls.windows(shape_.batch) * depth();
    return {cls, cls.tokens(), columns, divide_up(columns, width_), cls.windows(1) * depth(), tiles_of(cls),
            cls.token_indices(shape_), cls.token_offsets(shape_.table_view()), cls.token_offsets(token_),
            bytes(call_.x_view, sizeof(T)), bytes(call_.dz_view, sizeof(T)), bytes(z_, sizeof(T)),
            bytes(dx_, sizeof(T)), bytes(z_, sizeof(A))};
  }

  // Where a share begins.
  int64_t first(const Window& window, int64_t share) const {
    return std::min(window.columns, window.panels * share / call_.splits * width_);
  }

  // Where a panel's columns lie, of which `from` is the first; for the next group it is where they lay for the last one.
  void find(const Window& window, int64_t from, Panel& panel) const {
    const int64_t to = from + panel.columns;
    if (panel.window == &window && panel.first == from && panel.end() == to) return;
    panel.window = &window;
    panel.first = from;
    panel.pieces.clear();
    for (int64_t q = from; q < to;) {
      Piece& piece = panel.pieces.emplace_back();
      int64_t position[kRank];
      const int64_t batch = window.cls.locate(shape_, q / depth(), position);
      piece.column = q - from;
      piece.channel = q % depth();
      piece.count = std::min(depth() - piece.channel, to - q);
      piece.x = call_.x_view.offset(batch, position);
      piece.dz = call_.dz_view.offset(batch, position);
      piece.z = z_.offset(batch, position);
      piece.dx = dx_.offset(batch, position);
      piece.token = token_.offset(batch, position);
      q += piece.count;
    }
    panel.seating = seating_of(panel);
  }

  // Calls `work(index)` for each panel of the columns of the units that `next_unit()` gives until it gives -1, when it is
  // `now`, and the one after it `next`. Returns how many there are.
  template <class NextUnit, class Work>
  int64_t for_each_panel(const Window& window, NextUnit&& next_unit, Panel& now, Panel& next, Work&& work) const {
    int64_t from = 0, end = 0;  // of the unit's columns
    const auto find_next = [&] {
      for (int64_t unit; from == end && (unit = next_unit()) >= 0;) {
        next.share = call_.share_of(unit);
        next.group = call_.group_of(unit);
        from = first(window, next.share);
        end = first(window, next.share + 1);
      }
      next.columns = std::min(width_, end - from);
      find(window, from, next);
      from += next.columns;
    };
    find_next();
    int64_t index = 0;
    for (; next.columns > 0; ++index) {
      std::swap(now, next);
      next.share = now.share;
      next.group = now.group;
      find_next();
      work(index);
    }
    return index;
  }

 private:
  Seating seating_of(const Panel& panel) const {
    if (panel.columns < width_) return Seating::none;
    const int64_t lanes = width_ / kTileVectors;
    if (lanes == 16 && 4 * depth() == width_) return Seating::quarters;
    for (const Piece& piece : panel.pieces)
      if (2 * piece.column % lanes != 0 || 2 * piece.column == lanes || 2 * piece.column == 5 * lanes) return Seating::none;
    return Seating::halves;
  }
  int64_t depth() const { return shape_.group_channels(); }

  const Call& call_;
  const Shape& shape_;
  const int64_t width_;
  const View z_, dx_, token_;
};
