// transposed(x [M, K], ones) -> [K + ones, M]: a copy at the speed of memory, for the gradients of linear layers, and rows
// of ones below it, whose products are sums.
//
// A library's product that sums over its operands' first dimension wants one of them transposed, and PyTorch's own
// copy of that is slow. Here a block is as many numbers of 16 rows as a cache line has, read and written in whole lines
// and turned around in registers, 4 x 4 at a time. Bytes: 2 M K numbers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "../tensors.h"

namespace posmlp::transposed {
namespace {

constexpr int64_t kLine = 16;        // floats
constexpr int64_t kGrain = 1 << 15;  // numbers: less is not worth waking a thread
constexpr int64_t kAhead = 1 << 13;  // numbers, along which x is asked for: 16 streams at once are more than a processor
                                     // foresees by itself

typedef float Four __attribute__((vector_size(16)));
typedef int32_t Order __attribute__((vector_size(16)));

inline Four load(const float* from) {
  Four v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void store(float* to, Four v) { std::memcpy(to, &v, sizeof v); }

template <int a, int b, int c, int d>
inline Four shuffled(Four left, Four right) {
#ifdef __clang__
  return __builtin_shufflevector(left, right, a, b, c, d);
#else
  return __builtin_shuffle(left, right, Order{a, b, c, d});
#endif
}

// to[c, r] = from[r, c] for 4 x 4 numbers.
inline void turn(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  const Four r0 = load(from), r1 = load(from + ld_from), r2 = load(from + 2 * ld_from), r3 = load(from + 3 * ld_from);
  const Four low01 = shuffled<0, 4, 1, 5>(r0, r1), high01 = shuffled<2, 6, 3, 7>(r0, r1);
  const Four low23 = shuffled<0, 4, 1, 5>(r2, r3), high23 = shuffled<2, 6, 3, 7>(r2, r3);
  store(to, shuffled<0, 1, 4, 5>(low01, low23));
  store(to + ld_to, shuffled<2, 3, 6, 7>(low01, low23));
  store(to + 2 * ld_to, shuffled<0, 1, 4, 5>(high01, high23));
  store(to + 3 * ld_to, shuffled<2, 3, 6, 7>(high01, high23));
}

// to[c, r] = from[r, c] for `rows` x `columns` numbers, at most kLine each way.
inline void turn_block(const float* from, int64_t ld_from, float* to, int64_t ld_to, int64_t rows, int64_t columns) {
  if (rows == kLine && columns == kLine) {
    for (int64_t c = 0; c < kLine; c += 4)
      for (int64_t r = 0; r < kLine; r += 4) turn(from + r * ld_from + c, ld_from, to + c * ld_to + r, ld_to);
    return;
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * ld_to + r] = from[r * ld_from + c];
}

Tensor transposed(const Tensor& x, int64_t ones) {
  STD_TORCH_CHECK(x.dim() == 2, "transposed: x must be [M, K], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "transposed: x must be float32, got numbers of ",
                  x.element_size(), " bytes");
  STD_TORCH_CHECK(x.stride(1) == 1 || x.numel() == 0, "transposed: the rows of x must be contiguous, got a stride of ",
                  x.stride(1));
  STD_TORCH_CHECK(ones >= 0, "transposed: ones must not be negative, got ", ones);
  const int64_t rows = x.size(0), columns = x.size(1), ld = x.stride(0);
  Tensor y = new_tensor(x, {columns + ones, rows});
  const float* from = static_cast<const float*>(x.const_data_ptr());
  float* to = static_cast<float*>(y.mutable_data_ptr());
  std::fill_n(to + columns * rows, ones * rows, 1.f);
  // Strips of kLine rows of x: each reads whole rows, and writes whole lines of y.
  const int64_t strips = (rows + kLine - 1) / kLine, strip_size = kLine * std::max<int64_t>(columns, 1);
  torch::stable::parallel_for(0, strips, std::max<int64_t>(1, kGrain / strip_size), [&](int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; ++strip) {
      const int64_t r = strip * kLine, height = std::min(kLine, rows - r);
      for (int64_t c = 0; c < columns; c += kLine) {
        for (int64_t line = 0; line < kLine; ++line) __builtin_prefetch(from + r * ld + (c + line) * kLine + kAhead);
        turn_block(from + r * ld + c, ld, to + c * rows + r, rows, height, std::min(kLine, columns - c));
      }
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(posmlp_kernels, m) { m.def("transposed(Tensor x, int ones=0) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(posmlp_kernels, CPU, m) { m.impl("transposed", TORCH_BOX(&transposed)); }

}  // namespace posmlp::transposed
