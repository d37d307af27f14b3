// One thread's view of an operation. Every thread of the team calls the operation with its own `Worker`; when the last
// one has returned, the operation is complete and the next begins.
#pragma once

#include <atomic>
#include <cstdint>

namespace albireo {

struct Team;

struct Worker {
  Team &team;
  int index;        // this thread
  int num_threads;  // of so many
  int rank;         // of this process
  int num_ranks;
  std::atomic<int64_t> &num_taken;  // of the operation's items; zero when it begins

  // Claims the next `count` of the operation's items: the first of them, which may lie past the last item.
  int64_t take(int64_t count) { return num_taken.fetch_add(count, std::memory_order_relaxed); }

  void wait_for_team();

  // Waits for all threads of all ranks: what they wrote before can be read after. False: aborted, nothing holds any more.
  bool meet();
};

// Items [begin, end) of `count` that fall to a thread when all get equal shares.
struct Share {
  int64_t begin, end;
  Share(int64_t count, const Worker &worker)
      : begin(count * worker.index / worker.num_threads), end(count * (worker.index + 1) / worker.num_threads) {}
};

}  // namespace albireo
