// A full panel's rows as whole vectors and halves, from map to registers and back.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// Where the rows of a full panel lie in a map: its first and its last vector side by side, the one between by halves that may
// be in two windows. So do groups of 16, 24, 32 or 48 channels in vectors of 16, groups of 12 in vectors of 8.
template <class A, class U>
class Seats {
 public:
  Seats(const Map<U>& map, const Panel& panel) : offset_(map.offset.data()) {
    constexpr int64_t kColumns[] = {0, kLanes, kLanes + kLanes / 2, 2 * kLanes};
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

  __attribute__((always_inline)) Vec<A> load(int64_t row, int vector) const {
    if (vector == 1) return join<A>(load_as<A, kLanes / 2>(at(row, 1)), load_as<A, kLanes / 2>(at(row, 2)));
    return load_as<A, kLanes>(at(row, vector == 0 ? 0 : 3));
  }
  __attribute__((always_inline)) void store(int64_t row, int vector, Vec<A> values) const {
    if (vector != 1) return store_as(at(row, vector == 0 ? 0 : 3), values);
    store_as(at(row, 1), half_of<A, 0>(values));
    store_as(at(row, 2), half_of<A, 1>(values));
  }

 private:
  static constexpr int kLanes = VectorOf<A>::kLanes;
  using Byte = std::conditional_t<std::is_const_v<U>, const char, char>;

  __attribute__((always_inline)) U* at(int64_t row, int i) const { return reinterpret_cast<U*>(at_[i] + offset_[row]); }

  Byte* at_[4];
  const int64_t* offset_;
};
