// A full panel's rows from map to registers and back: no access is wider than what lies side by side, so that none touches a
// line of another group, and none crosses two vectors.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// Where the rows of a full panel lie in a map, if its columns are seated in this way.
template <Seating kSeating, class A, class U>
class Seats {
 public:
  Seats(const Map<U>& map, const Panel& panel) : offset_(map.offset.data()) {
    const Piece* piece = panel.pieces.data();
    for (int i = 0; i < 4; ++i) {
      while (piece->column + piece->count <= kColumns[i]) ++piece;
      at_[i] = reinterpret_cast<Byte*>(map.first(*piece) + kColumns[i] - piece->column);
    }
  }

  // Those of the tokens from `token` on.
  Seats from(int64_t token) const {
    Seats seats = *this;
    seats.offset_ += token;
    return seats;
  }

  __attribute__((always_inline)) void load(int64_t row, PanelRow<A>& values) const {
    const int64_t offset = offset_[row];
    const auto half = [=](int i, int channel) __attribute__((always_inline)) {
      return load_as<A, kHalf>(at(i, offset) + channel);
    };
    if constexpr (kSeating == Seating::halves) {
      values[0] = load_as<A, kLanes>(at(0, offset));
      values[1] = join<Vec<A>>(half(1, 0), half(2, 0));
      values[2] = load_as<A, kLanes>(at(3, offset));
    } else {
      const auto quarters = [=](int i, int j) __attribute__((always_inline)) {
        return join<Half>(load_as<A, kQuarter>(at(i, offset) + kHalf), load_as<A, kQuarter>(at(j, offset)));
      };
      values[0] = join<Vec<A>>(half(0, 0), quarters(0, 1));
      values[1] = join<Vec<A>>(half(1, kQuarter), half(2, 0));
      values[2] = join<Vec<A>>(quarters(2, 3), half(3, kQuarter));
    }
  }
  __attribute__((always_inline)) void store(int64_t row, const PanelRow<A>& values) const {
    const int64_t offset = offset_[row];
    const auto store_half = [=](int i, int channel, Half half) __attribute__((always_inline)) {
      store_as(at(i, offset) + channel, half);
    };
    if constexpr (kSeating == Seating::halves) {
      store_as(at(0, offset), values[0]);
      store_half(1, 0, part_of<Half, 0>(values[1]));
      store_half(2, 0, part_of<Half, 1>(values[1]));
      store_as(at(3, offset), values[2]);
    } else {
      const auto store_quarters = [=](int i, int j, Half quarters) __attribute__((always_inline)) {
        store_as(at(i, offset) + kHalf, part_of<Vec<A, kQuarter>, 0>(quarters));
        store_as(at(j, offset), part_of<Vec<A, kQuarter>, 1>(quarters));
      };
      store_half(0, 0, part_of<Half, 0>(values[0]));
      store_quarters(0, 1, part_of<Half, 1>(values[0]));
      store_half(1, kQuarter, part_of<Half, 0>(values[1]));
      store_half(2, 0, part_of<Half, 1>(values[1]));
      store_quarters(2, 3, part_of<Half, 0>(values[2]));
      store_half(3, kQuarter, part_of<Half, 1>(values[2]));
    }
  }

 private:
  static constexpr int kLanes = VectorOf<A>::kLanes, kHalf = kLanes / 2, kQuarter = std::max(1, kLanes / 4);
  static constexpr bool kByHalves = kSeating == Seating::halves;
  // Of what `at_` says: the first vector, the halves of the second and the third vector, or four windows.
  static constexpr int64_t kColumns[] = {0, kByHalves ? kLanes : 3 * kQuarter, kByHalves ? kLanes + kHalf : 6 * kQuarter,
                                         kByHalves ? 2 * kLanes : 9 * kQuarter};
  using Half = Vec<A, kHalf>;
  using Byte = std::conditional_t<std::is_const_v<U>, const char, char>;

  __attribute__((always_inline)) U* at(int i, int64_t offset) const { return reinterpret_cast<U*>(at_[i] + offset); }

  Byte* at_[4];
  const int64_t* offset_;
};

// Calls `work` with the way in which a panel is seated as a constant; returns whether it is in any.
template <class A, class Work>
inline bool with_seating(const Panel& panel, const Work& work) {
  if (panel.seating == Seating::halves) work(std::integral_constant<Seating, Seating::halves>());
  if constexpr (VectorOf<A>::kLanes == 16)
    if (panel.seating == Seating::quarters) work(std::integral_constant<Seating, Seating::quarters>());
  return panel.seating != Seating::none;
}
