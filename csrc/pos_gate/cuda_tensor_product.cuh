// The products with P on tensor cores, for 16-bit types:
//
//     gate      Y = P X1,   z   = (Y + b) * x2
//     rows      Y = P X1,   dx2 = dz * (Y + b) * act'(x2),  db += G                       G = dz * act(x2)
//     columns               dx1 = P^T G * act'(x1), or the gradient of the normed X1
//     both      rows, then columns, of a panel that is read once
//
// A block keeps its rows of P (of P^T) in shared memory and streams panels past them: while it multiplies one, the next
// are on their way. Each warp has 32 rows and the panel's kColumns columns, 32 sums a thread. Where P does not fit,
// panels come in chunks of keys, and P's rows are made anew from the table (cuda_tensor_rebuild.cuh), or, if a free
// matrix has part in them, come along from the second-level cache. What the epilogue needs of x and dz is fetched into
// registers before the product, so that its latency hides behind it.
//
// Bytes: gate reads 2C and writes C elements a token. both reads 3C and writes 2C, the least there is (with an activation
// x1 comes once more, from the cache). It needs all of P and three tiles a stage in one block: 197 KB for a window of
// 14 x 14, which sm_90 and sm_100 have. Elsewhere rows reads 3C and writes C, columns reads 2C or 3C and writes C; blocks
// that run side by side find each other's lines in the second-level cache.
#pragma once

#include "cuda_tensor_rebuild.cuh"
#include "cuda_tensor_tiles.cuh"

namespace posmlp::cuda {

enum class Product { gate, rows, columns, both };

template <class T>
struct ProductArguments {
  Call<T> call;
  TensorPlan plan;
};

template <class T, Product kProduct>
struct TensorProductKernel {
  using Arguments = ProductArguments<T>;
  static constexpr int kThreads = kMostWarps * kWarp, kRowTiles = 2, kColumnTiles = kColumns / 8;
  static constexpr bool kTransposed = kProduct == Product::columns, kBoth = kProduct == Product::both;
  static constexpr Product kFirst = kBoth ? Product::rows : kProduct;
  static constexpr int kTiles = kBoth ? 3 : kTransposed ? 2 : 1;  // X1, x2, dz; or dz, x2; or X1

  static POSMLP_BOTH int64_t grid(const Call<T>& call, const TensorPlan& plan) {
    return call.shape.groups * plan.row_blocks * call.class_count * call.splits;
  }

  // Shared memory, in bytes: P, then the stages' tiles and columns, the offsets of tokens, and what P is made from.
  static POSMLP_BOTH int64_t p_stride(const TensorPlan& plan) {
    return (kTransposed ? plan.warps * 32 : plan.keys) + kPadding;
  }
  static POSMLP_BOTH int64_t p_elements(const TensorPlan& plan) {
    return (kTransposed ? plan.keys : plan.warps * 32) * p_stride(plan);
  }
  static POSMLP_BOTH int64_t stage_elements(const TensorPlan& plan) {
    return kTiles * plan.keys * kTileStride + (plan.keep || plan.rebuild ? 0 : p_elements(plan));
  }
  static POSMLP_BOTH int64_t shared_bytes(const Shape& shape, const TensorPlan& plan) {
    const int64_t elements = (plan.keep ? p_elements(plan) : 0) + plan.stages * stage_elements(plan);
    return elements * 2 + plan.stages * kColumns * int64_t(sizeof(PanelColumn)) + TokenOffsets::bytes(shape) +
           (plan.rebuild ? RebuiltMixing<T>::bytes(shape, plan) : 0);
  }

  static POSMLP_DEVICE void run(const Arguments& arguments, char* shared) { Block(arguments, shared).run(); }

 private:
  struct Block {
    const Call<T>& call;
    const TensorPlan& plan;
    const Unit unit;
    const View& out_view;
    const Panels<T> panels;
    const TileShare share;
    const int threads, tokens, row0;  // row0: the block's first row
    T *const kept, *const stages;
    PanelColumn* const columns;
    const TokenOffsets offsets;
    RebuiltMixing<T> rebuilt;
    float sums[kRowTiles][kColumnTiles][4];
    float row_gradients[kRowTiles][2];
    uint32_t words[2][kRowTiles][kColumnTiles][2];  // pairs of x2 (or x1), and of dz

