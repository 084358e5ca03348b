// The two register tiles of cpu_gemm.h on Intel AMX: tile registers of 16 rows of 64 bytes, and an instruction, TDPBF16PS,
// that adds to one of 16 x 16 floats the product of 16 rows of 16 pairs and 16 steps of 16 columns.
//
// The operands of 16 steps are where they always are: pairs of a panel's rows, a panel's row apart. Weights are taken by
// blocks of 16 rows of 16 steps, each row a cache line of a matrix. For each block a panel takes three products and loads
// four tiles. A sum over dP's 24 pairs is two of 12, in registers of that shape, so that it takes in
// nothing that is not a number of it.
//
// Registers: 0, 1, 2 sums; 3 weights, 4 and 5 operands of 16 steps; 6 and 7 the same of 12 for dP.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

constexpr int kOuterSteps = 12;
static_assert(kTileRows == 16 && kTileVectors == 3 && kStepsAtOnce == 16);
static_assert(kTileVectors * kVectorBytes / int(sizeof(float)) / 2 % kOuterSteps == 0);

// Shapes the registers for as long as a kernel runs.
class TileRegisters {
 public:
  TileRegisters() { _tile_loadconfig(&kShapes); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static constexpr Shapes kShapes = {
      1, 0, {}, {64, 64, 64, 64, 64, 64, 4 * kOuterSteps, 64}, {16, 16, 16, 16, 16, 16, 16, kOuterSteps}};
};

// Compilers do not know that a tile is loaded from memory: what was stored to it must not wait, nor be left out.
inline void finish_stores() { __asm__ volatile("" : : : "memory"); }

template <int kVectors>
inline void zero_sums() {
  _tile_zero(0);
  if constexpr (kVectors > 1) _tile_zero(1);
  if constexpr (kVectors > 2) _tile_zero(2);
}
template <int kVectors>
inline void store_sums(float* to, int64_t ld) {
  constexpr int kLanes = VectorOf<float>::kLanes;
  _tile_stored(0, to, ld * sizeof(float));
  if constexpr (kVectors > 1) _tile_stored(1, to + kLanes, ld * sizeof(float));
  if constexpr (kVectors > 2) _tile_stored(2, to + 2 * kLanes, ld * sizeof(float));
}

// Each run is a block of weights, kTileRows rows of kStepsAtOnce, `stride` apart.
template <class A, class E, int kAsks, bool, bool, int, int kVectors, bool, class Out>
__attribute__((noinline)) void multiply_tile(const TileRuns& runs, const E* all_weights, const E* from, const Out& to,
                                             Wanted& wanted) {
  constexpr int64_t kLanes = VectorOf<A>::kLanes, kPanel = kPanelOf<A>, kStride = kPanel * sizeof(E);
  Wanted::Queue queue = wanted.queue;
  const auto ask = [&] {  // as often as in so many steps of the other instruction sets
    for (int i = 0; i < kAsks * kStepsAtOnce / kVectors; ++i) queue.ask<(kAsks > 1)>();
  };
  finish_stores();
  zero_sums<kVectors>();
  for (const Run *run = runs.of[kAllRows].begin, *const end = runs.of[kAllRows].end; run < end; ++run) {
    const E* operands = from + run->row;
    _tile_loadd(3, all_weights + run->at, run->stride * sizeof(E));
    _tile_loadd(4, operands, kStride);
    _tile_dpbf16ps(0, 3, 4);
    ask();
    if constexpr (kVectors > 1) {
      _tile_loadd(5, operands + kLanes, kStride);
      _tile_dpbf16ps(1, 3, 5);
      ask();
    }
    if constexpr (kVectors > 2) {
      _tile_loadd(4, operands + 2 * kLanes, kStride);
      _tile_dpbf16ps(2, 3, 4);
      ask();
    }
  }
  wanted.queue = queue;
  store_sums<kVectors>(to, kPanel);
}

template <class A, class E, int, int kVectors>
__attribute__((noinline)) void add_outer_tile(const E* left, int64_t left_rows, int64_t panels, const E* right,
                                              const int32_t* at, A* to, int64_t ld) {
  constexpr int64_t kLanes = VectorOf<A>::kLanes, kSteps = kPanelOf<A> / kDepthOf<E>;
  finish_stores();
  zero_sums<kVectors>();
  for (int64_t panel = 0; panel < panels; ++panel, left += left_rows * kSteps)
    for (int64_t c = 0; c < kSteps; c += kOuterSteps, right += kOuterSteps * ld) {
      _tile_loadd(6, left + c, kSteps * sizeof(E));
      _tile_loadd(7, right + at[0], ld * sizeof(E));
      _tile_dpbf16ps(0, 6, 7);
      if constexpr (kVectors > 1) {
        _tile_loadd(7, right + at[1], ld * sizeof(E));
        _tile_dpbf16ps(1, 6, 7);
      }
      if constexpr (kVectors > 2) {
        _tile_loadd(7, right + at[2], ld * sizeof(E));
        _tile_dpbf16ps(2, 6, 7);
      }
    }
  A sums[kTileRows][kVectors * kLanes];
  store_sums<kVectors>(sums[0], kVectors * kLanes);
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      A* sum = to + r * ld + at[v];
      store(sum, load<A>(sum) + load<A>(sums[r] + v * kLanes));  // added last, as there
    }
}
