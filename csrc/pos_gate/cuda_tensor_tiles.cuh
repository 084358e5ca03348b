// What the products on tensor cores have in common: the long axis of columns, and tiles of it in shared memory.
//
// All windows of a class, and the D channels of a group in each, make one axis of `windows * D` columns, cut into panels
// of kColumns wherever a window ends: widths of 12, 24 or 48 channels waste nothing. A panel has a row per token of the
// window. Tiles are copied 16 bytes at a time where D and the strides allow, else 8, 4, or 2; rows in shared memory are
// padded by 16 bytes, so that the eight rows of a matrix load lie in different banks.
#pragma once

#include "cuda_activation.cuh"
#include "cuda_call.h"

namespace posmlp::cuda {

constexpr int kColumns = 32, kPadding = 8, kTileStride = kColumns + kPadding;  // elements of 16 bits
constexpr int kWarp = 32, kMostWarps = 8;
constexpr int kMostTokens = 1024;  // of a window here: its offsets lie in shared memory

// How a product is cut, and how much shared memory it takes: chosen by the host (cuda_tensor_plan.h).
struct TensorPlan {
  int warps, row_blocks;  // a block has 32 rows for each warp
  int keys, chunks;       // rows of the panel's tile that are in shared memory at once; how often
  int stages;             // tiles in flight and in use, 2 or 3
  bool keep;              // whether the block's rows of P stay in shared memory: all keys in one chunk
  bool rebuild;           // else whether they are made from the table where they are multiplied, rather than streamed
  int piece;              // elements that a copy takes
  bool pairs;             // whether neighbouring channels can be read and written as one
  int64_t shared_bytes;
};

// Where a column's tokens lie: the first token of its window in each tensor, and its channel.
struct PanelColumn {
  int64_t x, dz, out, token;  // elements in x, dz and the output; tokens in the dense order of the map
  int channel;                // in C, -1 beyond the last column
};

// The class, group, block of rows and share of the panels of one block. Groups go fastest: the channels of neighbouring
// groups share cache lines.
struct Unit {
  int window_class;
  int64_t group, row_block, split;

  POSMLP_DEVICE Unit(int64_t index, const Shape& shape, int64_t row_blocks, int class_count) {
    group = index % shape.groups, index /= shape.groups;
    row_block = index % row_blocks, index /= row_blocks;
    window_class = int(index % class_count);
    split = index / class_count;
  }
};

template <class T>
class Panels {
 public:
  POSMLP_DEVICE Panels(const Call<T>& call, const Unit& unit, const View& out)
      : call_(call),
        out_(out),
        windows_(call.classes[unit.window_class]),
        first_channel_(unit.group * call.shape.group_channels()) {
    columns_ = windows_.windows(call.shape.batch) * call.shape.group_channels();
  }

  POSMLP_DEVICE int64_t count() const { return divide_up(columns_, kColumns); }
  POSMLP_DEVICE int tokens() const { return int(windows_.tokens()); }

  POSMLP_DEVICE PanelColumn column(int64_t panel, int index) const {
    const int64_t at = panel * kColumns + index, width = call_.shape.group_channels();
    if (at >= columns_) return {0, 0, 0, 0, -1};
    int64_t position[kRank];
    const int64_t batch = windows_.locate(call_.shape, at / width, position);
    return {call_.x_view.offset(batch, position), call_.dz_view.offset(batch, position), out_.offset(batch, position),
            call_.shape.contiguous(1).offset(batch, position), int(first_channel_ + at % width)};
  }

 private:
  const Call<T>& call_;
  const View& out_;
  const WindowClass& windows_;
  int64_t first_channel_, columns_;
};

// Of every token of a window, where it lies relative to the first one. In shared memory.
struct TokenOffsets {
  static constexpr int kArrays = 4;
  int64_t *x, *dz, *out, *token;  // [tokens] each

  static POSMLP_BOTH int64_t bytes(const Shape& shape) {
    return kArrays * shape.window_tokens() * int64_t(sizeof(int64_t));
  }

  POSMLP_DEVICE TokenOffsets(void* shared, const Shape& shape) {
    x = static_cast<int64_t*>(shared), dz = x + shape.window_tokens(), out = dz + shape.window_tokens();
    token = out + shape.window_tokens();
  }
  POSMLP_DEVICE void* end(const Shape& shape) const { return token + shape.window_tokens(); }