    POSMLP_DEVICE Block(const Arguments& arguments, char* shared)
        : call(arguments.call),
          plan(arguments.plan),
          unit(block_index(), call.shape, plan.row_blocks, call.class_count),
          out_view(kProduct == Product::gate ? call.z_view : call.dx_view),
          panels(call, unit, out_view),
          share(plan.warps * kWarp, plan.piece),
          threads(plan.warps * kWarp),
          tokens(panels.tokens()),
          row0(int(unit.row_block) * plan.warps * 32),
          kept(reinterpret_cast<T*>(shared)),
          stages(kept + (plan.keep ? p_elements(plan) : 0)),
          columns(reinterpret_cast<PanelColumn*>(stages + plan.stages * stage_elements(plan))),
          offsets(columns + plan.stages * kColumns, call.shape),
          rebuilt(offsets.end(call.shape), call.shape, plan) {}

    POSMLP_DEVICE int64_t tile_size() const { return int64_t(plan.keys) * kTileStride; }
    POSMLP_DEVICE T* stage(int64_t step) const { return stages + step % plan.stages * stage_elements(plan); }
    POSMLP_DEVICE PanelColumn* columns_of(int64_t step) const { return columns + step % plan.stages * kColumns; }
    POSMLP_DEVICE int64_t panel(int64_t step) const { return unit.split + step / plan.chunks * call.splits; }
    POSMLP_DEVICE int first_key(int64_t step) const { return int(step % plan.chunks) * plan.keys; }

    POSMLP_DEVICE void run() {
      for (auto& pair : row_gradients) pair[0] = pair[1] = 0;
      offsets.fill(call, out_view, call.classes[unit.window_class], threads);
      if (plan.rebuild) rebuilt.fill(call, plan, unit);
      sync_threads();
      const int64_t mine = divide_up(panels.count() - unit.split, call.splits);  // panels; negative if none
      const int64_t steps = (mine > 0 ? mine : 0) * plan.chunks;
      if (plan.keep) copy_p(kept, 0);
      for (int64_t step = 0; step < plan.stages - 1; ++step) copy(step, steps);
      for (int64_t step = 0; step < steps; ++step) {
        plan.stages == 2 ? copies_wait<0>() : copies_wait<1>();
        finish(step);
        sync_threads();
        copy(step + plan.stages - 1, steps);
        if (step % plan.chunks == 0) begin<kFirst>(step);
        if (!kBoth && plan.rebuild)
          multiply_rebuilt(first_key(step), stage(step));
        else
          multiply_stored<kTransposed>(plan.keep ? kept : stage(step) + kTiles * tile_size(), stage(step));
        if (step % plan.chunks == plan.chunks - 1) end<kFirst>(step);
        if constexpr (kBoth) {
          sync_threads();  // G has taken the place of dz
          begin<Product::columns>(step);
          multiply_stored<true>(kept, stage(step) + 2 * tile_size());
          end<Product::columns>(step);
        }
      }
      copies_wait<0>();
      if constexpr (kFirst == Product::rows)
        if (call.dbias_parts) store_row_sums();
    }

    // ---- from global to shared memory ----

    // The block's rows of P, keys [first, first + plan.keys), or the same of P^T.
    POSMLP_DEVICE void copy_p(T* to, int first) const {
      const T* p = call.mixing_of(unit.window_class, unit.group);
      const int rows = kTransposed ? plan.keys : plan.warps * 32,
                pieces = (kTransposed ? plan.warps * 32 : plan.keys) / 8;
      const int from_row = kTransposed ? first : row0, from_column = kTransposed ? row0 : first;
      for (int i = thread_index(); i < rows * pieces; i += threads) {
        const int row = i / pieces, column = i % pieces * 8;
        const bool inside = from_row + row < call.side && from_column + column < call.side;
        const T* from = p + (from_row + row) * call.side + from_column + column;
        copy_async<16>(to + row * p_stride(plan) + column, inside ? from : p, inside);
      }
    }

    POSMLP_DEVICE void copy(int64_t step, int64_t steps) const {
      if (step < steps) {
        const PanelColumn column = panels.column(panel(step), share.column);
        if (share.first_row == 0)
          for (int i = 0; i < plan.piece; ++i)
            columns_of(step)[share.column + i] = i ? panels.column(panel(step), share.column + i) : column;
        T* tile = stage(step);
        const int first = first_key(step);
        constexpr Source kSources[] = {kTransposed ? Source::dz : Source::x1, Source::x2, Source::dz};
        for (int i = 0; i < kTiles; ++i, tile += tile_size())
          copy_tile(tile, call, kSources[i], column, offsets, share, first, plan.keys, tokens, plan.piece);
        if (!plan.keep && !plan.rebuild) copy_p(tile, first);
      }
      copies_commit();
    }

