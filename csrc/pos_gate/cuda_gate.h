// The host's part of the CUDA back end, as plain C++: what is launched, in which order, on what memory. A launcher has
//
//     template <class Kernel> void launch(const typename Kernel::Arguments&, int64_t grid, int64_t shared_bytes)
//
// A caller fills in a Call's problem, lets `plan` choose its sizes, allocates `lay_out(..., nullptr)` bytes, hands them
// to `lay_out` again, and calls `forward` or `backward`. Nothing here waits for the device or allocates.
#pragma once

#include "cuda_mixing.cuh"
#include "cuda_norm.cuh"
#include "cuda_plain.cuh"
#include "cuda_tensor_plan.h"

namespace posmlp::cuda {

constexpr int64_t kWaves = 4;                   // blocks of a backward for each multiprocessor
constexpr int64_t kMostPartialBytes = 64 << 20;  // of dP, unless a single one is larger
constexpr int64_t kMixingPadding = 16;          // rows of P: whole pieces of 16 bytes, in any type

// Into how many shares the columns of each group and class are cut where sums go over columns: so many that all
// multiprocessors have work, as far as there are columns and memory.
template <class T>
int64_t count_splits(const Call<T>& call, const Chip& chip) {
  using Tile = PlainTile<T>;
  const int64_t n = call.shape.window_tokens();
  const int64_t partial = call.class_count * call.shape.groups * n * n * int64_t(sizeof(Accumulation<T>));
  int64_t owners = 0, tiles = 1;
  for (int k = 0; k < call.class_count; ++k) {
    owners += call.shape.groups * Tile::row_tiles(call.classes[k]);
    tiles = std::max(tiles, Tile::column_tiles(call, call.classes[k]));
  }
  const int64_t wanted = divide_up(kWaves * chip.multiprocessors, std::max<int64_t>(owners, 1));
  return std::max<int64_t>(1, std::min({wanted, tiles, kMostPartialBytes / std::max<int64_t>(partial, 1)}));
}

// Sets everything of a call that follows from its problem.
template <class T>
void plan(Call<T>& call, const Chip& chip) {
  const auto classes = window_classes(call.shape);
  call.class_count = int(classes.size());
  std::copy(classes.begin(), classes.end(), call.classes);
  call.side = round_up(call.shape.window_tokens(), kMixingPadding);
  call.splits = count_splits(call, chip);
  const int64_t tokens = call.shape.batch * call.shape.map_tokens(), at_a_time = NormBackwardKernel<T>::kTokens;
  call.norm_blocks = std::max<int64_t>(1, std::min(divide_up(tokens, at_a_time), kWaves * chip.multiprocessors));
}

// The bytes of a call's workspace; places its parts from `base` on unless that is null. Parts that the call has no use
// for are null. The gradient of a matrix per group is that of the logits: it has to be there already.
template <class T>
int64_t lay_out(Call<T>& call, const Chip& chip, bool backward, bool mixing_grad, char* base) {
  const Shape& shape = call.shape;
  const int64_t n = shape.window_tokens(), tokens = shape.batch * shape.map_tokens(), kinds = call.class_count;
  const int64_t rows = kinds * shape.groups * n, norm = call.norm_weight ? tokens : 0;
  const MixingUse mixing = mixing_use(call, chip, backward);
  const bool statistics = call.softmax && (mixing_grad || mixing.rebuilt);
  const bool apart = mixing_grad && !call.matrix_per_group;
  int64_t bytes = 0;
  const auto place = [&](auto*& part, int64_t count) {
    part = base && count > 0 ? reinterpret_cast<std::remove_reference_t<decltype(part)>>(base + bytes) : nullptr;
    bytes += round_up(count * int64_t(sizeof(*part)), 256);
  };
  place(call.mixing, mixing.stored ? kinds * shape.groups * call.side * call.side : 0);
  place(call.mean, norm);
  place(call.rstd, norm);
  place(call.row_max, statistics ? rows : 0);
  place(call.row_rinv, statistics ? rows : 0);
  place(call.dmixing, mixing_grad ? rows * call.splits * n : 0);
  place(call.dlogits, apart ? shape.groups * n * n : 0);
  place(call.dbias_parts, backward && call.bias ? rows * call.splits : 0);
  place(call.dx_normed, backward ? norm * shape.channels : 0);
  place(call.dnorm_parts, backward && call.norm_weight ? 2 * call.norm_blocks * shape.channels : 0);
  if (mixing_grad && !apart) call.dlogits = call.dmatrix;
  return bytes;
}

template <class Kernel, class Launcher>
void launch(Launcher& launcher, const typename Kernel::Arguments& arguments) {
  const int64_t grid = Kernel::grid(arguments);
  if (grid > 0) launcher.template launch<Kernel>(arguments, grid, Kernel::kSharedBytes);
}

// What both directions begin with.
template <class T, class Launcher>
void prepare(Launcher& launcher, const Call<T>& call) {
  if (call.norm_weight) launch<StatisticsKernel<T>>(launcher, call);
  if (call.mixing || call.row_max) launch<MixingKernel<T>>(launcher, call);
}

template <class T, class Launcher>
void forward(Launcher& launcher, const Call<T>& call, const Chip& chip) {
  prepare(launcher, call);
  if constexpr (sizeof(T) == 2)
    if (on_tensor_cores(call, chip)) return launch_product<T, Product::gate>(launcher, call, chip);
  launch<PlainGateKernel<T>>(launcher, call);
}

// dx, and the sums by row.
template <class T, class Launcher>
void backward_of_tokens(Launcher& launcher, const Call<T>& call, const Chip& chip) {
  if constexpr (sizeof(T) == 2)
    if (on_tensor_cores(call, chip)) return launch_backward_products(launcher, call, chip);
  launch<PlainBackwardKernel<T>>(launcher, call);
}

template <class T, class Launcher>
void outer_product(Launcher& launcher, const Call<T>& call, const Chip& chip) {
  if constexpr (sizeof(T) == 2)
    if (on_tensor_cores(call, chip)) {
      if (call.shape.window_tokens() <= kFewKeyTiles * 8) return launch_outer<T, kFewKeyTiles>(launcher, call, chip);
      return launch_outer<T, kManyKeyTiles>(launcher, call, chip);
    }
  launch<PlainOuterKernel<T>>(launcher, call);
}

// The gradients of the table and of the matrix.
template <class T, class Launcher>
void backward_of_mixing(Launcher& launcher, const Call<T>& call, const Chip& chip) {
  const int64_t n = call.shape.window_tokens();
  outer_product(launcher, call, chip);
  launch<LogitsKernel<T>>(launcher, call);
  if (call.dtable) launch<TableKernel<T>>(launcher, call);
  if (call.dmatrix && !call.matrix_per_group)
    launch<ReduceKernel<T>>(launcher, {call.dlogits, call.dmatrix, call.shape.groups, n * n});
}

template <class T, class Launcher>
void backward(Launcher& launcher, const Call<T>& call, const Chip& chip) {
  const int64_t channels = call.shape.channels, blocks = call.norm_blocks;
  prepare(launcher, call);
  backward_of_tokens(launcher, call, chip);
  if (call.dmixing) backward_of_mixing(launcher, call, chip);
  if (call.dbias) launch<BiasKernel<T>>(launcher, call);
  if (!call.norm_weight) return;
  launch<NormBackwardKernel<T>>(launcher, call);
  launch<ReduceKernel<T>>(launcher, {call.dnorm_parts, call.dnorm_weight, blocks, channels});
  launch<ReduceKernel<T>>(launcher, {call.dnorm_parts + blocks * channels, call.dnorm_bias, blocks, channels});
}

}  // namespace posmlp::cuda
