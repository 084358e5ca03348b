// How threads go through tokens and columns: every `step`-th one, by carries instead of divisions.
//
// A place among boxes of tokens, windows and channels is a number of several digits, whose first is unbounded. One
// thread's places differ by a constant, which is added digit by digit: some four instructions a digit, where a division
// by a number that no compiler knows takes twenty, and a 64-bit one a hundred.
#pragma once

#include "cuda_platform.h"

namespace posmlp::cuda {

template <int kDigits>
struct Walk {
  int at[kDigits], end[kDigits], size[kDigits], step[kDigits];

  // Digit d runs through `sizes[d]` values from `begin[d]` on. Starts at `index` in the order of the last digit first.
  POSMLP_BOTH Walk(const int64_t* begin, const int64_t* sizes, int64_t index, int stride) {
    for (int d = kDigits - 1; d >= 0; --d) size[d] = int(sizes[d]), end[d] = int(begin[d] + sizes[d]);
    for (int d = kDigits - 1; d > 0; --d) {
      at[d] = int(begin[d] + index % sizes[d]);
      step[d] = stride % size[d];
      index /= sizes[d];
      stride /= size[d];
    }
    at[0] = int(begin[0] + index);
    step[0] = stride;
  }

  POSMLP_BOTH void next() {
    int carry = 0;
    for (int d = kDigits - 1; d > 0; --d) {
      at[d] += step[d] + carry;
      carry = at[d] >= end[d];
      at[d] -= carry ? size[d] : 0;
    }
    at[0] += step[0] + carry;
  }
};

// The present tokens of a class of windows; `at` are their places in the whole window.
POSMLP_BOTH inline Walk<kRank> token_walk(const WindowClass& cls, int64_t index, int stride) {
  return {cls.begin, cls.box, index, stride};
}
// The same, counted from the first of them.
POSMLP_BOTH inline Walk<kRank> box_walk(const WindowClass& cls, int64_t index, int stride) {
  const int64_t zeros[kRank] = {0, 0, 0};
  return {zeros, cls.box, index, stride};
}
// All tokens of a whole window.
POSMLP_BOTH inline Walk<kRank> window_walk(const Shape& shape, int64_t index, int stride) {
  const int64_t zeros[kRank] = {0, 0, 0};
  return {zeros, shape.window, index, stride};
}
// The columns of a class and group: batch, window, channel of the group.
POSMLP_BOTH inline Walk<2 + kRank> column_walk(const Shape& shape, const WindowClass& cls, int64_t index, int stride) {
  const int64_t begin[2 + kRank] = {0, cls.first[0], cls.first[1], cls.first[2], 0};
  const int64_t sizes[2 + kRank] = {shape.batch, cls.count[0], cls.count[1], cls.count[2], shape.group_channels()};
  return {begin, sizes, index, stride};
}
// All tokens of the batch's maps: batch, then position.
POSMLP_BOTH inline Walk<1 + kRank> map_walk(const Shape& shape, int64_t index, int stride) {
  const int64_t zeros[1 + kRank] = {0, 0, 0, 0};
  const int64_t sizes[1 + kRank] = {shape.batch, shape.map[0], shape.map[1], shape.map[2]};
  return {zeros, sizes, index, stride};
}

POSMLP_BOTH inline int64_t offset_in(const View& view, const Walk<kRank>& token) {
  return token.at[0] * view.map[0] + token.at[1] * view.map[1] + token.at[2] * view.map[2];
}
POSMLP_BOTH inline int64_t offset_in(const View& view, const Walk<1 + kRank>& token) {
  return token.at[0] * view.batch + token.at[1] * view.map[0] + token.at[2] * view.map[1] + token.at[3] * view.map[2];
}

}  // namespace posmlp::cuda
