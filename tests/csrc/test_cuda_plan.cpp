// How the CUDA back end cuts the gates of PosMLP for each chip: what fits, what is kept, what a call needs. With
// "table" it prints the cuts instead of checking them.
#include <cstdio>
#include <cstring>
#include <string>

#include "cuda_gate.h"

using namespace posmlp;
using namespace posmlp::cuda;

namespace {

constexpr Chip kChips[] = {{108, 163 << 10, 80}, {84, 99 << 10, 86},    {128, 99 << 10, 89},
                           {132, 227 << 10, 90}, {148, 227 << 10, 100}, {170, 99 << 10, 120}};

struct Gate {
  const char* name;
  int64_t map, window, channels, groups, shift;
};
constexpr Gate kGates[] = {{"stage 1", 56, 14, 192, 8, 0},    {"stage 2", 28, 14, 384, 16, 0},
                           {"stage 3", 14, 14, 768, 32, 0},   {"stage 4", 7, 7, 768, 64, 0},
                           {"window 24", 48, 24, 192, 8, 0},  {"window 24, shifted", 56, 24, 192, 8, 12},
                           {"window 32", 32, 32, 384, 16, 0}, {"odd width", 20, 5, 21, 7, 2}};

int failures = 0;
void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("does not hold: %s\n", what.c_str());
}

alignas(16) Bf16 memory[8];  // nothing is read, only its alignment
const float parameter = 0;

Call<Bf16> call_of(const Gate& gate, const Chip& chip, int64_t batch, bool matrix = false) {
  Call<Bf16> call{};
  call.shape.batch = batch;
  call.shape.channels = gate.channels;
  call.shape.groups = gate.groups;
  for (int d = 1; d < kRank; ++d)
    call.shape.map[d] = gate.map, call.shape.window[d] = gate.window, call.shape.shift[d] = gate.shift;
  call.x = call.dz = call.z = call.dx = memory;
  call.x_view = call.dx_view = call.shape.contiguous(2 * gate.channels);
  call.z_view = call.dz_view = call.shape.contiguous(gate.channels);
  call.softmax = true;
  call.table = &parameter, call.matrix = matrix ? &parameter : nullptr;
  plan(call, chip);
  return call;
}

// Large windows: all of the table is in shared memory, and x is read no more often than registers demand.
template <Product kProduct>
void check_rebuild(const Call<Bf16>& call, const Chip& chip, const TensorPlan& p, const std::string& where) {
  const int64_t tokens = call.shape.window_tokens(), side = 2 * call.shape.window[2] - 1;
  expect(p.rebuild, where + "P is made from the table");
  expect(p.row_blocks == divide_up(divide_up(tokens, 32), kMostWarps), where + "as few blocks of rows as there can be");
  expect(RebuiltMixing<Bf16>::bytes(call.shape, p) >= side * side * 4 + tokens * 12, where + "the table has its place");
  TensorPlan streamed = p;
  streamed.rebuild = false;
  const int64_t rows_of_p = p.stages * TensorProductKernel<Bf16, kProduct>::p_elements(p) * 2;
  expect(p.shared_bytes - RebuiltMixing<Bf16>::bytes(call.shape, p) ==
             TensorProductKernel<Bf16, kProduct>::shared_bytes(call.shape, streamed) - rows_of_p,
         where + "and P has none");
  Call<Bf16> with_matrix = call;
  with_matrix.matrix = &parameter;
  const TensorPlan q = plan_product<Bf16, kProduct>(with_matrix, chip);
  expect(!q.rebuild && q.shared_bytes > 0 && q.shared_bytes <= chip.shared_bytes, where + "a free matrix is streamed");
}

template <Product kProduct>
TensorPlan check_product(const Gate& gate, const Chip& chip, const char* product) {
  const Call<Bf16> call = call_of(gate, chip, 128);
  const TensorPlan p = plan_product<Bf16, kProduct>(call, chip);
  const std::string where =
      std::string(gate.name) + ", " + product + ", sm_" + std::to_string(chip.architecture) + ": ";
  const int64_t tokens = call.shape.window_tokens();
  expect(p.shared_bytes > 0 && p.shared_bytes <= chip.shared_bytes, where + "shared memory fits");
  expect(p.warps >= 1 && p.warps <= kMostWarps && p.warps * 32 * p.row_blocks >= tokens,
         where + "all rows have a warp");
  expect(p.warps * 32 * (p.row_blocks - 1) < tokens, where + "no block is without rows");
  expect(p.keys % 16 == 0 && p.keys * p.chunks >= tokens && (!p.keep || p.chunks == 1), where + "all keys are covered");
  expect(p.stages == 2 || p.stages == 3, where + "two or three stages");
  expect(p.piece == (gate.channels / gate.groups % 8 ? gate.channels / gate.groups % 4 ? 1 : 4 : 8),
         where + "widest copies");
  // `columns` has two tensors in flight, which leave P no room on chips of 99 KB
  const bool roomy = chip.shared_bytes > 160 << 10, two = kProduct == Product::columns;
  if (tokens <= 196) expect(p.keep || (two && !roomy), where + "P stays in shared memory");
  if (tokens == 196) expect(p.row_blocks <= (roomy && !two ? 1 : 2), where + "x is read no more often than it must");
  expect(p.rebuild == !p.keep, where + "P that does not stay is made from the table");
  if (tokens > 196) check_rebuild<kProduct>(call, chip, p, where);
  return p;
}

