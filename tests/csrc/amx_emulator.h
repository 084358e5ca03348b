// Intel AMX's tile registers and those of their instructions that the gate uses, in software, for tests where there are
// none. Misuse that hardware answers with a fault, or with other numbers than were meant, ends the program.
//
// A product is done as Intel's manual has it: a fused multiply-add for each number of a pair, in two sums, which are then
// added, and their sum added to the destination; subnormal numbers are zeros on the way in and out.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace posmlp::amx {

struct Tile {
  int rows, row_bytes;
  unsigned char bytes[16][64];
};
struct Registers {
  bool shaped;
  Tile tiles[8];
};
inline Registers& registers() {
  static thread_local Registers registers{};
  return registers;
}

inline void demand(bool holds, const char* what, int tile = -1) {
  if (holds) return;
  std::fprintf(stderr, "AMX: %s (tile %d)\n", what, tile);
  std::abort();
}
inline Tile& tile_at(int i) {
  demand(registers().shaped, "a tile is used before LDTILECFG or after TILERELEASE", i);
  demand(i >= 0 && i < 8, "there are tiles 0 to 7", i);
  demand(registers().tiles[i].rows > 0, "a tile that has no shape is used", i);
  return registers().tiles[i];
}

inline void load_config(const void* from) {
  unsigned char config[64];
  std::memcpy(config, from, sizeof config);
  demand(config[0] == 1 && config[1] == 0, "LDTILECFG wants palette 1 and start row 0");
  for (int i = 2; i < 16; ++i) demand(config[i] == 0, "LDTILECFG wants zeros in reserved bytes");
  demand(!registers().shaped, "the tiles are shaped a second time");
  registers() = {};
  registers().shaped = true;
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * i, sizeof row_bytes);
    const int rows = config[48 + i];
    demand(i < 8 || (rows == 0 && row_bytes == 0), "palette 1 has 8 tiles", i);
    demand(rows <= 16 && row_bytes <= 64, "a tile has at most 16 rows of 64 bytes", i);
    demand((rows == 0) == (row_bytes == 0) && row_bytes % 4 == 0, "a tile has whole rows of whole words", i);
    if (i < 8) registers().tiles[i].rows = rows, registers().tiles[i].row_bytes = row_bytes;
  }
}
inline void release() {
  demand(registers().shaped, "TILERELEASE without LDTILECFG");
  registers() = {};
}
inline void zero(int i) { std::memset(tile_at(i).bytes, 0, sizeof(Tile::bytes)); }
inline void load(int i, const void* from, int64_t stride) {
  Tile& tile = tile_at(i);
  zero(i);  // also what is beyond its rows
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.bytes[r], static_cast<const char*>(from) + r * stride, size_t(tile.row_bytes));
}
inline void store(int i, void* to, int64_t stride) {
  const Tile& tile = tile_at(i);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tile.bytes[r], size_t(tile.row_bytes));
}

inline float flushed(float a) { return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.f, a) : a; }
inline float number(const Tile& tile, int row, int column) {
  uint16_t half;
  std::memcpy(&half, tile.bytes[row] + 2 * column, sizeof half);
  const uint32_t bits = uint32_t(half) << 16;
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return flushed(a);
}
__attribute__((target("fma"))) inline void multiply(int i_sum, int i_left, int i_right) {
  Tile &sum = tile_at(i_sum), &left = tile_at(i_left), &right = tile_at(i_right);
  demand(i_sum != i_left && i_sum != i_right && i_left != i_right, "TDPBF16PS wants three different tiles", i_sum);
  demand(sum.rows == left.rows && sum.row_bytes == right.row_bytes && left.row_bytes == 4 * right.rows,
         "TDPBF16PS wants tiles of [m, n], [m, k] and [k, n]", i_sum);
  float operands[16][32];
  for (int k = 0; k < right.rows; ++k)
    for (int c = 0; c < right.row_bytes / 2; ++c) operands[k][c] = number(right, k, c);
  for (int m = 0; m < sum.rows; ++m) {
    float sums[32] = {}, row[16];
    for (int k = 0; k < right.rows; ++k) {
      const float first = number(left, m, 2 * k), second = number(left, m, 2 * k + 1);
      for (int c = 0; c < right.row_bytes / 2; ++c)
        sums[c] = flushed(__builtin_fmaf(c % 2 ? second : first, operands[k][c], sums[c]));
    }
    std::memcpy(row, sum.bytes[m], sizeof row);
    for (int n = 0; n < sum.row_bytes / 4; ++n)
      row[n] = flushed(flushed(row[n]) + flushed(sums[2 * n] + sums[2 * n + 1]));
    std::memcpy(sum.bytes[m], row, size_t(sum.row_bytes));
  }
}

}  // namespace posmlp::amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_release
#define _tile_loadconfig posmlp::amx::load_config
#define _tile_release posmlp::amx::release
#define _tile_zero posmlp::amx::zero
#define _tile_loadd posmlp::amx::load
#define _tile_stored posmlp::amx::store
#define _tile_dpbf16ps posmlp::amx::multiply
