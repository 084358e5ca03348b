// The activations, with their slopes.
//
// Exact GELU is x Phi(x), Phi the normal distribution function; its slope is Phi(x) + x Phi'(x).
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

template <class V>
struct ActivationValue {
  V value, slope;
};

// max(x, 0), and NaN for some NaN: numbers are ordered as their bits are, but for the sign's.
template <class V>
inline V positive_part(V x) {
  const auto bits = (IntsOf<V>)x;
  return (V)(bits > 0 ? bits : IntsOf<V>{});
}

// At a = |x|, but no farther than where nothing is left: Q(a) = 1 - Phi(a), and Phi'(a).
template <class V>
struct NormalTail {
  V a, probability, density;

  explicit NormalTail(V x) {
    constexpr auto kMagnitude = std::numeric_limits<ElementOf<IntsOf<V>>>::max();  // all bits but the sign
    constexpr ElementOf<V> kEnd = std::is_same_v<ElementOf<V>, float> ? 9.001 : 40;
    const V magnitude = (V)((IntsOf<V>)x & kMagnitude);
    a = magnitude > kEnd ? fill<V>(kEnd) : magnitude;
    if constexpr (std::is_same_v<ElementOf<V>, float>) by_power();
    else by_ratio();
  }

  // The eighth root of Q is almost a straight line: a polynomial that gives a Q(a) and, by its slope, a Phi'(a) within
  // 2e-8, without a division or an exponential. It falls through 0 at 9, and is 0 beyond.
  void by_power() {
    constexpr float kRoot[] = {-2.8619880e-7f, 7.3497740e-6f,  -5.9546786e-5f, 3.2242435e-5f, 1.5077291e-3f,
                               -6.7510409e-4f, -3.1926483e-2f, -9.1457799e-2f, 9.1700405e-1f};
    V root = fill<V>(kRoot[0]), slope{};
    for (int i = 1; i < 9; ++i) {
      slope = slope * a + root;
      root = root * a + kRoot[i];
    }
    root = positive_part(root);
    const V square = root * root, fourth = square * square;
    probability = fourth * fourth;
    density = fourth * square * root * slope * -8.f;
  }
  // The ratio of Q to e^(-a^2 / 2) is w = 1 / (1 + a / 4) times a polynomial of 1 - w, within 7e-17 of Q.
  void by_ratio() {
    constexpr double kRatio[] = {
        0.005397301282692059, -0.012373449774623919, 0.0027590557428771416, 0.0030785942928715564,
        0.018678742736322262, -0.00073978682478801387, -0.054424455475446029, -0.030083996180991506,
        0.17900861885766053, 0.07384889948366633, -0.79807601277429649, 1.3084617567788693,
        -1.0957691216056701, 0.5};
    const V near = 1. / (a * 0.25 + 1.), far = 1. - near, decay = exponential(a * a * -0.5);
    V ratio{};
    for (double coefficient : kRatio) ratio = ratio * far + coefficient;
    probability = decay * near * ratio;
    density = decay * 0.39894228040143267794;
  }
};

// x Phi(x) as max(x, 0) - |x| Q(|x|), which cancels nowhere; the slope is Q(|x|) - |x| Phi'(x) for x < 0, and 1 less that
// otherwise.
template <class V>
inline V gelu(V x) {
  const NormalTail<V> tail(x);
  return positive_part(x) - tail.a * tail.probability;
}
template <class V>
inline ActivationValue<V> gelu_with_slope(V x) {
  using A = ElementOf<V>;
  const NormalTail<V> tail(x);
  const V slope = tail.probability - tail.a * tail.density;
  return {positive_part(x) - tail.a * tail.probability, x < 0 ? slope : A(1) - slope};
}

// The tanh form of GELU: 0.5 x (1 + tanh u) = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3).
template <class V>
inline ActivationValue<V> gelu_tanh(V x) {
  using A = ElementOf<V>;
  constexpr A kScale = A(0.79788456080286535588), kCubic = A(0.044715);
  const V u = kScale * (x + kCubic * x * x * x);
  const V decay = exponential(A(-2) * u), gate = A(1) / (A(1) + decay), rest = decay * gate;  // 1 - gate, uncancelled
  const V slope = kScale * (A(1) + A(3) * kCubic * x * x);
  return {x * gate, gate + A(2) * x * gate * rest * slope};
}

// Calls `work` with the activation as a constant, so that no vector has to ask for it.
template <class Work>
inline void with_constant(Activation activation, const Work& work) {
  switch (activation) {
    case Activation::none: return work(std::integral_constant<Activation, Activation::none>());
    case Activation::gelu: return work(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh: return work(std::integral_constant<Activation, Activation::gelu_tanh>());
  }
}
template <Activation kActivation, class V>
inline V activated(V x) {
  if constexpr (kActivation == Activation::none) return x;
  if constexpr (kActivation == Activation::gelu) return gelu(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh(x).value;
}
template <Activation kActivation, class V>
inline ActivationValue<V> activated_with_slope(V x) {
  if constexpr (kActivation == Activation::none) return {x, fill<V>(1)};
  if constexpr (kActivation == Activation::gelu) return gelu_with_slope(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh(x);
}
// *value = act(x), and *slope = act'(x) if it is wanted.
template <Activation kActivation, class V>
inline void store_activated(V x, ElementOf<V>* value, ElementOf<V>* slope) {
  if (!slope) return store(value, activated<kActivation>(x));
  const auto y = activated_with_slope<kActivation>(x);
  store(value, y.value);
  store(slope, y.slope);
}
