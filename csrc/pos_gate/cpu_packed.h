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

// The runs of a tile, for each kind of rows, all their steps, and where the panel has what they are multiplied with.
struct TileRuns {
  struct {
    const Run *begin, *end;
  } of[kRowKinds];
  int64_t steps, row, twin;  // twin: how far the row is that is added to each, for what twins have in common
};

// P or its transpose, cut into tiles. Only what matters is there: for each tile the steps in which any of its rows has a
// weight worth adding. Tiles may have runs in common.
template <class E>
class Packed {
 public:
  // So many runs and steps are there.
  struct Mark {
    int32_t runs[kRowKinds] = {}, steps = 0;
  };

  std::vector<E> weights;  // where the runs have theirs
  int32_t most_steps = 0;  // of a tile
  WindowSizes complete{};  // of a window all of whose weights are there, in the table; otherwise zeros
  bool has_twins = false;  // whether there are three products for each two rows of tokens, as cpu_packing.h says

  int64_t tiles() const { return int64_t(tiles_.size()); }
  bool is_split() const { return now_.runs[kFirstRows] + now_.runs[kLastRows] > 0; }  // not all are of all rows
  const TileRuns& runs_of(int64_t tile) const { return tiles_[tile]; }
  size_t bytes() const {
    size_t runs = 0;
    for (const auto& kind : runs_) runs += kind.size();
    return weights.size() * sizeof(E) + runs * sizeof(Run);
  }

  void clear() {  // but for the weights, which their packing writes anew
    parts_.clear();
    now_ = begin_ = {};
    most_steps = 0;
    complete = {};
  }
  const Mark& mark() const { return now_; }
  // Makes room for so many runs of each kind.
  void make_room(int64_t count) {
    for (int kind = 0; kind < kRowKinds; ++kind) {
      const size_t size = now_.runs[kind] + count;
      if (runs_[kind].size() < size) runs_[kind].resize(2 * size);
    }
  }
  // A run, for which there is room. One without steps is written too, but not kept: a branch would often be foreseen wrongly.
  void add(Rows rows, int64_t at, int64_t row, int64_t steps, int64_t stride) {
    Run& run = runs_[rows][now_.runs[rows]];  // filled in place: a copy would wait for the single stores
    run.at = at;
    run.row = int32_t(row);
    run.count = int32_t(steps);
    run.stride = int32_t(stride);
    now_.runs[rows] += steps > 0;
    now_.steps += int32_t(steps);
  }
  void add(int64_t at, int64_t row, int64_t steps, int64_t stride) {  // a run of all rows
    make_room(1);
    add(kAllRows, at, row, steps, stride);
  }
  // What lies between two marks, again.
  void repeat(const Mark& begin, const Mark& end) {
    for (int kind = 0; kind < kRowKinds; ++kind) {
      make_room(end.runs[kind] - begin.runs[kind]);
      Run* const runs = runs_[kind].data();
      std::copy(runs + begin.runs[kind], runs + end.runs[kind], runs + now_.runs[kind]);
      now_.runs[kind] += end.runs[kind] - begin.runs[kind];
    }
    now_.steps += end.steps - begin.steps;
  }
  // The last run of the tile at hand, which may be made longer by a step.
  Run* last_run() {
    const int32_t count = now_.runs[kAllRows];
    return count > begin_.runs[kAllRows] ? &runs_[kAllRows][count - 1] : nullptr;
  }
  void lengthen() {
    ++last_run()->count;
    ++now_.steps;
  }
  bool has_steps() const { return now_.steps > begin_.steps; }  // of the tile at hand
  // The tile at hand, which has what was added since the last one, or one with what lies between two marks. It has a step
  // at least.
  void end_tile() { end_tile(begin_, now_, 0); }
  void end_tile(const Mark& begin, const Mark& end, int64_t row, int64_t twin = 0) {
    parts_.push_back({begin, end, row, twin});
    most_steps = std::max(most_steps, end.steps - begin.steps);
    begin_ = now_;
  }
  // After the last tile: from now on all runs stay where they are.
  void finish() {
    tiles_.clear();
    for (const auto& [begin, end, row, twin] : parts_) {
      TileRuns& tile = tiles_.emplace_back();
      for (int kind = 0; kind < kRowKinds; ++kind)
        tile.of[kind] = {runs_[kind].data() + begin.runs[kind], runs_[kind].data() + end.runs[kind]};
      tile.steps = end.steps - begin.steps;
      tile.row = row;
      tile.twin = twin;
    }
  }

 private:
  struct Part {
    Mark begin, end;
    int64_t row, twin;
  };

  std::vector<Run> runs_[kRowKinds];  // with room for more
  std::vector<Part> parts_;           // the tiles,
  std::vector<TileRuns> tiles_;       // and as products read them
  Mark now_, begin_;                  // begin_: of the tile at hand
};