// One pass for dx where P and three tiles fit: on every chip for small windows, on the largest for 14 x 14.
void check_both(const Gate& gate, const Chip& chip) {
  const Call<Bf16> call = call_of(gate, chip, 128);
  const TensorPlan p = plan_product<Bf16, Product::both>(call, chip);
  const std::string where = std::string(gate.name) + ", both, sm_" + std::to_string(chip.architecture) + ": ";
  const int64_t tokens = call.shape.window_tokens();
  expect(p.shared_bytes <= chip.shared_bytes, where + "shared memory fits");
  expect(p.shared_bytes < 0 || (p.keep && p.row_blocks == 1), where + "all of P is in one block");
  const bool wanted = tokens <= 64 || (tokens <= 196 && chip.shared_bytes >= 227 << 10);
  expect(!wanted || p.shared_bytes > 0, where + "it is possible");
}

void check_outer(const Gate& gate, const Chip& chip) {
  const Call<Bf16> call = call_of(gate, chip, 128);
  const OuterPlan p = plan_outer<Bf16, kManyKeyTiles>(call, chip);
  const std::string where = std::string(gate.name) + ", outer, sm_" + std::to_string(chip.architecture) + ": ";
  const int64_t tokens = call.shape.window_tokens();
  expect(p.shared_bytes <= chip.shared_bytes, where + "shared memory fits");
  expect(p.warps * 16 * p.row_blocks >= tokens && p.key_blocks * kManyKeyTiles * 8 >= tokens, where + "dP is covered");
}

// The gate's blocks run side by side: neither shared memory nor registers make some wait for others.
void check_splits(const Gate& gate, const Chip& chip) {
  const Call<Bf16> call = call_of(gate, chip, 128);
  const TensorPlan p = plan_product<Bf16, Product::gate>(call, chip);
  const int64_t fewest = call.class_count * gate.groups * p.row_blocks, splits = count_tensor_splits(call, chip, p);
  const int64_t blocks = divide_up(fewest * splits, chip.multiprocessors);  // of a multiprocessor
  const std::string where = std::string(gate.name) + ", shares, sm_" + std::to_string(chip.architecture) + ": ";
  expect(splits == 1 || blocks * p.shared_bytes <= chip.shared_bytes, where + "shared memory holds them");
  expect(splits == 1 || blocks * p.warps <= warps_side_by_side(chip), where + "registers hold them");
}

void check_workspace(const Gate& gate, const Chip& chip) {
  const std::string where = std::string(gate.name) + ", workspace, sm_" + std::to_string(chip.architecture) + ": ";
  for (const bool matrix : {false, true}) {
    Call<Bf16> call = call_of(gate, chip, 128, matrix);
    const int64_t rows = call.class_count * gate.groups, p_bytes = rows * call.side * call.side * 2;
    const bool stored = matrix || call.shape.window_tokens() <= 196;
    const int64_t statistics = stored ? 0 : 2 * rows * call.shape.window_tokens() * 4;
    const int64_t least = stored ? p_bytes : statistics;
    const int64_t bytes = lay_out(call, chip, false, false, nullptr);
    expect(bytes >= least && bytes <= least + 4096, where + "P, or the statistics of its rows, and nothing else");
  }
  Call<Bf16> call = call_of(gate, chip, 128);
  const int64_t n = call.shape.window_tokens(), x_bytes = 128 * gate.map * gate.map * 2 * gate.channels * 2;
  const int64_t backward = lay_out(call, chip, true, true, nullptr);
  const int64_t partial = call.class_count * gate.groups * n * n * 4;
  expect(backward <= 2 * x_bytes || call.splits == 1, where + "partial sums are small beside x, or single");
  expect(partial * call.splits <= kMostPartialBytes || call.splits == 1, where + "partial sums are bounded");
  Call<Bf16> again = call_of(gate, chip, 128);
  again.shape.batch = 1;
  plan(again, chip);
  expect(again.splits <= call.splits, where + "fewer columns, no more shares");
}

void print_table() {
  std::printf("gate|chip|rows x blocks|P is|stages|copies, bytes|shared memory, KB\n");
  for (const Gate& gate : kGates)
    for (const Chip& chip : kChips) {
      const TensorPlan p = plan_product<Bf16, Product::gate>(call_of(gate, chip, 128), chip);
      std::printf("%s|sm_%d|%d x %d|%s|%d|%d|%lld\n", gate.name, chip.architecture, p.warps * 32, p.row_blocks,
                  p.keep ? "kept" : p.rebuild ? "made" : "streamed", p.stages, 2 * p.piece,
                  (long long)(p.shared_bytes + 1023) / 1024);
    }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !std::strcmp(argv[1], "table")) return print_table(), 0;
  for (const Chip& chip : kChips)
    for (const Gate& gate : kGates) {
      check_product<Product::gate>(gate, chip, "gate");
      check_product<Product::rows>(gate, chip, "rows");
      check_product<Product::columns>(gate, chip, "columns");
      check_both(gate, chip);
      check_outer(gate, chip);
      check_splits(gate, chip);
      check_workspace(gate, chip);
    }
  std::printf("%d failed\n", failures);
  return failures > 0;
}
