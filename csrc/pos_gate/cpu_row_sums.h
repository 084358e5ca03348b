// Sums over columns, for the gradients of the bias and of the table.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// The sum of each of as many vectors as one has lanes. Each of the log2(lanes) rounds interleaves the first half of them
// with the second.
template <class A, int kHalf = VectorOf<A>::kLanes / 2>
inline Vec<A> sum_of_each(Vec<A>* vectors) {
  if constexpr (kHalf > 0) {
    constexpr auto kLaneNumbers = std::make_integer_sequence<int, VectorOf<A>::kLanes>();
    for (int r = 0; r < kHalf; ++r) {
      const Vec<A> a = vectors[r], b = vectors[r + kHalf];
      vectors[r] = interleave<A, 0>(a, b, kLaneNumbers) + interleave<A, 1>(a, b, kLaneNumbers);
    }
    return sum_of_each<A, kHalf / 2>(vectors);
  }
  return vectors[0];
}

// For each of a window's tokens a sum over all columns: those of a panel are short, those over many panels are in double.
template <class A>
class RowSums {
 public:
  void clear(int64_t tokens) { totals_.assign(round_up(tokens, kDoubles) * kDoubles, 0.); }

  // A panel's part for the tokens from `token` on.
  class Rows {
   public:
    Rows(RowSums& sums, int64_t token) : totals_(&sums.totals_[token * kDoubles]) {}

    __attribute__((always_inline)) void add(int64_t k, const PanelRow<A>& terms) const {
      Vec<A> sum = terms[0];
      POSMLP_UNROLL for (int v = 1; v < kTileVectors; ++v) sum += terms[v];
      double* const total = totals_ + k * kDoubles;
      store(total, load<double>(total) + sum_of_parts<A>(sum));
    }

   private:
    double* totals_;
  };
  // Calls `use(token, sum)` for each.
  template <class Use>
  void for_each(int64_t tokens, const Use& use) const {
    for (int64_t first = 0; first < tokens; first += kDoubles) {
      DoubleVec sums[kDoubles];
      for (int k = 0; k < kDoubles; ++k) sums[k] = load<double>(&totals_[(first + k) * kDoubles]);
      const DoubleVec sum = sum_of_each<double>(sums);
      for (int k = 0; k < std::min<int64_t>(kDoubles, tokens - first); ++k) use(first + k, sum[k]);
    }
  }

 private:
  std::vector<double> totals_;
};

// Of a panel's rows what the bias's gradient wants, the sum of dU, and what a table's does, that of dU * Y.
template <class A>
struct PanelRowSums {
  typename RowSums<A>::Rows of_du, of_products;

  __attribute__((always_inline)) void add(int64_t k, const PanelRow<A>& du, const PanelRow<A>& y) const {
    PanelRow<A> products;
    POSMLP_UNROLL for (int v = 0; v < kTileVectors; ++v) products[v] = du[v] * y[v];
    of_du.add(k, du);
    of_products.add(k, products);
  }
};
