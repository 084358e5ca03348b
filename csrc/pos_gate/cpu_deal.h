// Units of work, dealt out to threads while they run.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace posmlp::cpu {

// Each thread has a range of its own, as long as the others', and takes it from the front, so that what comes next lies
// near what it had; then it takes the last unit of whoever has most left. So nobody waits for long where a thread is slow,
// or has groups in whose P more weights count.
class Deal {
 public:
  Deal(int64_t units, int64_t threads) : threads_(threads), ranges_(new Range[threads]) {
    for (int64_t i = 0; i < threads; ++i) ranges_[i].words = word(units * i / threads, units * (i + 1) / threads);
  }

  // A thread's next unit, or -1 when all are dealt out.
  int64_t take(int64_t thread) {
    int64_t unit = take_from(thread, true);
    for (int64_t other; unit < 0 && (other = longest()) >= 0;) unit = take_from(other, false);
    return unit;
  }

  // Where a thread's own range ends.
  int64_t end(int64_t thread) const { return last_of(ranges_[thread].words); }

 private:
  struct alignas(64) Range {  // a cache line
    std::atomic<uint64_t> words{0};  // the first unit and the one behind the last, replaced together
  };
  static uint64_t word(int64_t first, int64_t last) { return uint64_t(first) << 32 | uint64_t(last); }
  static int64_t first_of(uint64_t words) { return int64_t(words >> 32); }
  static int64_t last_of(uint64_t words) { return int64_t(words & 0xffffffff); }

  // A range's first unit or its last one, or -1.
  int64_t take_from(int64_t thread, bool front) {
    std::atomic<uint64_t>& range = ranges_[thread].words;
    for (uint64_t words = range;;) {
      const int64_t first = first_of(words), last = last_of(words);
      if (first == last) return -1;
      if (range.compare_exchange_weak(words, front ? word(first + 1, last) : word(first, last - 1)))
        return front ? first : last - 1;
    }
  }

  // The thread with most units left, or -1.
  int64_t longest() const {
    int64_t thread = -1, most = 0;
    for (int64_t i = 0; i < threads_; ++i) {
      const uint64_t words = ranges_[i].words;
      const int64_t length = last_of(words) - first_of(words);
      if (length > most) thread = i, most = length;
    }
    return thread;
  }

  int64_t threads_;
  std::unique_ptr<Range[]> ranges_;
};

}  // namespace posmlp::cpu
