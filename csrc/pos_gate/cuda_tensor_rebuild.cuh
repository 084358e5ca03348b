// P made in registers, where it is multiplied, from the group's table in shared memory: for windows whose rows of P
// have no room there.
//
//     P[i, j] = e[j - i] s[i],   e = exp(R - M),   s[i] = exp(M - max[i]) / sum[i],   M: the largest of the rows' max
//
// so that an exponential is taken once per entry of the table, not once per pair of tokens and panel. Both are float32,
// and their product is rounded to 16 bits as a stored P is. Without softmax e is R, and s is 1. An entry that float32
// loses lies e^-87 below M, so e^-23 below the maximum of any row that is within kReach of M: no float32 sum sees it.
// Where a row lies deeper, all its keys being far from the table's centre, the block takes exp(R - max[i]) / sum[i] pair
// by pair. All blocks of a group and class look at the same rows, and decide alike.
//
// Bytes: the weights are 9 KB for a window of 24 x 24 and 16 KB for 32 x 32, and a token takes 12; P is 648 KB and 2 MB.
// Streamed, a number of P serves a panel's kColumns multiply-adds, 128 bytes for each mma; made here it takes none.
// Instructions: for 16 keys a warp has 8 mma, and a thread makes 16 numbers. It loads 4 places, then adds, loads and
// multiplies for each and rounds 8 pairs: 60, or 7 to 8 for each mma (columns loads 4 scales too). Exponentials would
// take the special function units 16 x 8 cycles, where the tensor cores of sm_80 take 64 for the 8 mma.
//
// What decides is shared memory. 20 loads by 32 lanes, one cycle each where the window's width is a multiple of 8 (eight
// rows by eight keys are neighbours in the table), and the tile's 1 KB make 28 cycles, 112 for the four warps that have
// the tensor cores at once. P streamed takes 24, but also 4 KB in those 64 cycles from the second-level cache: all that
// a multiprocessor's port takes, and a hundred of them share that cache. Each warp has rows of its own, so no number is
// made twice in a block; none is stored, and no barrier is added.
#pragma once

#include "cuda_reduce.cuh"
#include "cuda_tensor_tiles.cuh"

namespace posmlp::cuda {

constexpr float kReach = 64;  // of logits

template <class T>
class RebuiltMixing {
 public:
  struct Token {
    int place;             // its offset in the table
    float maximum, scale;  // of its row of P
  };

  // Tokens up to whole tiles of rows and whole chunks of keys.
  static POSMLP_BOTH int tokens(const TensorPlan& plan) {
    const int rows = plan.warps * kWarp * plan.row_blocks, keys = plan.keys * plan.chunks;
    return rows > keys ? rows : keys;
  }
  static POSMLP_BOTH int64_t bytes(const Shape& shape, const TensorPlan& plan) {
    return shape.table_size() * int64_t(sizeof(float)) + tokens(plan) * int64_t(sizeof(Token));
  }

  POSMLP_DEVICE RebuiltMixing(void* shared, const Shape& shape, const TensorPlan& plan)
      : tokens_(static_cast<Token*>(shared)),
        entries_(reinterpret_cast<float*>(tokens_ + tokens(plan))),
        centre_(int(shape.table_size() / 2)) {}

  // By all threads, which have to meet before they use it. Absent tokens stand for the first one, with a scale of zero.
  POSMLP_DEVICE void fill(const Call<T>& call, const TensorPlan& plan, const Unit& unit) {
    const WindowClass& windows = call.classes[unit.window_class];
    const int64_t row = (unit.window_class * call.shape.groups + unit.group) * call.shape.window_tokens();
    const int present = int(windows.tokens()), threads = plan.warps * kWarp, size = int(call.shape.table_size());
    float top = 0, bottom = 0;
    if (call.softmax) find_range(call.row_max + row, present, top, bottom);
    tabulated_ = top - bottom <= kReach;
    for (int i = thread_index(); i < tokens(plan); i += threads) {
      const int j = i < present ? i : 0;
      int64_t position[kRank];
      windows.place(j, position);
      Token token{int(call.shape.table_view().offset(0, position)), 0.0f, i < present ? 1.0f : 0.0f};
      if (call.softmax) token.maximum = call.row_max[row + j], token.scale *= call.row_rinv[row + j];
      if (tabulated_) token.scale *= exp(top - token.maximum);
      tokens_[i] = token;
    }
    const float* table = call.table + unit.group * size;
    for (int i = thread_index(); i < size; i += threads)
      entries_[i] = call.softmax && tabulated_ ? exp(table[i] - top) : table[i];
  }

  POSMLP_DEVICE const Token& token(int index) const { return tokens_[index]; }

  // Fragments of 16 x 16 pieces of P, or of its transpose: each one's rows g and g + 8, 16 columns from `column` on.
  template <bool kTransposed, int kPieces>
  POSMLP_DEVICE void load_a(uint32_t (&a)[kPieces][4], const Token (&rows)[kPieces][2], int column) const {
    const int first = column + thread_index() % 4 * 2;
    const Token columns[2][2] = {{token(first), token(first + 1)}, {token(first + 8), token(first + 9)}};
    const auto load = [&](auto weight) {
      POSMLP_UNROLL for (int piece = 0; piece < kPieces; ++piece)
        POSMLP_UNROLL for (int i = 0; i < 4; ++i) {
          const Token &row = rows[piece][i % 2], &one = columns[i / 2][0], &two = columns[i / 2][1];
          a[piece][i] = kTransposed ? round_pair<T>(weight(one, row), weight(two, row))
                                    : round_pair<T>(weight(row, one), weight(row, two));
        }
    };
    if (tabulated_)
      load([&](const Token& query, const Token& key) { return entry(query, key) * query.scale; });
    else
      load([&](const Token& query, const Token& key) { return exp(entry(query, key) - query.maximum) * query.scale; });
  }

 private:
  // The largest and the smallest of the rows' maxima, by each warp.
  POSMLP_DEVICE static void find_range(const float* maxima, int count, float& top, float& bottom) {
    top = -INFINITY, bottom = INFINITY;
    for (int i = thread_index() % kWarp; i < count; i += kWarp) {
      top = maxima[i] > top ? maxima[i] : top;
      bottom = maxima[i] < bottom ? maxima[i] : bottom;
    }
    top = warp_max(top);
    bottom = -warp_max(-bottom);
  }

  POSMLP_DEVICE float entry(const Token& query, const Token& key) const {
    return entries_[centre_ - query.place + key.place];
  }

  Token* const tokens_;
  float* const entries_;  // [table_size]: e, or R
  const int centre_;
  bool tabulated_ = true;
};

}  // namespace posmlp::cuda
