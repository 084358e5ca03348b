// dP = G X1^T on tensor cores, summed over a share of the windows; G = dz * act(x2), for 16-bit types.
//
// The sum runs over the long axis of columns, which panels cut as in the other products. A block owns a piece of dP of
// up to 16 rows a warp by kKeyTiles * 8 keys, whose sums stay in registers until its panels are through: 104 a thread
// for 208 keys, which are all of a 14 x 14 window, so that two blocks share it and dz and x2 are read once, x1 twice.
// That is why this is a pass of its own: the sums of one window's dP are N^2 floats, 150 KB for N = 196, and leave no
// registers for the products that dx needs. Bytes: 4C elements a token at N = 196, 3C for windows of up to 64 tokens.
#pragma once

#include "cuda_tensor_tiles.cuh"

namespace posmlp::cuda {

struct OuterPlan {
  int warps, row_blocks, key_blocks;
  int stages, piece;
  int64_t shared_bytes;
};

template <class T>
struct OuterArguments {
  Call<T> call;
  OuterPlan plan;
};

// kKeyTiles: 8 for windows of up to 64 tokens, 26 for larger ones.
template <class T, int kKeyTiles>
struct TensorOuterKernel {
  using Arguments = OuterArguments<T>;
  static constexpr int kThreads = kMostWarps * kWarp, kKeys = kKeyTiles * 8;

  static POSMLP_BOTH int64_t grid(const Call<T>& call, const OuterPlan& plan) {
    return call.shape.groups * plan.row_blocks * plan.key_blocks * call.class_count * call.splits;
  }
  static POSMLP_BOTH int rows(const OuterPlan& plan) { return 16 * plan.warps; }
  // A stage: dz and x2 of the rows, x1 of the keys.
  static POSMLP_BOTH int64_t stage_elements(const OuterPlan& plan) { return (2 * rows(plan) + kKeys) * kTileStride; }
  static POSMLP_BOTH int64_t shared_bytes(const Shape& shape, const OuterPlan& plan) {
    return plan.stages * stage_elements(plan) * 2 + TokenOffsets::bytes(shape);
  }

  static POSMLP_DEVICE void run(const Arguments& arguments, char* shared) {
    const Call<T>& call = arguments.call;
    const OuterPlan& plan = arguments.plan;
    const int threads = plan.warps * kWarp;
    const Unit unit(block_index(), call.shape, plan.row_blocks * plan.key_blocks, call.class_count);
    const int first_row = int(unit.row_block / plan.key_blocks) * rows(plan),
              first_key = int(unit.row_block % plan.key_blocks) * kKeys;
    const Panels<T> panels(call, unit, call.dz_view);
    const TileShare share(threads, plan.piece);
    const int tokens = panels.tokens();
    T* stages = reinterpret_cast<T*>(shared);
    const TokenOffsets offsets(stages + plan.stages * stage_elements(plan), call.shape);
    offsets.fill(call, call.dz_view, call.classes[unit.window_class], threads);
    sync_threads();

    const int64_t x2_at = int64_t(rows(plan)) * kTileStride, x1_at = 2 * x2_at;
    const auto stage = [&](int64_t step) { return stages + step % plan.stages * stage_elements(plan); };
    const auto panel = [&](int64_t step) { return unit.split + step * call.splits; };
    const int64_t mine = divide_up(panels.count() - unit.split, call.splits), steps = mine > 0 ? mine : 0;
    const auto copy = [&](int64_t step) {
      if (step < steps) {
        const PanelColumn column = panels.column(panel(step), share.column);
        T* tile = stage(step);
        copy_tile(tile, call, Source::dz, column, offsets, share, first_row, rows(plan), tokens, plan.piece);
        copy_tile(tile + x2_at, call, Source::x2, column, offsets, share, first_row, rows(plan), tokens, plan.piece);
        copy_tile(tile + x1_at, call, Source::x1, column, offsets, share, first_key, kKeys, tokens, plan.piece);
      }
      copies_commit();
    };

    float sums[kKeyTiles][4] = {};
    for (int64_t step = 0; step < plan.stages - 1; ++step) copy(step);
    for (int64_t step = 0; step < steps; ++step) {
      plan.stages == 2 ? copies_wait<0>() : copies_wait<1>();
      T* tile = stage(step);
      finish_gradients(tile, tile + x2_at, call.activation, share, rows(plan), plan.piece);
      if (call.norm_weight || call.activation != Activation::none) {
        const PanelColumn column = call.norm_weight ? panels.column(panel(step), share.column) : PanelColumn{};
        finish_tokens(tile + x1_at, call, column, offsets, share, first_key, kKeys, tokens, plan.piece);
      }
      sync_threads();
      copy(step + plan.stages - 1);
      multiply(tile, tile + x1_at, sums);
    }
    copies_wait<0>();
    store(call, unit, sums, first_row, first_key, tokens);
  }

 private:
  static POSMLP_DEVICE void multiply(const T* g, const T* x1, float (&sums)[kKeyTiles][4]) {
    const int row = thread_index() / kWarp * 16;
    POSMLP_UNROLL for (int k = 0; k < kColumns; k += 16) {
      uint32_t a[4];
      load_a<false>(a, g + row * kTileStride + k, kTileStride);
      POSMLP_UNROLL for (int c = 0; c < kKeyTiles; c += 2) {
        uint32_t b[4];
        load_b<true>(b, x1 + 8 * c * kTileStride + k, kTileStride);
        multiply_add(sums[c], a, b[0], b[1], T{});
        multiply_add(sums[c + 1], a, b[2], b[3], T{});
      }
    }
  }

  static POSMLP_DEVICE void store(const Call<T>& call, const Unit& unit, const float (&sums)[kKeyTiles][4],
                                  int first_row, int first_key, int tokens) {
    const int64_t n = call.shape.window_tokens();
    float* out =
        call.dmixing + ((unit.window_class * call.splits + unit.split) * call.shape.groups + unit.group) * n * n;
    const int row = first_row + thread_index() / kWarp * 16 + thread_index() % kWarp / 4;
    const int key = first_key + thread_index() % 4 * 2;
    POSMLP_UNROLL for (int c = 0; c < kKeyTiles; ++c)
      POSMLP_UNROLL for (int i = 0; i < 4; ++i) {
        const int at_row = row + i / 2 * 8, at_key = key + 8 * c + i % 2;
        if (at_row < tokens && at_key < tokens) out[at_row * n + at_key] = sums[c][i];
      }
  }
};

}  // namespace posmlp::cuda
