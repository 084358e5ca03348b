// P as tile registers read it: blocks of a row's steps side by side.
//
// Too few of them lie so in the table. All weights are copied, a row of the window at a time, out of the table's or its
// mirror image's, which are rounded once.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class A>
struct PackingBuffers {
  std::vector<Bfloat16> table, tile;
};

template <class A, class E>
class Packing {
 public:
  Packing(const Call& call, const Weights<A>& weights, PackingBuffers<A>& buffers)
      : table_size_(call.shape.table_size()), weights_(weights), b_(buffers) {}

  template <bool kRows>
  void pack(Packed<E>& packed) {
    packed.clear();
    if (weights_.shared()) round_table<kRows>();
    const auto write = [&](int64_t token, auto* to) { write_row<kRows>(token, to); };
    pack_blocks(packed, window().tokens, b_.tile, write, [&](int64_t first, int64_t rows, int64_t key, int64_t keys) {
      if (!weights_.shared()) return weights_.negligible();
      const double* scale = weights_.scale() + (kRows ? first : key);
      return weights_.negligible() / *std::max_element(scale, scale + (kRows ? rows : keys));
    });
  }

 private:
  const Window& window() const { return weights_.window(); }

  template <bool kRows>
  void round_table() {
    const int64_t size = table_size_;
    b_.table.resize(size + kOvershoot);
    for (int64_t e = 0; e < size; ++e) narrow(float(weights_.weight()[kRows ? e : size - 1 - e]), b_.table[e]);
  }
  // The row of P, or of its transpose, of a token, and up to kOvershoot numbers more.
  template <bool kRows>
  void write_row(int64_t token, Bfloat16* to) const {
    const int64_t tokens = window().tokens, length = window().cls.box[2], *place = window().place.data();
    if (!weights_.shared())
      for (int64_t k = 0; k < tokens; ++k) narrow(float(weights_.weight_of(kRows ? token : k, kRows ? k : token)), to[k]);
    else
      for (int64_t row = 0; row < tokens; row += length)
        for (int64_t k = 0; k < length; k += kOvershoot)
          __builtin_memcpy(to + row + k, &b_.table[weights_.centre() - place[token] + place[row] + k], 2 * kOvershoot);
  }

  const int64_t table_size_;
  const Weights<A>& weights_;
  PackingBuffers<A>& b_;
};
