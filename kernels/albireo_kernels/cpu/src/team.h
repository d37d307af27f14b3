// Threads that work together, and where they wait for each other: a team is one process's threads, a group is the ranks'
// teams. Whoever waits spins for a moment, because the others are usually close, and then sleeps in the kernel, because
// on a small machine the one it waits for may need this very core.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

#include "worker.h"

namespace albireo {

inline int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000ll + time.tv_nsec;
}

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sleeps while the word holds `value`, timeout_ns at most. May return for no reason.
inline void sleep_while(const void *word, uint32_t value, int64_t timeout_ns) {
  const timespec timeout = {timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  syscall(SYS_futex, word, FUTEX_WAIT, value, &timeout, nullptr, 0);
}

inline void wake_all(const void *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

inline constexpr int64_t kSpinNs = 200'000;
inline constexpr int64_t kSleepNs = 20'000'000;  // between looks at whether to give up
inline constexpr int64_t kForever = INT64_MAX;

// A word that others wait on. `num_sleeping` spares the system call when nobody sleeps.
struct Signal {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> num_sleeping{0};

  void increment() {
    value.fetch_add(1);  // sequentially consistent, as is what precedes a sleep: one of the two sees the other
    if (num_sleeping.load()) wake_all(&value);
  }

  // Waits until the value is another than `old`. False: `gives_up` said so.
  template <class GivesUp>
  bool wait_while(uint32_t old, GivesUp gives_up) {
    if (value.load(std::memory_order_acquire) != old) return true;
    for (const int64_t end = now_ns() + kSpinNs; now_ns() < end;) {
      for (int i = 0; i < 32; i++) {
        if (value.load(std::memory_order_acquire) != old) return true;
        pause_briefly();
      }
    }
    while (true) {
      num_sleeping.fetch_add(1);
      if (value.load() == old) sleep_while(&value, old, kSleepNs);
      num_sleeping.fetch_sub(1);
      if (value.load() != old) return true;
      if (gives_up()) return false;
    }
  }
};

// Returns on every thread once all have arrived. Good for processes as well; once given up, it is broken.
struct Barrier {
  alignas(64) std::atomic<uint32_t> num_arrived{0};
  alignas(64) Signal generation;

  template <class GivesUp>
  bool arrive(uint32_t num_threads, GivesUp gives_up) {
    const uint32_t current = generation.value.load(std::memory_order_relaxed);
    if (num_arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < num_threads) {
      return generation.wait_while(current, gives_up);
    }
    num_arrived.store(0, std::memory_order_relaxed);
    generation.increment();
    return true;
  }
};

// What the ranks of a group share; all zero before the first of them comes.
struct Group {
  Barrier barrier;
};

struct Team {
  int num_threads = 1;
  Barrier barrier;
  Group *group = nullptr;  // null: alone
  int rank = 0;
  int num_ranks = 1;
  std::atomic<bool> is_aborted{false};
  bool has_met = true;         // what the last meeting came to; written by thread 0 between two barriers
  int64_t collective_ns = 0;   // spent in meetings by thread 0
  // Items taken of this operation and of the next, by turns: one is reset while the other is in use.
  alignas(64) std::atomic<int64_t> num_taken[2] = {0, 0};

  void wait_for_all() {
    if (num_threads > 1) barrier.arrive(num_threads, [] { return false; });
  }

  bool meet(int64_t timeout_ns) {
    if (is_aborted.load(std::memory_order_acquire)) return false;
    if (group == nullptr) return true;
    const int64_t start = now_ns();
    const bool has_met = group->barrier.arrive(
        num_ranks, [&] { return is_aborted.load() || (timeout_ns != kForever && now_ns() - start > timeout_ns); });
    collective_ns += now_ns() - start;
    return has_met;
  }
};

inline void Worker::wait_for_team() { team.wait_for_all(); }

inline bool Worker::meet() {
  team.wait_for_all();
  if (index == 0) team.has_met = team.meet(kForever);
  team.wait_for_all();
  return team.has_met;
}

}  // namespace albireo
