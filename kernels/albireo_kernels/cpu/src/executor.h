// The device: a team of threads that replays the programs of submitted steps, one step after the other.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "attention.h"
#include "layers.h"
#include "sample.h"
#include "team.h"

namespace albireo {

// False: aborted.
inline bool run_op(const AlbireoOp &op, AlbireoStep &step, Worker &worker) {
  switch (op.kind) {
    case ALBIREO_OP_EMBED: embed(op.of.embed, step, worker); return true;
    case ALBIREO_OP_ADD_NORM: return add_norm(op.of.add_norm, op.extent, step, worker);
    case ALBIREO_OP_GEMM: gemm(op.of.gemm, op.extent, step, worker); return true;
    case ALBIREO_OP_ROPE: rope(op.of.rope, step, worker); return true;
    case ALBIREO_OP_ATTENTION: attention(op.of.attention, step, worker); return true;
    case ALBIREO_OP_QUANTIZE: quantize(op.of.quantize, op.extent, step, worker); return true;
    case ALBIREO_OP_EXCHANGE: return exchange(op.of.exchange, step, worker);
    case ALBIREO_OP_SELECT: select_candidates(op.of.select, step, worker); return true;
    case ALBIREO_OP_DRAW: return draw_tokens(op.of.draw, step, worker);
    case ALBIREO_OP_PUBLISH: return publish(op.of.publish, step, worker);
    default: return false;
  }
}

// Every thread calls. False on all of them alike: aborted.
inline bool replay(const AlbireoProgram &program, AlbireoStep &step, Team &team, int index) {
  for (int i = 0; i < program.num_ops; i++) {
    if (index == 0) team.num_taken[(i + 1) % 2].store(0, std::memory_order_relaxed);  // nobody uses it now
    Worker worker{team, index, team.num_threads, team.rank, team.num_ranks, team.num_taken[i % 2]};
    const bool goes_on = run_op(program.ops[i], step, worker);
    team.wait_for_all();
    if (!goes_on) return false;
  }
  return true;
}

}  // namespace albireo

struct AlbireoDevice {
  struct Submission {
    const AlbireoProgram *forward, *sample;
    AlbireoStep *step;
  };

  albireo::Team team;
  std::mutex lock;  // of the queue
  std::deque<Submission> queue;
  albireo::Signal num_submitted;  // grows, also when the threads shall end
  albireo::Signal num_completed;
  bool is_closing = false;
  Submission current{};  // of all threads, between two barriers; its step is null when they shall end
  std::vector<std::thread> threads;

  void run(int index) {
    while (true) {
      if (index == 0) current = next();
      team.wait_for_all();
      if (current.step == nullptr) return;
      run_step(index);
    }
  }

  void submit(const Submission &submission) {
    std::atomic_ref<int32_t>(submission.step->status).store(ALBIREO_PENDING);
    {
      const std::lock_guard guard(lock);
      queue.push_back(submission);
    }
    num_submitted.increment();
  }

  void close() {
    team.is_aborted.store(true);
    {
      const std::lock_guard guard(lock);
      is_closing = true;
    }
    num_submitted.increment();
    for (auto &thread : threads) thread.join();
  }

  // Until all that was submitted is complete.
  void wait_until_idle() {
    while (true) {
      const uint32_t completed = num_completed.value.load();
      if (completed == num_submitted.value.load()) return;
      num_completed.wait_while(completed, [] { return true; });
    }
  }

 private:
  Submission next() {
    while (true) {
      const uint32_t seen = num_submitted.value.load();
      {
        const std::lock_guard guard(lock);
        if (!queue.empty()) {
          const Submission first = queue.front();
          queue.pop_front();
          return first;
        }
        if (is_closing) return {};
      }
      num_submitted.wait_while(seen, [] { return false; });
    }
  }

  void run_step(int index) {
    AlbireoStep &step = *current.step;
    if (index == 0) {
      team.collective_ns = 0;
      team.num_taken[0].store(0, std::memory_order_relaxed);
      step.start_at_ns = step.forward_end_at_ns = albireo::now_ns();
      start_is_aborted = team.is_aborted.load();
    }
    team.wait_for_all();
    bool is_complete = !start_is_aborted && albireo::replay(*current.forward, step, team, index);
    if (is_complete) {
      if (index == 0) {
        step.forward_end_at_ns = albireo::now_ns();
        team.num_taken[0].store(0, std::memory_order_relaxed);
      }
      team.wait_for_all();
      is_complete = albireo::replay(*current.sample, step, team, index);
    }
    team.wait_for_all();  // programs and step may be gone as soon as the step is complete
    if (index != 0) return;
    step.end_at_ns = albireo::now_ns();
    step.collective_ns = team.collective_ns;
    complete(step, is_complete ? ALBIREO_OK : ALBIREO_ABORTED);
  }

  void complete(AlbireoStep &step, AlbireoStatus status) {
    const void *word = &step.status;  // the step may be gone as soon as its status is set
    std::atomic_ref<int32_t>(step.status).store(status);
    albireo::wake_all(word);
    num_completed.increment();
  }

  bool start_is_aborted = false;  // written by thread 0 between two barriers
};

namespace albireo {

inline void pin(std::thread &thread, int core) {
  if (core < 0) return;
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  pthread_setaffinity_np(thread.native_handle(), sizeof cores, &cores);  // where it fails, the system places the thread
}

inline AlbireoDevice *open_device(const int32_t *cores, int32_t num_threads) {
  auto device = std::make_unique<AlbireoDevice>();
  device->team.num_threads = num_threads;
  try {
    for (int index = 0; index < num_threads; index++) {
      device->threads.emplace_back([device = device.get(), index] { device->run(index); });
      pin(device->threads.back(), cores[index]);
    }
  } catch (const std::system_error &) {
    // Threads that wait for one that will never come cannot be ended: the process is about to.
    for (auto &thread : device->threads) thread.detach();
    (void)device.release();
    return nullptr;
  }
  return device.release();
}

inline int join_group(AlbireoDevice &device, void *memory, int32_t rank, int32_t size, int64_t timeout_ns) {
  Team &team = device.team;
  team.group = size > 1 ? (Group *)memory : nullptr;
  team.rank = rank;
  team.num_ranks = size;
  const bool has_met = team.meet(timeout_ns);
  team.collective_ns = 0;
  return has_met ? ALBIREO_OK : ALBIREO_ABORTED;
}

inline void leave_group(AlbireoDevice &device) {
  device.team.is_aborted.store(true);
  device.wait_until_idle();
  device.team.group = nullptr;
  device.team.rank = 0;
  device.team.num_ranks = 1;
  device.team.is_aborted.store(false);
}

inline int wait_for(AlbireoStep &step, int64_t timeout_ns) {
  const std::atomic_ref<int32_t> status(step.status);
  const int64_t start = now_ns();
  while (status.load() == ALBIREO_PENDING) {
    const int64_t left = timeout_ns == kForever ? kSleepNs : timeout_ns - (now_ns() - start);
    if (left <= 0) break;
    sleep_while(&step.status, ALBIREO_PENDING, left);
  }
  return status.load();
}

}  // namespace albireo
