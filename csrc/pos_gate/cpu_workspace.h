// What a thread keeps between panels and between calls: prepared groups and buffers.
// No include guard: every instruction set compiles this text anew, inside its own namespace and target options.

// What the products need of one group's P.
template <class A, class E>
struct GroupMixing {
  const Window* window = nullptr;  // whose class it was made for
  int64_t group = 0;
  Packed<E> rows, columns;
  std::vector<A> scale;  // of the rows, [tokens]
};

// A thread's buffers, kept from call to call so that no pages are faulted in again.
template <class A, class E>
struct Workspace {
  std::vector<A> storage, bias;  // bias: [tokens] of the window class at hand, zeros if there is none
  std::vector<E> operands;
  RowSums<A> bias_sums, dots;  // of dU and of dU * Y, of the window class at hand
  MixingBuffers<A, E> mixing;
  std::vector<GroupMixing<A, E>> groups;  // of a forward

  static Workspace& of_thread() {
    static thread_local Workspace workspace;
    return workspace;
  }
  void release_if_large() {
    constexpr size_t kKeptBytes = size_t(64) << 20;
    size_t bytes = (storage.size() + mixing.weights.dense.size() + operands.size()) * sizeof(A);
    for (const auto& group : groups) bytes += group.rows.bytes() + group.columns.bytes();
    if (bytes > kKeptBytes) *this = Workspace();
  }
};

// Buffers out of one vector, aligned to cache lines.
template <class A>
class Allotment {
 public:
  // Sizes are known before anything is handed out, so that no buffer moves.
  Allotment(std::vector<A>& storage, int64_t count, int64_t buffers) {
    const size_t wanted = size_t(count + buffers * kAlign);
    if (storage.size() < wanted) storage.resize(wanted);
    free_ = storage.data();
  }
  A* take(int64_t count) {
    free_ += (64 - size_t(free_) % 64) % 64 / sizeof(A);
    A* buffer = free_;
    std::fill(buffer, buffer + count, A{});
    free_ += count;
    return buffer;
  }

 private:
  static constexpr int64_t kAlign = 64 / sizeof(A);
  A* free_;
};
