// What the products read of P: for each tile of it, runs of steps.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

constexpr int32_t kMostSteps = 256;  // that are summed in one go

// Steps of a tile that follow each other, at most kMostSteps: the panel's from `row` on, with a weight for each of the
// tile's rows, `stride` apart.
struct Run {
  int64_t at;            // where `weights` has the first step's
  int32_t row;           // first step * kPanel: where the multiplied panel has it
  int32_t count, stride;
};

// Which rows of a tile the steps of a run are for.
enum Rows { kAllRows, kFirstRows, kLastRows, kRowKinds };

// How many rows are the first ones of a tile, or the last ones; of a low tile none, for which a step costs little anyway.
constexpr int few_of(int64_t rows) { return rows >= 6 ? int(rows / 2) : 0; }

// The runs of a tile, for each kind of rows.
struct TileRuns {
  struct {
    const Run *begin, *end;
  } of[kRowKinds];
};

// P or its transpose, cut into tiles. Only what matters is there: for each tile the steps in which any of its rows has a
// weight worth adding.
template <class E>
class Packed {
 public:
  std::vector<E> weights;      // where the runs have theirs
  std::vector<int32_t> steps;  // of each tile
  int32_t most_steps = 0;
  WindowSizes complete{};  // of a window all of whose weights are there, in the table; otherwise zeros

  int64_t tiles() const { return int64_t(steps.size()); }
  bool is_split() const { return kinds_[kFirstRows].count + kinds_[kLastRows].count > 0; }  // not all are of all rows
  TileRuns runs_of(int64_t tile) const {
    TileRuns runs;
    for (int kind = 0; kind < kRowKinds; ++kind) {
      const Kind& k = kinds_[kind];
      runs.of[kind] = {k.runs.data() + k.begin[tile], k.runs.data() + k.begin[tile + 1]};
    }
    return runs;
  }
  size_t bytes() const {
    size_t runs = 0;
    for (const Kind& kind : kinds_) runs += kind.runs.size();
    return weights.size() * sizeof(E) + runs * sizeof(Run);
  }

  void clear() {  // but for the weights, which their packing writes anew
    for (Kind& kind : kinds_) {
      kind.begin.assign(1, 0);
      kind.count = 0;
    }
    steps.clear();
    tile_steps_ = most_steps = 0;
    complete = {};
  }
  // A run of all rows of the tile at hand.
  void add(int64_t at, int64_t row, int64_t steps, int64_t stride) {
    Adder adder = make_room(1);
    adder.add(kAllRows, at, row, steps, stride);
    take(adder);
  }
  // Runs of the tile at hand, one by one. Those without steps are written too, but not kept: a branch would often be
  // foreseen wrongly.
  class Adder {
   public:
    void add(Rows rows, int64_t at, int64_t row, int64_t steps, int64_t stride = -1) {
      Run& run = *end_[rows];  // filled in place: a copy would wait for the single stores
      run.at = at;
      run.row = int32_t(row);
      run.count = int32_t(steps);
      run.stride = int32_t(stride);
      end_[rows] += steps > 0;
      steps_ += int32_t(steps);
    }

   private:
    friend class Packed;
    Run* end_[kRowKinds];
    int32_t steps_ = 0;
  };
  Adder make_room(int64_t runs) {  // for so many of each kind
    Adder adder;
    for (int kind = 0; kind < kRowKinds; ++kind) {
      Kind& k = kinds_[kind];
      if (k.runs.size() < size_t(k.count + runs)) k.runs.resize(2 * (k.count + runs));
      adder.end_[kind] = &k.runs[k.count];
    }
    return adder;
  }
  void take(const Adder& adder) {
    for (int kind = 0; kind < kRowKinds; ++kind)
      kinds_[kind].count = int32_t(adder.end_[kind] - kinds_[kind].runs.data());
    tile_steps_ += adder.steps_;
  }
  // The tile's last run of all rows, which may be made longer by a step.
  Run* last_run() { return kinds_[kAllRows].count > kinds_[kAllRows].begin.back() ? &last() : nullptr; }
  void lengthen() {
    ++last().count;
    ++tile_steps_;
  }
  bool has_steps() const { return tile_steps_ > 0; }
  void end_tile() {  // which has a step at least
    for (Kind& kind : kinds_) kind.begin.push_back(kind.count);
    steps.push_back(tile_steps_);
    most_steps = std::max(most_steps, std::exchange(tile_steps_, 0));
  }

 private:
  struct Kind {
    std::vector<int32_t> begin{0};  // [tiles + 1], into `runs`
    std::vector<Run> runs;          // with room for more: `count` of them
    int32_t count = 0;
  };
  Run& last() { return kinds_[kAllRows].runs[kinds_[kAllRows].count - 1]; }

  Kind kinds_[kRowKinds];
  int32_t tile_steps_ = 0;  // of the tile at hand
};