    // What this thread has copied has arrived: make of it what the product takes.
    POSMLP_DEVICE void finish(int64_t step) const {
      T* tile = stage(step);
      if constexpr (kTransposed) {
        finish_gradients(tile, tile + tile_size(), call.activation, share, plan.keys, plan.piece);
      } else if (call.norm_weight || call.activation != Activation::none) {
        const PanelColumn column = call.norm_weight ? panels.column(panel(step), share.column) : PanelColumn{};
        finish_tokens(tile, call, column, offsets, share, first_key(step), plan.keys, tokens, plan.piece);
      }
    }

    // ---- the product ----

    template <bool kOfTransposed>
    POSMLP_DEVICE void multiply_stored(const T* p, const T* tile) {
      const int warp_row = thread_index() / kWarp * 32, stride = int(p_stride(plan));
      multiply(tile, [&](uint32_t (&a)[kRowTiles][4], int k) {
        POSMLP_UNROLL for (int r = 0; r < kRowTiles; ++r) {
          const int row = warp_row + 16 * r;
          load_a<kOfTransposed>(a[r], p + (kOfTransposed ? k * stride + row : row * stride + k), stride);
        }
      });
    }

    POSMLP_DEVICE void multiply_rebuilt(int first, const T* tile) {
      typename RebuiltMixing<T>::Token rows[kRowTiles][2];
      POSMLP_UNROLL for (int r = 0; r < kRowTiles; ++r)
        POSMLP_UNROLL for (int half = 0; half < 2; ++half) rows[r][half] = rebuilt.token(row_of(r, half));
      multiply(tile,
               [&](uint32_t (&a)[kRowTiles][4], int k) { rebuilt.template load_a<kTransposed>(a, rows, first + k); });
    }

    // `load_rows` gets the fragments of this warp's rows of P, at 16 of the keys that the tile has.
    template <class LoadRows>
    POSMLP_DEVICE void multiply(const T* tile, LoadRows load_rows) {
      for (int k = 0; k < plan.keys; k += 16) {
        uint32_t a[kRowTiles][4], b[kColumnTiles / 2][4];
        load_rows(a, k);
        POSMLP_UNROLL for (int c = 0; c < kColumnTiles / 2; ++c)
          load_b<false>(b[c], tile + k * kTileStride + 16 * c, kTileStride);
        POSMLP_UNROLL for (int r = 0; r < kRowTiles; ++r)
          POSMLP_UNROLL for (int c = 0; c < kColumnTiles; ++c)
            multiply_add(sums[r][c], a[r], b[c / 2][c % 2 * 2], b[c / 2][c % 2 * 2 + 1], T{});
      }
    }

    // ---- the epilogue: of each 16 x 8 piece a thread has rows g and g + 8, columns t and t + 1 ----

    POSMLP_DEVICE int row_of(int r, int half) const {
      return row0 + thread_index() / kWarp * 32 + 16 * r + 8 * half + thread_index() % kWarp / 4;
    }
    POSMLP_DEVICE static int column_of(int c) { return 8 * c + thread_index() % 4 * 2; }

    template <class Visit>
    POSMLP_DEVICE void for_each_pair(const PanelColumn* at, Visit visit) {
      POSMLP_UNROLL for (int r = 0; r < kRowTiles; ++r)
        POSMLP_UNROLL for (int half = 0; half < 2; ++half) {
          const int row = row_of(r, half);
          if (row >= tokens) continue;
          POSMLP_UNROLL for (int c = 0; c < kColumnTiles; ++c)
            visit(r, half, row, c, at[column_of(c)], at[column_of(c) + 1]);
        }
    }

    // Clears the sums, and fetches what `end` will need and is not in shared memory.
    template <Product kPart>
    POSMLP_DEVICE void begin(int64_t step) {
      POSMLP_UNROLL for (auto& rows : sums)
        POSMLP_UNROLL for (auto& piece : rows) piece[0] = piece[1] = piece[2] = piece[3] = 0;
      constexpr bool kColumnsPart = kPart == Product::columns;
      if (kBoth && !kColumnsPart) return;
      if (kColumnsPart && (call.activation == Activation::none || call.norm_weight)) return;
      const T* x = call.x + (kColumnsPart ? 0 : call.shape.channels);
      for_each_pair(columns_of(step), [&](int r, int half, int row, int c, const auto& one, const auto& two) {
        words[0][r][c][half] =
            load_pair(x + one.x + offsets.x[row] + one.channel, x + two.x + offsets.x[row] + two.channel, one, two);
        if constexpr (kPart == Product::rows)
          words[1][r][c][half] = load_pair(call.dz + one.dz + offsets.dz[row] + one.channel,
                                           call.dz + two.dz + offsets.dz[row] + two.channel, one, two);
      });
    }

