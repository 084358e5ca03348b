// A CPU that runs CUDA's kernels as they are, block by block and thread by thread.
//
// Threads of a block are fibers that run one at a time until they have to wait. Each block draws an order of its warps
// (the same in each run), of which the first ones run ahead as far as barriers let them, lanes in any order: what relies
// on an order that no barrier enforces shows in the results. A barrier waits for all threads of the block, an instruction
// of a warp for its 32 lanes; where threads wait for others that never come, because they have returned or wait
// elsewhere, the program ends with a message. Shared memory is a block of the heap of just its size, so that
// AddressSanitizer sees what strays, and starts as NaNs. An asynchronous copy takes place when its thread waits for it;
// until then its destination is NaNs too.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define POSMLP_FIBER_SANITIZER(call) call
#else
#define POSMLP_FIBER_SANITIZER(call)
#endif

namespace posmlp::cuda::emulator {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;
constexpr int64_t kMostShared = 227 << 10, kMostGrid = (int64_t(1) << 31) - 1, kMostArguments = 4096;

// Threads that meet: at a barrier, or at an instruction of their warp, which the last to come executes for all.
struct Meeting {
  int size = 0, arrived = 0;
  const char* what = "";
  int members[kMostThreads];
  void* operands[kWarp];
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
};

// A stack, on which `run` is called again and again. The first entry takes system calls, those after it none.
class Fiber {
 public:
  explicit Fiber(void (*run)()) : run_(run) {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_.get();
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, &Fiber::enter, 0);
    entering_ = this;
    swapcontext(&creator_, &context);
  }

  jmp_buf where;
  std::deque<std::vector<Copy>> copies;  // by group; the last one is not committed yet

  const void* stack() const { return stack_.get(); }

 private:
  static void enter() {
    Fiber* fiber = entering_;
    ucontext_t unused;
    if (!_setjmp(fiber->where)) swapcontext(&unused, &fiber->creator_);
    for (;;) fiber->run_();
  }

  static inline Fiber* entering_ = nullptr;
  std::unique_ptr<char[]> stack_{new char[kStackBytes]};
  ucontext_t creator_;
  void (*run_)();
};

class Machine {
 public:
  using Body = void (*)(const void* arguments, char* shared);

