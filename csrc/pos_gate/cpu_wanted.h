// Cache lines that will be wanted soon, which the products ask for in their steps.
//
// Rows of a few channels, a token apart, no hardware prefetcher foresees, and a core has too few buffers to ask for a
// panel at once. So while a tile is multiplied, what its tokens have in the maps at hand is asked for, and of the next
// panel. In small windows that is not enough: there is too little to multiply for each line. But where a share is small
// all of the next one can be asked for meanwhile, in the order of its addresses: then the prefetchers help. The pace must
// be even: what is asked for faster than they fetch is dropped.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// Whether each step asks. A step of AVX-512 takes 21 multiplications, beside which that hardly shows. The others' takes 12
// at most, of which a core does two a cycle; there a run of steps asks at once.
constexpr bool kStepsAsk = kVectorBytes == 64;

// Whether lines come no nearer than the second-level cache. A panel of a window of 14 is more than some processors' first
// level holds; and Intel's cores can wait for few lines on their way there, among them what a product misses.
inline bool stays_in_second_level() {
  constexpr int64_t kPanelBytes = 14 * 14 * kTileVectors * kVectorBytes;
#ifdef POSMLP_X86_KERNELS
  if (__builtin_cpu_is("intel")) return true;
#endif
  const int64_t bytes = first_level_bytes();
  return bytes > 0 && bytes < kPanelBytes;
}

class Wanted {
 public:
  // Lines to come, and when. Few instructions find one: a step has little time for them.
  class Queue {
   public:
    // Asks for a line if there is one left and, where a pace is kept, one is due.
    template <bool kPaced>
    __attribute__((always_inline)) void ask() {
      if constexpr (kPaced) {
        due_ += pace_;
        if (due_ < kOne) return;
        due_ -= kOne;
      }
      if (lines_ != end_) ask_for_one();
    }
    // As often as in so many steps, at an even pace.
    __attribute__((always_inline)) void ask_for_run(int64_t steps) {
      for (due_ += pace_ * steps; due_ >= kOne && lines_ != end_; due_ -= kOne) ask_for_one();
    }
    // Not inlined: it would slow down the loop over tiles.
    __attribute__((noinline)) void ask_for_the_rest() {
      int64_t at = at_;
      for (const Lines* lines = lines_; lines != end_; ++lines, at = first_)
        for (; at != last_; ++at) fetch(lines->first + lines->offset[at]);
      lines_ = end_;
    }

   private:
    friend class Wanted;
    struct Lines {  // at first + offset[at], `at` from first_ to last_
      const char* first;
      const int64_t* offset;
    };
    static constexpr int64_t kOne = 1 << 16;  // line

    __attribute__((always_inline)) void ask_for_one() {
      fetch(lines_->first + lines_->offset[at_]);
      if (++at_ != last_) return;
      at_ = first_;
      ++lines_;
    }

    __attribute__((always_inline)) void fetch(const char* line) const {
      if (__builtin_expect(to_second_level_, false))  // the others' steps shall not jump
        __builtin_prefetch(line, 0, 2);
      else
        __builtin_prefetch(line, 0, 3);
    }

    const Lines *lines_ = nullptr, *end_ = nullptr;
    int64_t at_ = 0, first_ = 0, last_ = 0;
    int64_t pace_ = kOne, due_ = 0;  // of a line: for each time that is asked, and what has come together
    bool to_second_level_ = stays_in_second_level();
  };
  Queue queue;  // a product takes it out and puts it back, so that it stays in registers meanwhile

  // From now on nothing.
  void clear(bool has_twins = false) {
    lines_.clear();
    has_twins_ = has_twins;
    early_ = kAll;
    now_ = kAll;
    queue.pace_ = Queue::kOne;
    spread_ = false;
  }

  // ---- tile by tile: the rows of its tokens ----

  template <class U>
  void add(const Map<U>& map, const Pieces& pieces) {
    for (const Piece& piece : pieces) {
      const char* row = reinterpret_cast<const char*>(map.first(piece));
      const char* end = row + piece.count * int64_t(sizeof(U));
      for (const char* line = row - size_t(row) % kLine; line < end; line += kLine) add(line, map.offset);
    }
  }
  // What is added from now on is asked for by what twins have in common, if there is that.
  void early() {
    if (has_twins_ && now_ == kAll) early_ = lines_.size();
  }
  // What is added from now on is for the panel or the product that follows.
  void then() { now_ = lines_.size(); }

  void begin_tile(const Tile& tile, int64_t steps, bool follows = false) {
    if (spread_) return;
    const size_t now = std::min(now_, lines_.size());
    const auto [begin, end] = follows ? std::pair(now, lines_.size()) : std::pair(size_t(0), std::min(early_, now));
    ask_for(tile, begin, end, steps);
  }
  void begin_twins(const Tile& tiles, int64_t steps) {
    const size_t now = std::min(now_, lines_.size());
    if (!spread_) ask_for(tiles, std::min(early_, now), now, steps);
  }
  void end_tile() {
    if (!spread_) queue.ask_for_the_rest();
  }

  // ---- evenly over many tiles: memory ----

  // `bytes` from each of some addresses on, while is asked `times` times.
  void spread(const std::vector<const void*>& addresses, int64_t bytes, int64_t times) {
    clear();
    spread_ = true;
    const int64_t count = divide_up(bytes, int64_t(kLine));
    while (int64_t(side_by_side_.size()) < count) side_by_side_.push_back(side_by_side_.size() * kLine);
    for (const void* address : addresses) add(static_cast<const char*>(address), side_by_side_);
    ask_for(0, count, 0, lines_.size());
    keep_pace(count * int64_t(addresses.size()), times);
  }

 private:
  static constexpr size_t kLine = 64;

  void add(const char* first, const std::vector<int64_t>& offsets) {
    Queue::Lines& lines = lines_.emplace_back();  // filled in place: a copy would wait for the single stores
    lines.first = first;
    lines.offset = offsets.data();
  }
  void ask_for(const Tile& tile, size_t begin, size_t end, int64_t steps) {
    ask_for(tile.first, tile.last, begin, end);
    if (!kStepsAsk) keep_pace(int64_t(end - begin) * tile.rows(), steps);
  }
  void ask_for(int64_t first, int64_t last, size_t begin, size_t end) {
    queue.lines_ = lines_.data() + begin;
    queue.end_ = lines_.data() + end;
    queue.at_ = queue.first_ = first;
    queue.last_ = last;
  }

  void keep_pace(int64_t lines, int64_t times) {
    queue.pace_ = Queue::kOne * lines / times + 1;
    queue.due_ = 0;
  }

  static constexpr size_t kAll = size_t(-1);
  size_t now_ = kAll, early_ = kAll;  // of the lines; the others are for what follows
  bool has_twins_ = false;
  std::vector<Queue::Lines> lines_;
  std::vector<int64_t> side_by_side_;  // offsets of lines
  bool spread_ = false;
};
