// The geometry of one call: windows, tokens, addresses. Plain C++, shared by every kernel in this folder.
//
// Maps of one, two or three dimensions are all three-dimensional here, with leading dimensions of size 1. Windows tile
// the map from `-shift`, so that those at the edges may stick out. The tokens that a window has inside the map form a
// box; windows with the same box make a WindowClass, and a class is all that a kernel has to distinguish: there are at
// most three kinds of window along a dimension (first, inner, last).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace posmlp {

#ifdef __CUDACC__
#define POSMLP_BOTH __host__ __device__  // for the kernels of csrc/pos_gate/cuda_*
#else
#define POSMLP_BOTH
#endif

constexpr int kRank = 3;
constexpr int kMostClasses = 27;  // first, inner and last windows along each dimension

POSMLP_BOTH constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
POSMLP_BOTH constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

enum class Activation : int64_t { none, gelu, gelu_tanh };

// Strides of a map's tensor in elements; channels are contiguous.
struct View {
  int64_t batch = 0;
  int64_t map[kRank] = {0, 0, 0};

  POSMLP_BOTH int64_t offset(int64_t b, const int64_t* position) const {
    return b * batch + position[0] * map[0] + position[1] * map[1] + position[2] * map[2];
  }
};

struct Shape {
  int64_t batch = 0, channels = 0, groups = 1;  // B, C, S
  int64_t map[kRank] = {1, 1, 1}, window[kRank] = {1, 1, 1}, shift[kRank] = {0, 0, 0};

  POSMLP_BOTH int64_t group_channels() const { return channels / groups; }  // D
  POSMLP_BOTH int64_t window_tokens() const { return window[0] * window[1] * window[2]; }  // N
  POSMLP_BOTH int64_t map_tokens() const { return map[0] * map[1] * map[2]; }
  POSMLP_BOTH int64_t table_size() const { return (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1); }

  // Displacements in a relative table.
  POSMLP_BOTH View table_view() const {
    return {0, {(2 * window[1] - 1) * (2 * window[2] - 1), 2 * window[2] - 1, 1}};
  }

  // A contiguous tensor [B, *map, width].
  POSMLP_BOTH View contiguous(int64_t width) const {
    return {map_tokens() * width, {map[1] * map[2] * width, map[2] * width, width}};
  }
};

// The windows that have the same tokens: `box` sizes from `begin` on, in window coordinates.
struct WindowClass {
  int64_t begin[kRank], box[kRank];     // the tokens that are present
  int64_t first[kRank], count[kRank];   // which windows, per dimension of the window grid

  POSMLP_BOTH int64_t tokens() const { return box[0] * box[1] * box[2]; }
  POSMLP_BOTH int64_t windows(int64_t batch) const { return batch * count[0] * count[1] * count[2]; }

  // Where the first token of window `index` lies: its batch, and its position in the map.
  POSMLP_BOTH int64_t locate(const Shape& shape, int64_t index, int64_t* position) const {
    for (int d = kRank - 1; d >= 0; --d) {
      position[d] = (first[d] + index % count[d]) * shape.window[d] - shape.shift[d] + begin[d];
      index /= count[d];
    }
    return index;
  }

  // The place of present token `index` in the whole window, per dimension.
  POSMLP_BOTH void place(int64_t index, int64_t* position) const {
    for (int d = kRank - 1; d >= 0; --d) {
      position[d] = begin[d] + index % box[d];
      index /= box[d];
    }
  }

  // Which of the present tokens lies at a place in the whole window, -1 if none.
  POSMLP_BOTH int64_t index_of(const int64_t* position) const {
    int64_t index = 0;
    for (int d = 0; d < kRank; ++d) {
      const int64_t inside = position[d] - begin[d];
      if (inside < 0 || inside >= box[d]) return -1;
      index = index * box[d] + inside;
    }
    return index;
  }

  // The address of every present token relative to the first one.
  std::vector<int64_t> token_offsets(const View& view) const {
    std::vector<int64_t> offsets;
    offsets.reserve(tokens());
    int64_t p[kRank];
    for (p[0] = 0; p[0] < box[0]; ++p[0])
      for (p[1] = 0; p[1] < box[1]; ++p[1])
        for (p[2] = 0; p[2] < box[2]; ++p[2]) offsets.push_back(view.offset(0, p));
    return offsets;
  }

  // The place of every present token in the whole window.
  std::vector<int64_t> token_indices(const Shape& shape) const {
    const View window{0, {shape.window[1] * shape.window[2], shape.window[2], 1}};
    const int64_t origin = window.offset(0, begin);
    std::vector<int64_t> indices = token_offsets(window);
    for (int64_t& index : indices) index += origin;
    return indices;
  }
};

inline std::vector<WindowClass> window_classes(const Shape& shape) {
  struct Segment {
    int64_t begin, box, first, count;
  };
  std::vector<Segment> segments[kRank];
  for (int d = 0; d < kRank; ++d) {
    const int64_t size = shape.map[d], window = shape.window[d], shift = shape.shift[d];
    const int64_t windows = divide_up(size + shift, window);
    for (int64_t t = 0; size > 0 && t < windows; ++t) {
      const int64_t begin = t == 0 ? shift : 0;
      const int64_t box = std::min(window, size + shift - t * window) - begin;
      auto& known = segments[d];
      if (!known.empty() && known.back().begin == begin && known.back().box == box)
        known.back().count += 1;
      else
        known.push_back({begin, box, t, 1});
    }
  }
  std::vector<WindowClass> classes;
  for (const auto& a : segments[0])
    for (const auto& b : segments[1])
      for (const auto& c : segments[2])
        classes.push_back({{a.begin, b.begin, c.begin},
                           {a.box, b.box, c.box},
                           {a.first, b.first, c.first},
                           {a.count, b.count, c.count}});
  return classes;
}

}  // namespace posmlp
