// The gate's products on ordinary multiply-add units: for float64, for float32 where its products are to be exact, and
// as the check of those on tensor cores, which take the same arguments.
//
//     PlainGateKernel      z = (P X1 + b) * x2                                   X1: activated and normed
//     PlainBackwardKernel  dx2 = dz * (P X1 + b) * act'(x2),  dx1 = P^T G * act'(x1),  G = dz * act(x2)
//                          and dbias = sum of G by row, over a share of the columns
//     PlainOuterKernel     dP = G X1^T over a share of the columns
//
// With tiles of 64 rows, x is read once per 64 tokens of a window (four times at a window of 14 x 14), from the
// second-level cache but for the first time: blocks of the same columns follow each other. Backward, a block keeps its
// rows and goes through its share of the columns, so that the sums by row stay in registers; no sum crosses blocks.
#pragma once

#include "cuda_plain_tile.cuh"

namespace posmlp::cuda {

template <class T>
struct PlainGateKernel {
  using A = Accumulation<T>;
  using Arguments = Call<T>;
  using Tile = PlainTile<T>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int64_t kSharedBytes = Tile::kSharedBytes;
  static int64_t grid(const Arguments& call) {
    return Tile::sum_of_classes(call, [&](const WindowClass& cls) { return blocks(call, cls); });
  }

  POSMLP_DEVICE static void run(const Arguments& call, char* shared) {
    int64_t index = block_index();
    const int k = Tile::find_class(call, index, [&](const WindowClass& cls) { return blocks(call, cls); });
    const WindowClass& cls = call.classes[k];
    const int64_t rows = Tile::row_tiles(cls), row = index % rows * Tile::kSide, tiles = Tile::column_tiles(call, cls);
    const int64_t column = index / rows % tiles * Tile::kSide + thread_index();
    Tile tile(call, k, index / rows / tiles, shared);
    tile.find_columns(column_walk(call.shape, cls, column, 0), column);
    typename Tile::Sums sums;
    tile.multiply_x1(row, sums);
    tile.for_each_row(row, [&](int r, int64_t, const auto& token) {
      const A bias = tile.bias(token);
      T* z = call.z + offset_in(call.z_view, token);
      tile.for_each_column([&](int c, const Column& at) {
        z[at.z] = round_to<T>((sums[r][c] + bias) * activate(call.activation, tile.raw_x2(at, token)));
      });
    });
  }

 private:
  static POSMLP_BOTH int64_t blocks(const Arguments& call, const WindowClass& cls) {
    return call.shape.groups * Tile::row_tiles(cls) * Tile::column_tiles(call, cls);
  }
};

// A block's share of a class: split, group, and the tiles of columns from `first` on.
template <class T>
struct Share {
  int64_t split, group, first, last;

  POSMLP_DEVICE Share(const Call<T>& call, const WindowClass& cls, int64_t index)
      : split(index / call.shape.groups), group(index % call.shape.groups) {
    const int64_t tiles = PlainTile<T>::column_tiles(call, cls);
    first = tiles * split / call.splits;
    last = tiles * (split + 1) / call.splits;
  }
  // Calls `work()` for each of its tiles, whose columns have been found.
  template <class Work>
  POSMLP_DEVICE void for_each_tile(const Call<T>& call, const WindowClass& cls, PlainTile<T>& tile, Work&& work) const {
    constexpr int kSide = PlainTile<T>::kSide;
    int64_t column = first * kSide + thread_index();
    auto walk = column_walk(call.shape, cls, column, kSide);
    for (int64_t t = first; t < last; ++t, column += kSide, walk.next()) {
      tile.find_columns(walk, column);
      work();
    }
  }
  // Of partial sums [classes, splits, S].
  POSMLP_DEVICE int64_t part(const Call<T>& call, int k) const {
    return (k * call.splits + split) * call.shape.groups + group;
  }
};

template <class T>
struct PlainBackwardKernel {
  using A = Accumulation<T>;
  using Arguments = Call<T>;
  using Tile = PlainTile<T>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int64_t kSharedBytes = Tile::kSharedBytes;
  static int64_t grid(const Arguments& call) {
    return Tile::sum_of_classes(call, [&](const WindowClass& cls) { return blocks(call, cls); });
  }