  void launch(Body body, const void* arguments, int threads, int64_t grid, int64_t shared_bytes) {
    if (grid < 1 || grid > kMostGrid) fail("a grid of %lld blocks", (long long)grid);
    if (shared_bytes < 0 || shared_bytes > kMostShared) fail("%lld bytes of shared memory", (long long)shared_bytes);
    body_ = body;
    arguments_ = arguments;
    threads_ = threads;
    while (int(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>(&Machine::run_thread));
    for (block_ = 0; block_ < grid; ++block_) run_block(size_t(shared_bytes));
  }

  int thread() const { return thread_; }
  int64_t block() const { return block_; }
  std::vector<Copy>& copies() { return fibers_[thread_]->copies.back(); }

  void sync_block() { meet(barrier_, thread_, "sync_threads", nullptr, [](void* const*) {}); }
  // `execute` gets the operands of the 32 lanes; it is to write each one's results into them.
  template <class Execute>
  void sync_warp(const char* what, void* operands, Execute&& execute) {
    meet(warps_[thread_ / kWarp], thread_ % kWarp, what, operands, execute);
  }

  void commit_copies() { fibers_[thread_]->copies.emplace_back(); }
  void wait_copies(size_t pending) {
    auto& groups = fibers_[thread_]->copies;
    for (; groups.size() > pending + 1; groups.pop_front())
      for (const Copy& copy : groups.front()) arrive(copy);
  }

  void check_shared(const void* address, int bytes, int alignment, const char* what) const {
    const char* at = static_cast<const char*>(address);
    if (at < shared_ || at + bytes > shared_ + shared_bytes_) fail("%s: outside of shared memory", what);
    if (uintptr_t(at) % uintptr_t(alignment)) fail("%s: needs addresses aligned to %d bytes", what, alignment);
  }

  template <class... Values>
  [[noreturn]] void fail(const char* format, Values... values) const {
    std::fprintf(stderr, "CUDA emulator, block %lld, thread %d: ", (long long)block_, thread_);
    if constexpr (sizeof...(values) == 0)
      std::fputs(format, stderr);
    else
      std::fprintf(stderr, format, values...);
    std::fputs("\n", stderr);
    std::abort();
  }

 private:
  static void arrive(const Copy& copy) {
    copy.from ? std::memcpy(copy.to, copy.from, size_t(copy.bytes)) : std::memset(copy.to, 0, size_t(copy.bytes));
  }

  void run_block(size_t shared_bytes) {
    constexpr std::align_val_t kAlignment{128};
    shared_ = static_cast<char*>(::operator new(shared_bytes, kAlignment));
    shared_bytes_ = int64_t(shared_bytes);
    std::memset(shared_, 0xff, shared_bytes);
    barrier_.size = threads_;
    for (Meeting& warp : warps_) warp.size = kWarp;
    order_.resize(size_t(threads_ / kWarp));
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), random_);
    for (int thread = 0; thread < threads_; ++thread) make_ready(thread);
    alive_ = threads_;
    if (!_setjmp(main_)) switch_to_next();
    end_switch();
    ::operator delete(shared_, kAlignment);
  }

  static void run_thread();
  void run_body() {
    end_switch();
    Fiber& fiber = *fibers_[thread_];
    fiber.copies.assign(1, {});
    body_(arguments_, shared_);
    commit_copies();
    wait_copies(0);
    --alive_;
    if (!_setjmp(fiber.where)) switch_to_next();
  }

  template <class Execute>
  void meet(Meeting& meeting, int place, const char* what, void* operands, Execute&& execute) {
    if (meeting.arrived > 0 && std::strcmp(meeting.what, what))
      fail("comes to %s where others of its warp are at %s", what, meeting.what);
    meeting.what = what;
    meeting.members[meeting.arrived] = thread_;
    if (operands) meeting.operands[place] = operands;
    if (++meeting.arrived < meeting.size) return wait();
    execute(meeting.operands);
    for (int i = 0; i < meeting.size - 1; ++i) make_ready(meeting.members[i]);
    meeting.arrived = 0;
  }

  void make_ready(int thread) { ready_[thread / kWarp].push_back(thread); }

  // Returns when this thread's turn comes again.
  void wait() {
    if (!_setjmp(fibers_[thread_]->where)) switch_to_next();
    end_switch();
  }

  [[noreturn]] void switch_to_next() {
    const auto warp = std::find_if(order_.begin(), order_.end(), [this](int w) { return !ready_[w].empty(); });
    if (warp == order_.end()) finish_block();
    std::vector<int>& lanes = ready_[*warp];
    std::swap(lanes[random_() % lanes.size()], lanes.back());
    thread_ = lanes.back();
    lanes.pop_back();
    POSMLP_FIBER_SANITIZER(__sanitizer_start_switch_fiber(nullptr, fibers_[thread_]->stack(), kStackBytes));
    _longjmp(fibers_[thread_]->where, 1);
  }

  [[noreturn]] void finish_block() {
    for (const Meeting& warp : warps_)
      if (warp.arrived)
        fail("%d lanes of a warp wait at %s; the others wait elsewhere or have returned", warp.arrived, warp.what);
    if (alive_) fail("%d of %d threads wait at sync_threads; the others have returned", alive_, threads_);
    POSMLP_FIBER_SANITIZER(__sanitizer_start_switch_fiber(nullptr, main_stack_, main_bytes_));
    _longjmp(main_, 1);
  }

  // Each switch comes out in here. The first one from the main stack tells AddressSanitizer's bounds of that.
  void end_switch() {
    [[maybe_unused]] const void* stack = nullptr;
    [[maybe_unused]] size_t bytes = 0;
    POSMLP_FIBER_SANITIZER(__sanitizer_finish_switch_fiber(nullptr, &stack, &bytes));
    if (!main_stack_) main_stack_ = stack, main_bytes_ = bytes;
  }

  Body body_ = nullptr;
  const void* arguments_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> order_, ready_[kMostThreads / kWarp];  // of warps; of threads
  std::minstd_rand random_;
  Meeting barrier_, warps_[kMostThreads / kWarp];
  char* shared_ = nullptr;
  int64_t shared_bytes_ = 0, block_ = 0;
  int threads_ = 0, thread_ = 0, alive_ = 0;
  jmp_buf main_;
  const void* main_stack_ = nullptr;
  size_t main_bytes_ = 0;
};

inline Machine machine;
inline void Machine::run_thread() { machine.run_body(); }

}  // namespace posmlp::cuda::emulator
