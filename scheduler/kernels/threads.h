// One parallel region, many phases.
//
// A forward pass is some hundred short loops, each of which needs the ones before it. Threads that met at a barrier
// after each loop would all wait whenever one of them loses its core to another program. Here a phase is over when
// its items are done, whoever did them: a thread that comes late finds the phase over and catches up, and only an
// item that was begun is waited for.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace carousel {

// What the threads of a region share.
struct Phases {
  // The current phase in the upper half, its next item in the lower.
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> done{0};  // items of the current phase
};

// One thread's place in the sequence of phases.
class Team {
 public:
  explicit Team(Phases& phases) : phases_(phases) {}

  static int rank() { return omp_get_thread_num(); }
  static int size() { return omp_get_num_threads(); }

  // Calls body(i) once for each i in [0, count), `chunk` at a time, on whichever thread is free, and returns when all
  // calls have. Every thread must call it, with the same arguments, in the same order as its other loops.
  template <class Body>
  void for_each(int64_t count, int64_t chunk, Body&& body) {
    if (count <= 0) return;
    const uint64_t phase = phase_++ << 32;
    uint64_t ticket = phases_.ticket.load(std::memory_order_acquire);
    while (ticket >> 32 == phase >> 32) {
      const int64_t begin = int64_t(ticket - phase), end = std::min(begin + chunk, count);
      if (begin == count) {
        ticket = wait(ticket);
      } else if (phases_.ticket.compare_exchange_weak(ticket, phase + end, std::memory_order_acq_rel)) {
        for (int64_t i = begin; i < end; ++i) body(i);
        if (phases_.done.fetch_add(end - begin, std::memory_order_acq_rel) + (end - begin) == count) return advance();
        ticket = phases_.ticket.load(std::memory_order_acquire);
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;  // some tens of microseconds: a phase is seldom longer

  void advance() {
    phases_.done.store(0, std::memory_order_relaxed);
    phases_.ticket.store(phase_ << 32, std::memory_order_release);
    phases_.ticket.notify_all();
  }

  // Waits for the ticket to change: awake at first, then asleep, since the thread that holds the last item may have
  // lost its core and could use this one.
  uint64_t wait(uint64_t ticket) {
    for (int spin = 0; spin < kSpins; ++spin) {
      const uint64_t now = phases_.ticket.load(std::memory_order_acquire);
      if (now != ticket) return now;
      pause();
    }
    phases_.ticket.wait(ticket, std::memory_order_acquire);
    return phases_.ticket.load(std::memory_order_acquire);
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Phases& phases_;
  uint64_t phase_ = 0;
};

// At most so many threads take part, whatever a call asks for: cores may be busy with other programs.
inline std::atomic<int> thread_limit{1 << 30};

// Runs body(team) on each of `threads` threads, or on as many as are allowed. The body must not throw.
template <class Body>
void parallel(int threads, Body&& body) {
  threads = std::min(threads, thread_limit.load(std::memory_order_relaxed));
  Phases phases;
#pragma omp parallel num_threads(threads)
  {
    Team team(phases);
    body(team);
  }
}

}  // namespace carousel
