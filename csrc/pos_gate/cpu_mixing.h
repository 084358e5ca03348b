// The mixing matrix P of one group and window class: made, packed for the products, and the way back from its gradient.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// Kept from call to call by each thread, so that no pages are faulted in again.
template <class A, class E>
struct MixingBuffers {
  WeightBuffers<A> weights;
  PackingBuffers<A, E> packing;
  GradientBuffers gradient;
  TableGradientBuffers table_gradient;
};

// E: what the products multiply; epsilon: of the results' type.
template <class A, class E>
class Mixing {
 public:
  Mixing(const Call& call, double epsilon, MixingBuffers<A, E>& buffers)
      : weights_(call, epsilon, buffers.weights), packing_(call, weights_, buffers.packing),
        gradient_(call, weights_, buffers.gradient), table_gradient_(call, weights_, buffers.table_gradient) {}

  void prepare(const Window& window, int64_t group) { weights_.prepare(window, group); }

  // P but for `row_scales`, which belong to the results of a product by rows and to what a product by columns is given.
  // Tiles of queries whose steps are keys; tiles of keys whose steps are queries, the transpose.
  void pack_rows(Packed<E>& packed) { packing_.template pack<true>(packed); }
  void pack_columns(Packed<E>& packed) { packing_.template pack<false>(packed); }
  void row_scales(std::vector<A>& scales) const {  // of all tokens
    const double* const scale = weights_.scale();
    scales.assign(weights_.window().tokens, A(1));
    if (weights_.shared()) std::copy_n(scale, scales.size(), scales.begin());
  }

  void add_gradient(int64_t part, const A* dp, int64_t ld) { gradient_.add(part, dp, ld); }
  // What finds the table's gradient without dP, where that can be.
  TableGradient<A>* table_gradient() { return kDepthOf<E> == 1 && table_gradient_.applies() ? &table_gradient_ : nullptr; }

 private:
  Weights<A> weights_;
  Packing<A, E> packing_;
  MixingGradient<A> gradient_;
  TableGradient<A> table_gradient_;
};