    // The outputs, from the sums, x2 (or x1) and dz. In `both`, rows leaves G where columns will read it.
    template <Product kPart>
    POSMLP_DEVICE void end(int64_t step) {
      for_each_pair(columns_of(step), [&](int r, int half, int row, int c, const auto& one, const auto& two) {
        if (one.channel < 0) return;
        uint32_t x = words[0][r][c][half], dz = kPart == Product::rows ? words[1][r][c][half] : 0;
        uint32_t* const in_tile = reinterpret_cast<uint32_t*>(stage(step) + row * kTileStride + column_of(c));
        if constexpr (kBoth && kPart == Product::rows) x = in_tile[tile_size() / 2], dz = in_tile[tile_size()];
        float out[2], gradients[2];
        POSMLP_UNROLL for (int i = 0; i < 2; ++i)
          out[i] = value<kPart>(row, sums[r][c][2 * half + i], part(x, i), part(dz, i), gradients[i]);
        if constexpr (kPart == Product::rows)
          row_gradients[r][half] += gradients[0] + (two.channel >= 0 ? gradients[1] : 0.0f);
        if constexpr (kBoth && kPart == Product::rows)
          in_tile[tile_size()] = round_pair<T>(gradients[0], gradients[1]);
        store<kPart>(row, one, two, out);
      });
    }

    template <Product kPart>
    POSMLP_DEVICE float value(int row, float sum, float x, float dz, float& gradient) const {
      if constexpr (kPart == Product::columns) {
        const bool flat = call.activation == Activation::none || call.norm_weight;
        return flat ? sum : sum * activation_slope(call.activation, x);
      } else {
        const float mixed = sum + (call.bias ? call.bias[token_index(row)] : 0.0f), gate = activate(call.activation, x);
        if constexpr (kPart == Product::gate) return mixed * gate;
        gradient = dz * gate;
        return dz * mixed * activation_slope(call.activation, x);
      }
    }

    template <Product kPart>
    POSMLP_DEVICE void store(int row, const PanelColumn& one, const PanelColumn& two, const float (&out)[2]) const {
      if (kPart == Product::columns && call.norm_weight) {
        float* to = call.dx_normed + one.channel + (one.token + offsets.token[row]) * call.shape.channels;
        to[0] = out[0];
        if (two.channel >= 0) to[two.channel - one.channel + (two.token - one.token) * call.shape.channels] = out[1];
        return;
      }
      T* to = (kProduct == Product::gate ? call.z : call.dx) + offsets.out[row];
      if (kPart == Product::rows) to += call.shape.channels;
      store_pair(to + one.out + one.channel, to + two.out + two.channel, out, two.channel >= 0);
    }

    // The place of a class's token in the whole window, where its bias is.
    POSMLP_DEVICE int64_t token_index(int row) const {
      int64_t position[kRank];
      call.classes[unit.window_class].place(row, position);
      return (position[0] * call.shape.window[1] + position[1]) * call.shape.window[2] + position[2];
    }

    // ---- pairs of 16-bit values ----

    POSMLP_DEVICE static float part(uint32_t word, int i) {
      return to_accumulation(T{uint16_t(i ? word >> 16 : word)});
    }

    POSMLP_DEVICE uint32_t load_pair(const T* first, const T* second, const PanelColumn& one,
                                     const PanelColumn& two) const {
      if (one.channel < 0) return 0;
      if (plan.pairs) return *reinterpret_cast<const uint32_t*>(first);
      return first->bits | (two.channel < 0 ? 0u : uint32_t(second->bits) << 16);
    }

    POSMLP_DEVICE void store_pair(T* first, T* second, const float (&out)[2], bool both) const {
      const uint32_t pair = round_pair<T>(out[0], out[1]);
      if (plan.pairs) {
        *reinterpret_cast<uint32_t*>(first) = pair;
        return;
      }
      *first = T{uint16_t(pair)};
      if (both) *second = T{uint16_t(pair >> 16)};
    }

    POSMLP_DEVICE void store_row_sums() const {
      const int64_t n = call.shape.window_tokens();
      const int64_t at = ((unit.window_class * call.splits + unit.split) * call.shape.groups + unit.group) * n;
      POSMLP_UNROLL for (int r = 0; r < kRowTiles; ++r)
        POSMLP_UNROLL for (int half = 0; half < 2; ++half) {
          float gradient = row_gradients[r][half];
          for (int mask = 1; mask < 4; mask *= 2) gradient += shuffle_xor(gradient, mask);
          const int row = row_of(r, half);
          if (thread_index() % 4 || row >= n) continue;
          call.dbias_parts[at + row] = row < tokens ? gradient : 0;
        }
    }
  };
};

}  // namespace posmlp::cuda