  POSMLP_DEVICE static void run(const Arguments& call, char* shared) {
    int64_t index = block_index();
    const int k = Tile::find_class(call, index, [&](const WindowClass& cls) { return blocks(call, cls); });
    const WindowClass& cls = call.classes[k];
    const int64_t rows = Tile::row_tiles(cls), row = index % rows * Tile::kSide;
    const Share<T> share(call, cls, index / rows);
    Tile tile(call, k, share.group, shared);
    A bias_sums[Tile::kEach] = {0, 0, 0, 0};
    share.for_each_tile(call, cls, tile, [&] {
      typename Tile::Sums sums;
      tile.multiply_x1(row, sums);
      tile.for_each_row(row, [&](int r, int64_t, const auto& token) {
        finish_x2(call, tile, token, sums[r], bias_sums[r]);
      });
      tile.multiply_g(row, sums);
      tile.for_each_row(row, [&](int r, int64_t, const auto& token) { finish_x1(call, tile, token, sums[r]); });
    });
    if (call.dbias_parts)
      store_rows(tile, row, bias_sums, call.dbias_parts + share.part(call, k) * call.shape.window_tokens());
  }

 private:
  static POSMLP_BOTH int64_t blocks(const Arguments& call, const WindowClass& cls) {
    return call.splits * call.shape.groups * Tile::row_tiles(cls);
  }

  POSMLP_DEVICE static void finish_x2(const Arguments& call, const Tile& tile, const Walk<kRank>& token,
                                      const A (&sums)[Tile::kEach], A& bias_sum) {
    const A bias = tile.bias(token);
    T* dx2 = call.dx + call.shape.channels + offset_in(call.dx_view, token);
    tile.for_each_column([&](int c, const Column& at) {
      const A dz = tile.dz(at, token), x2 = tile.raw_x2(at, token);
      dx2[at.dx] = round_to<T>(dz * (sums[c] + bias) * activation_slope(call.activation, x2));
      bias_sum += dz * activate(call.activation, x2);
    });
  }

  // Of the normed X1 where there is a norm, whose kernel does the rest.
  POSMLP_DEVICE static void finish_x1(const Arguments& call, const Tile& tile, const Walk<kRank>& token,
                                      const A (&sums)[Tile::kEach]) {
    tile.for_each_column([&](int c, const Column& at) {
      if (call.norm_weight) {
        const int64_t t = at.token + offset_in(call.shape.contiguous(1), token);
        call.dx_normed[t * call.shape.channels + at.channel] = sums[c];
      } else {
        const A x1 = to_accumulation(call.x[at.x + offset_in(call.x_view, token)]);
        call.dx[at.dx + offset_in(call.dx_view, token)] = round_to<T>(sums[c] * activation_slope(call.activation, x1));
      }
    });
  }

  // The 16 threads that have a row are lanes side by side.
  POSMLP_DEVICE static void store_rows(const Tile& tile, int64_t row, A (&sums)[Tile::kEach], A* to) {
    for (A& sum : sums)
      for (int mask = 1; mask < Tile::kSide / Tile::kEach; mask *= 2) sum += shuffle_xor(sum, mask);
    if (Tile::own_column() == 0)
      tile.for_each_row(row, [&](int r, int64_t i, const auto&) { to[i] = sums[r]; });
  }
};

template <class T>
struct PlainOuterKernel {
  using A = Accumulation<T>;
  using Arguments = Call<T>;
  using Tile = PlainTile<T>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int64_t kSharedBytes = Tile::kSharedBytes;
  static int64_t grid(const Arguments& call) {
    return Tile::sum_of_classes(call, [&](const WindowClass& cls) { return blocks(call, cls); });
  }

  POSMLP_DEVICE static void run(const Arguments& call, char* shared) {
    int64_t index = block_index();
    const int k = Tile::find_class(call, index, [&](const WindowClass& cls) { return blocks(call, cls); });
    const WindowClass& cls = call.classes[k];
    const int64_t rows = Tile::row_tiles(cls), n = call.shape.window_tokens(), tokens = cls.tokens();
    const int64_t row = index % rows * Tile::kSide, key = index / rows % rows * Tile::kSide;
    const Share<T> share(call, cls, index / rows / rows);
    Tile tile(call, k, share.group, shared);
    typename Tile::Sums sums;
    Tile::clear(sums);
    share.for_each_tile(call, cls, tile, [&] { tile.add_outer(row, key, sums); });
    A* dmixing = call.dmixing + share.part(call, k) * n * n + key + Tile::own_column();
    tile.for_each_row(row, [&](int r, int64_t i, const auto&) {
      for (int c = 0; c < Tile::kEach; ++c)
        if (key + Tile::own_column() + c < tokens) dmixing[i * n + c] = sums[r][c];
    });
  }

 private:
  static POSMLP_BOTH int64_t blocks(const Arguments& call, const WindowClass& cls) {
    return call.splits * call.shape.groups * Tile::row_tiles(cls) * Tile::row_tiles(cls);
  }
};

}  // namespace posmlp::cuda
