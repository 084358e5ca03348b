// How the products on tensor cores are cut for a chip: pure functions of the shape, compiled and tested as plain C++.
#pragma once

#include <algorithm>

#include "cuda_tensor_outer.cuh"
#include "cuda_tensor_product.cuh"

namespace posmlp::cuda {

// Whether products of this type can run here at all; windows whose offsets would not fit are the plain kernels'.
template <class T>
bool on_tensor_cores(const Call<T>& call, const Chip& chip) {
  return sizeof(T) == 2 && chip.architecture >= 80 && call.shape.window_tokens() <= kMostTokens;
}

// The widest copies that the addresses allow, up to 8 elements (16 bytes), and whether pairs can be accessed as one word.
template <class T>
int widest_piece(const Call<T>& call, bool backward) {
  const auto divides = [&](int piece) {
    const auto fits = [&](const View& view, const void* data) {
      bool ok = view.batch % piece == 0 && reinterpret_cast<uintptr_t>(data) % (piece * sizeof(T)) == 0;
      for (int64_t stride : view.map) ok = ok && stride % piece == 0;
      return ok;
    };
    return call.shape.group_channels() % piece == 0 && fits(call.x_view, call.x) &&
           (backward ? fits(call.dz_view, call.dz) && fits(call.dx_view, call.dx) : fits(call.z_view, call.z));
  };
  for (int piece : {8, 4, 2})
    if (divides(piece)) return piece;
  return 1;
}

// Whether P can be made from a table in shared memory: a free matrix would not fit there either.
template <class T>
bool is_rebuildable(const Call<T>& call) {
  return call.table && !call.matrix;
}

// Blocks of as many rows as fit, for no row is read twice in one block; P is kept where it fits beside two stages.
// Where that leaves fewer warps than a multiprocessor has tensor cores, it is rather made anew, if it can be.
template <class T, Product kProduct>
TensorPlan plan_product(const Call<T>& call, const Chip& chip) {
  using Kernel = TensorProductKernel<T, kProduct>;
  constexpr int kStreamedKeys = 64;
  const int64_t tokens = call.shape.window_tokens();
  TensorPlan plan{};
  plan.piece = widest_piece(call, kProduct != Product::gate);
  plan.pairs = plan.piece > 1;
  const int all_warps = int(divide_up(tokens, 32)), fewest_warps = std::min(all_warps, is_rebuildable(call) ? 4 : 2);
  for (const bool keep : {true, false})
    for (int row_blocks = int(divide_up(all_warps, kMostWarps)); row_blocks <= all_warps; ++row_blocks) {
      // Half of the rows or fewer at a time are worth it only if P stays; else any tile will do.
      if (kProduct == Product::both && (!keep || row_blocks > 1)) continue;
      plan.warps = int(divide_up(all_warps, row_blocks));
      plan.row_blocks = int(divide_up(all_warps, plan.warps));
      if (keep && plan.warps < fewest_warps) break;
      plan.keep = keep;
      plan.rebuild = !keep && is_rebuildable(call);
      plan.keys = int(keep ? call.side : kStreamedKeys);
      plan.chunks = int(divide_up(call.side, plan.keys));
      for (plan.stages = 3; plan.stages >= 2; --plan.stages) {
        plan.shared_bytes = Kernel::shared_bytes(call.shape, plan);
        if (plan.shared_bytes <= chip.shared_bytes) return plan;
      }
    }
  plan.shared_bytes = -1;  // no cut fits
  return plan;
}

// Warps of the products that are cut into shares which a multiprocessor's 65536 registers hold: they take up to 144 a
// thread, from sm_100 on 160.
inline int64_t warps_side_by_side(const Chip& chip) { return 65536 / kWarp / (chip.architecture < 100 ? 144 : 160); }

// Into how many shares the panels of each group, class and block of rows are cut: as many blocks as run side by side,
// which then go on to the end, for a block's first work is to fetch its rows of P.
template <class T>
int64_t count_tensor_splits(const Call<T>& call, const Chip& chip, const TensorPlan& plan) {
  const int64_t blocks = std::min(chip.shared_bytes / plan.shared_bytes, warps_side_by_side(chip) / plan.warps);
  const int64_t side_by_side = chip.multiprocessors * std::clamp<int64_t>(blocks, 1, 4);
  int64_t panels = 1;
  for (int k = 0; k < call.class_count; ++k)
    panels =
        std::max(panels, divide_up(call.classes[k].windows(call.shape.batch) * call.shape.group_channels(), kColumns));
  return std::clamp<int64_t>(side_by_side / (call.class_count * call.shape.groups * plan.row_blocks), 1, panels);
}

// Keys of a block of dP: small windows take small pieces.
constexpr int kFewKeyTiles = 8, kManyKeyTiles = 26;

template <class T, int kKeyTiles>
OuterPlan plan_outer(const Call<T>& call, const Chip& chip) {
  using Kernel = TensorOuterKernel<T, kKeyTiles>;
  const int64_t tokens = call.shape.window_tokens();
  OuterPlan plan{};
  plan.piece = widest_piece(call, true);
  const int all_warps = int(divide_up(tokens, 16));
  plan.key_blocks = int(divide_up(tokens, Kernel::kKeys));
  for (int row_blocks = int(divide_up(all_warps, kMostWarps));; ++row_blocks) {
    plan.warps = int(divide_up(all_warps, row_blocks));
    plan.row_blocks = int(divide_up(all_warps, plan.warps));
    for (plan.stages = 3; plan.stages >= 2; --plan.stages) {
      plan.shared_bytes = Kernel::shared_bytes(call.shape, plan);
      if (plan.shared_bytes <= chip.shared_bytes || (plan.warps == 1 && plan.stages == 2)) return plan;
    }
  }
}

// What a call's products take P from: memory, or the table and the statistics of its rows.
struct MixingUse {
  bool stored, rebuilt;
};

template <class T>
MixingUse mixing_use(const Call<T>& call, const Chip& chip, bool backward) {
  MixingUse use{};
  const auto add = [&](const TensorPlan& plan) { (plan.rebuild ? use.rebuilt : use.stored) = true; };
  if constexpr (sizeof(T) == 2)
    if (on_tensor_cores(call, chip)) {
      if (!backward) {
        add(plan_product<T, Product::gate>(call, chip));
      } else if (const TensorPlan both = plan_product<T, Product::both>(call, chip); both.shared_bytes > 0) {
        add(both);
      } else {
        add(plan_product<T, Product::rows>(call, chip));
        add(plan_product<T, Product::columns>(call, chip));
      }
      return use;
    }
  return {true, false};
}

// ---- the launches ----

template <class T, Product kProduct, class Launcher>
void launch_product(Launcher& launcher, Call<T> call, const Chip& chip) {
  using Kernel = TensorProductKernel<T, kProduct>;
  const TensorPlan plan = plan_product<T, kProduct>(call, chip);
  if (kProduct == Product::gate || kProduct == Product::columns) call.splits = count_tensor_splits(call, chip, plan);
  launcher.template launch<Kernel>(typename Kernel::Arguments{call, plan}, Kernel::grid(call, plan), plan.shared_bytes,
                                   plan.warps * kWarp);
}

// dx, and the sums by row: in one pass where that fits.
template <class T, class Launcher>
void launch_backward_products(Launcher& launcher, const Call<T>& call, const Chip& chip) {
  if (plan_product<T, Product::both>(call, chip).shared_bytes > 0)
    return launch_product<T, Product::both>(launcher, call, chip);
  launch_product<T, Product::rows>(launcher, call, chip);
  launch_product<T, Product::columns>(launcher, call, chip);
}

template <class T, int kKeyTiles, class Launcher>
void launch_outer(Launcher& launcher, const Call<T>& call, const Chip& chip) {
  using Kernel = TensorOuterKernel<T, kKeyTiles>;
  const OuterPlan plan = plan_outer<T, kKeyTiles>(call, chip);
  launcher.template launch<Kernel>(typename Kernel::Arguments{call, plan}, Kernel::grid(call, plan), plan.shared_bytes,
                                   plan.warps * kWarp);
}

}  // namespace posmlp::cuda
