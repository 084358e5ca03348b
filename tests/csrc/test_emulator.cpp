// The emulator by itself: each word against what its instruction is documented to do, and each fault reported.
#include <cstdio>
#include <string>

#include "cuda_platform.h"

using namespace posmlp::cuda;

namespace {

struct Buffers {
  const uint16_t *a, *b, *b_transposed;  // [16, 16], [16, 8], [8, 16]
  float *d, *d_transposed;               // [16, 8]
};

// d = a b by one warp, with b as it is and as its transpose.
template <class T>
struct ProductKernel {
  using Arguments = Buffers;
  static constexpr int kThreads = 32;
  static void run(const Arguments& buffers, char* shared) {
    uint16_t *s_a = reinterpret_cast<uint16_t*>(shared), *s_b = s_a + 256, *s_bt = s_b + 128;
    const int lane = thread_index(), g = lane / 4, t = 2 * (lane % 4);
    copy_async<16>(s_a + 8 * lane, buffers.a + 8 * lane, true);
    copies_commit();
    copy_async<8>(s_b + 4 * lane, buffers.b + 4 * lane, true);
    copy_async<4>(s_bt + 2 * lane, buffers.b_transposed + 2 * lane, true);
    copy_async<4>(s_bt + 64 + 2 * lane, buffers.b_transposed + 64 + 2 * lane, true);
    copies_wait<0>();  // of what is committed
    copies_commit();
    copies_wait<0>();
    sync_threads();
    uint32_t a[4], b[4];
    load_matrices(a, s_a + lane % 16 * 16 + lane / 16 * 8);
    load_matrices_transposed(b, s_b + lane % 16 * 8);
    multiply_and_store(buffers.d, a, b, g, t);
    load_matrices(b, s_bt + lane % 8 * 16 + lane / 8 % 2 * 8);
    multiply_and_store(buffers.d_transposed, a, b, g, t);
  }
  static void multiply_and_store(float* to, const uint32_t (&a)[4], const uint32_t (&b)[4], int g, int t) {
    float d[4] = {1, 1, 1, 1};
    multiply_add(d, a, b[0], b[1], T{});
    for (int e = 0; e < 4; ++e) to[(g + e / 2 * 8) * 8 + t + e % 2] = d[e];
  }
};

template <class T>
bool products_hold() {
  uint16_t a[256], b[128], bt[128];
  float d[128], dt[128];
  const auto value = [](int i, int j) { return round_to<T>(float((7 * i + 3 * j) % 11) - 4.5f); };
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) a[i * 16 + j] = value(i, j).bits;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) b[i * 8 + j] = bt[j * 16 + i] = value(j, i * i).bits;
  EmulatedLauncher().launch<ProductKernel<T>>({a, b, bt, d, dt}, 1, 1024);
  bool right = true;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = 1;
      for (int k = 0; k < 16; ++k) sum += to_accumulation(value(i, k)) * to_accumulation(value(j, k * k));
      right = right && d[i * 8 + j] == sum && dt[i * 8 + j] == sum;
    }
  return right;
}

// Every finite value survives, halfway cases go to the even one, and what lies beyond the largest is infinite.
template <class T>
bool rounding_holds(int fraction_bits, float largest, float smallest) {
  bool right = round_to<T>(NAN).bits == 0x7fff && round_to<T>(-smallest / 2).bits == 0x8000;
  const auto rounded = [](float x) { return to_accumulation(round_to<T>(x)); };
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = to_accumulation(T{uint16_t(bits)});
    if (std::isfinite(x)) right = right && round_to<T>(x).bits == bits;
  }
  const float step = std::ldexp(1.f, -fraction_bits), half = step / 2;
  right = right && rounded(1 + half) == 1 && rounded(1 + step + half) == 1 + 2 * step;
  right = right && rounded(std::nextafter(1 + half, 2.f)) == 1 + step && rounded(-1 - 0.9f * step) == -1 - step;
  right = right && rounded(1.5f * smallest) == 2 * smallest && rounded(0.5f * smallest) == 0;
  return right && rounded(largest * (1 + half / 4)) == largest && std::isinf(rounded(largest * (1 + step)));
}

enum class Fault { none, returned, diverged, overrun, misaligned, not_awaited };

// Threads hand a number to their neighbour by way of shared memory; or one of them does something wrong.
struct FaultyKernel {
  struct Arguments {
    Fault fault;
    const float* from;
    float* to;
  };
  static constexpr int kThreads = 64;
  static void run(const Arguments& arguments, char* shared) {
    const int t = thread_index();
    const Fault fault = t == 37 ? arguments.fault : Fault::none;
    float* s_values = reinterpret_cast<float*>(shared);
    if (fault == Fault::returned) return;
    if (fault == Fault::diverged) shuffle_xor(1.f, 1);
    const int place = fault == Fault::overrun ? 64 : t;
    copy_async<4>(shared + 4 * place + (fault == Fault::misaligned ? 2 : 0), arguments.from + t, true);
    copies_commit();
    if (fault != Fault::not_awaited) copies_wait<0>();
    sync_threads();
    arguments.to[block_index() * kThreads + t] = shuffle_xor(s_values[t ^ 32], 1);
  }
};

bool hands_over(Fault fault) {
  constexpr int kBlocks = 8;
  float from[64], to[kBlocks * 64];
  for (int i = 0; i < 64; ++i) from[i] = float(i);
  EmulatedLauncher().launch<FaultyKernel>({fault, from, to}, kBlocks, sizeof from);
  bool right = true;
  for (int i = 0; i < kBlocks * 64; ++i) right = right && to[i] == float(i % 64 ^ 33);
  return right;
}

}  // namespace

// test_emulator [number of a fault]: which is to end the program with a message, or to show in the results.
int main(int argc, char** argv) {
  if (argc > 1) return hands_over(Fault(std::stoi(argv[1]))) ? 0 : 1;
  const bool right[] = {products_hold<Bf16>(), products_hold<Half>(), rounding_holds<Bf16>(7, 0x1.fep127f, 0x1p-133f),
                        rounding_holds<Half>(10, 65504.f, 0x1p-24f), hands_over(Fault::none)};
  for (bool each : right) std::fputs(each ? "passed " : "FAILED ", stdout);
  for (bool each : right)
    if (!each) return 1;
  return 0;
}
