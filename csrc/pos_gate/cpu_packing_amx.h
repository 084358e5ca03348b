// P as tile registers read it: a matrix of bfloat16, of which they take blocks of 16 rows of 16 pairs.
//
// Too few of them lie so in the table: a row of P is copied out of it or out of its mirror image, which are rounded once,
// by rows of the window. Its rows are whole cache lines, with zeros behind the last token. Blocks in which no weight counts
// are left out of the product.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class A, class E>
struct PackingBuffers {
  std::vector<double> mirrored;
  std::vector<Bfloat16> table;
};

template <class A, class E>
class Packing {
 public:
  Packing(const Call& call, const Weights<A>& weights, PackingBuffers<A, E>& buffers)
      : table_size_(call.shape.table_size()), weights_(weights), b_(buffers) {}

  template <bool kRows>
  void pack(Packed<E>& packed) {
    const int64_t tokens = window().tokens, ld = round_up(tokens, kKeys), rows = round_up(tokens, kTileRows);
    packed.clear();
    packed.weights.resize(rows * ld / 2 + kLine + kCopied / 2);  // not made anew where it has that size
    const int64_t start = (64 - size_t(packed.weights.data()) % 64) % 64 / sizeof(Pair);
    auto* const matrix = reinterpret_cast<Bfloat16*>(&packed.weights[start]);
    if (weights_.shared()) round_table<kRows>();
    for (int64_t i = 0; i < rows; ++i) {
      Bfloat16* const row = matrix + i * ld;
      if (i < tokens) write_row<kRows>(i, row);
      std::fill(row + (i < tokens ? tokens : 0), row + ld, Bfloat16{});
    }
    for (int64_t first = 0; first < tokens; first += kTileRows) {
      for (int64_t key = 0; key < tokens; key += kKeys)
        if (largest_of_block(matrix + first * ld + key, ld) > float(weights_.limit()))
          packed.add(start + (first * ld + key) / 2, key / 2 * kPanelOf<A>, divide_up(std::min(kKeys, tokens - key), 2), ld / 2);
      if (!packed.has_steps()) packed.add(start + first * ld / 2, 0, 1, ld / 2);  // of weights that do not count
      packed.end_tile();
    }
    packed.finish();
  }

 private:
  static constexpr int64_t kKeys = 2 * kStepsAtOnce;   // of a block
  static constexpr int64_t kLine = 64 / sizeof(Pair);  // pairs of a cache line
  static constexpr int64_t kCopied = 16;               // weights at a time, some of them beyond a row's end

  const Window& window() const { return weights_.window(); }

  // NaN counts as more than anything.
  static float largest_of_block(const Bfloat16* block, int64_t ld) {
    using Halves = Lanes<kKeys>::halves;
    Halves magnitudes{};  // their order is that of their bits
    for (int r = 0; r < kTileRows; ++r) {
      Halves row;
      __builtin_memcpy(&row, block + r * ld, sizeof row);
      row &= 0x7fff;
      magnitudes = row > magnitudes ? row : magnitudes;
    }
    Bfloat16 largest{};
    for (int i = 0; i < kKeys; ++i) largest.bits = std::max(largest.bits, uint16_t(magnitudes[i]));
    return widen(largest);
  }

  template <bool kRows>
  void round_table() {
    const int64_t size = table_size_;
    const double* weight = weights_.weight();  // with room for vectors
    if (!kRows) {
      make_room(b_.mirrored, size);
      std::reverse_copy(weight, weight + size, b_.mirrored.begin());
      weight = b_.mirrored.data();
    }
    b_.table.resize(round_up(size, kCopied) + kCopied);
    for (int64_t e = 0; e < size; e += kCopied) {
      float single[kCopied];
      for (int64_t i = 0; i < kCopied; i += kDoubles) store_rounded(single + i, load<double>(weight + e + i));
      narrow<kCopied>(single, &b_.table[e]);
    }
  }

  // The row of P, or of its transpose, of a token, and up to kCopied numbers more.
  template <bool kRows>
  void write_row(int64_t token, Bfloat16* to) const {
    const int64_t tokens = window().tokens, length = window().cls.box[2], *place = window().place.data();
    if (!weights_.shared()) {
      for (int64_t k = 0; k < tokens; ++k) narrow(float(weights_.weight_of(kRows ? token : k, kRows ? k : token)), to[k]);
      return;
    }
    const Bfloat16* const from = b_.table.data() + weights_.centre() - place[token];
    for (int64_t k = (length - 1) / kCopied * kCopied; k >= 0; k -= kCopied)  // what is too much is overwritten
      for (int64_t row = 0; row < tokens; row += length)
        __builtin_memcpy(to + row + k, from + place[row] + k, kCopied * sizeof(Bfloat16));
  }

  const int64_t table_size_;
  const Weights<A>& weights_;
  PackingBuffers<A, E>& b_;
};