  template <class T>
  POSMLP_DEVICE void fill(const Call<T>& call, const View& out_view, const WindowClass& windows, int threads) const {
    for (int i = thread_index(); i < windows.tokens(); i += threads) {
      int64_t position[kRank];
      windows.place(i, position);
      for (int d = 0; d < kRank; ++d) position[d] -= windows.begin[d];
      x[i] = call.x_view.offset(0, position);
      dz[i] = call.dz_view.offset(0, position);
      out[i] = out_view.offset(0, position);
      token[i] = call.shape.contiguous(1).offset(0, position);
    }
  }
};

// Copies `piece` elements without waiting where the machine can, zeros if they are not wanted.
template <class T>
POSMLP_DEVICE void copy_piece(T* to, const T* from, bool wanted, int piece) {
  switch (piece) {
    case 8:
      return copy_async<16>(to, from, wanted);
    case 4:
      return copy_async<8>(to, from, wanted);
    case 2:
      return copy_async<4>(to, from, wanted);
    default:
      *to = wanted ? *from : T{0};
  }
}

// The part of a panel's tile that this thread copies, and later activates: always the same columns, every so many rows.
struct TileShare {
  int column, first_row, row_step;

  POSMLP_DEVICE TileShare(int threads, int piece) {
    const int per_row = kColumns / piece;
    column = thread_index() % per_row * piece;
    first_row = thread_index() / per_row;
    row_step = threads / per_row;
  }
};

// Which tensor a tile is made of.
enum class Source { x1, x2, dz };

template <class T>
POSMLP_DEVICE void copy_tile(T* tile, const Call<T>& call, Source source, const PanelColumn& column,
                             const TokenOffsets& offsets, const TileShare& share, int first_token, int rows, int tokens,
                             int piece) {
  const bool is_dz = source == Source::dz;
  const T* base = is_dz ? call.dz + column.dz : call.x + column.x + (source == Source::x2 ? call.shape.channels : 0);
  const int64_t* places = is_dz ? offsets.dz : offsets.x;
  const bool inside = column.channel >= 0;
  for (int row = share.first_row; row < rows; row += share.row_step) {
    const int token = first_token + row;
    const bool wanted = inside && token < tokens;
    copy_piece(tile + row * kTileStride + share.column, wanted ? base + places[token] + column.channel : base, wanted,
               piece);
  }
}

// Turns this thread's share of an arrived tile of X1 into what is mixed: activated and normalised.
template <class T>
POSMLP_DEVICE void finish_tokens(T* tile, const Call<T>& call, const PanelColumn& column, const TokenOffsets& offsets,
                                 const TileShare& share, int first_token, int rows, int tokens, int piece) {
  if (call.activation == Activation::none && !call.norm_weight) return;
  if (column.channel < 0) return;
  for (int row = share.first_row; row < rows && first_token + row < tokens; row += share.row_step) {
    const int64_t token = call.norm_weight ? column.token + offsets.token[first_token + row] : 0;
    for (int i = 0; i < piece; ++i) {
      T& value = tile[row * kTileStride + share.column + i];
      float x = activate(call.activation, to_accumulation(value));
      if (call.norm_weight) {
        const int64_t c = column.channel + i;
        x = (x - call.mean[token]) * call.rstd[token] * call.norm_weight[c] + call.norm_bias[c];
      }
      value = round_to<T>(x);
    }
  }
}

// dz * act(x2), in the place of dz.
template <class T>
POSMLP_DEVICE void finish_gradients(T* dz, const T* x2, Activation activation, const TileShare& share, int rows,
                                    int piece) {
  for (int row = share.first_row; row < rows; row += share.row_step)
    for (int i = 0; i < piece; ++i) {
      const int at = row * kTileStride + share.column + i;
      dz[at] = round_to<T>(to_accumulation(dz[at]) * activate(activation, to_accumulation(x2[at])));
    }
}

// Four 8 x 8 matrices of the 16 x 16 piece at `at`: down its columns first, or along its rows; as they lie, or transposed.
template <bool kAlongRows, bool kTransposing, class T>
POSMLP_DEVICE void load_piece(uint32_t (&r)[4], const T* at, int stride) {
  const int lane = thread_index() % kWarp, first = lane / 8 % 2 * 8, second = lane / 16 * 8, row = lane % 8;
  const T* matrix = kAlongRows ? at + (second + row) * stride + first : at + (first + row) * stride + second;
  if constexpr (kTransposing)
    load_matrices_transposed(r, matrix);
  else
    load_matrices(r, matrix);
}

// Fragments of a 16 x 16 piece of `a` whose first element is `at`; with kTransposed of the piece's transpose.
template <bool kTransposed, class T>
POSMLP_DEVICE void load_a(uint32_t (&a)[4], const T* at, int stride) {
  load_piece<kTransposed, kTransposed>(a, at, stride);
}

// Fragments of two neighbouring 16 x 8 pieces of `b`: b0 and b1 of one, then of the other. `at` is the first of a
// 16 x 16 piece [k][n], or with kTransposed of [n][k].
template <bool kTransposed, class T>
POSMLP_DEVICE void load_b(uint32_t (&b)[4], const T* at, int stride) {
  load_piece<kTransposed, !kTransposed>(b, at, stride);
}

}  // namespace posmlp::cuda
