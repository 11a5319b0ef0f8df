// A pool of threads, and one parallel region of many phases.
//
// A forward pass is some hundred short loops, each of which needs the ones before it. Threads that met at a barrier
// after each loop would all wait whenever one of them loses its core to another program. Here a phase is over when
// its items are done, whoever did them: a thread that comes late finds the phase over and catches up, and only an
// item that was begun is waited for. A thread that has not come when the region is over is not waited for at all.
//
// The threads are the library's own: an OpenMP runtime would be a second one beside torch's.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace carousel {

// Awake for some tens of microseconds, then asleep.
constexpr int kSpins = 2000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until the word is no longer `value`, and returns what it is.
template <class Word>
Word wait_for_change(const std::atomic<Word>& word, Word value) {
  for (int spin = 0; spin < kSpins; ++spin) {
    const Word now = word.load(std::memory_order_acquire);
    if (now != value) return now;
    pause();
  }
  word.wait(value, std::memory_order_acquire);
  return word.load(std::memory_order_acquire);
}

// What the threads of a region share.
struct Phases {
  // The current phase in the upper half, its next item in the lower.
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> done{0};  // items of the current phase
};

// One thread's place in the sequence of phases.
class Team {
 public:
  Team(Phases& phases, int rank, int size) : phases_(phases), rank_(rank), size_(size) {}

  int rank() const { return rank_; }
  int size() const { return size_; }

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
        // The thread that holds the last item may have lost its core, and could use this one.
        ticket = wait_for_change(phases_.ticket, ticket);
      } else if (phases_.ticket.compare_exchange_weak(ticket, phase + end, std::memory_order_acq_rel)) {
        for (int64_t i = begin; i < end; ++i) body(i);
        if (phases_.done.fetch_add(end - begin, std::memory_order_acq_rel) + (end - begin) == count) return advance();
        ticket = phases_.ticket.load(std::memory_order_acquire);
      }
    }
  }

 private:
  void advance() {
    phases_.done.store(0, std::memory_order_relaxed);
    phases_.ticket.store(phase_ << 32, std::memory_order_release);
    phases_.ticket.notify_all();
  }

  Phases& phases_;
  const int rank_, size_;
  uint64_t phase_ = 0;
};

// A function, and what it captures, without a copy of either.
struct Job {
  void (*call)(void* body, int rank);
  void* body;
};

// Runs job(rank) for each rank in [0, threads), on this thread and on as many of the pool's as come before this one is
// done. Calls from several threads take turns.
void run_on_pool(int threads, Job job);

// The cores that this process may run on.
int num_cores();

// At most so many threads take part, whatever a call asks for: cores may be busy with other programs.
extern std::atomic<int> thread_limit;

// Runs body(team) on each of `threads` threads, or on as many as are allowed and come. The body must not throw.
template <class Body>
void parallel(int threads, Body&& body) {
  threads = std::min(threads, thread_limit.load(std::memory_order_relaxed));
  Phases phases;
  auto run = [&](int rank) {
    Team team(phases, rank, threads);
    body(team);
  };
  run_on_pool(threads, {[](void* to, int rank) { (*static_cast<decltype(run)*>(to))(rank); }, &run});
}

}  // namespace carousel
