#include "threads.h"

#include <sched.h>
#include <unistd.h>

#include <mutex>
#include <thread>

namespace carousel {

std::atomic<int> thread_limit{1 << 30};

int num_cores() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return std::max(1u, std::thread::hardware_concurrency());
}

namespace {

// Threads enter a region one by one, in the order in which they come, until it is closed. The door holds which region
// it is in the upper half, and below that whether it is open and how many have entered.
class Pool {
 public:
  void run(int threads, Job job) {
    if (threads <= 1) return job.call(job.body, 0);
    const std::lock_guard<std::mutex> turn(turn_);
    grow(threads - 1);
    job_ = job;
    seats_ = threads - 1;
    inside_.store(0, std::memory_order_relaxed);
    const uint32_t region = region_.load(std::memory_order_relaxed) + 1;
    door_.store(uint64_t(region) << 32 | kOpen, std::memory_order_release);
    region_.store(region, std::memory_order_release);
    region_.notify_all();
    job.call(job.body, 0);
    const int entered = int(door_.fetch_and(~kOpen, std::memory_order_acq_rel) & kCount);
    for (int left = inside_.load(std::memory_order_acquire); left != entered;)
      left = wait_for_change(inside_, left);
  }

 private:
  static constexpr uint64_t kOpen = uint64_t(1) << 31, kCount = kOpen - 1;

  void grow(int workers) {
    for (; workers_ < workers; ++workers_)
      std::thread([this, seen = region_.load(std::memory_order_relaxed)] { work(seen); }).detach();
  }

  void work(uint32_t seen) {
    for (;;) {
      seen = wait_for_change(region_, seen);
      uint64_t door = door_.load(std::memory_order_acquire);
      while (door >> 32 == seen && (door & kOpen) && int(door & kCount) < seats_) {
        if (!door_.compare_exchange_weak(door, door + 1, std::memory_order_acq_rel)) continue;
        job_.call(job_.body, int(door & kCount) + 1);
        inside_.fetch_add(1, std::memory_order_acq_rel);  // the last that it does with this region
        inside_.notify_one();
        break;
      }
    }
  }

  std::mutex turn_;
  int workers_ = 0;
  Job job_{};
  std::atomic<int> seats_ = 0;  // in the region, besides that of the thread that opens it
  alignas(64) std::atomic<uint32_t> region_ = 0;
  alignas(64) std::atomic<uint64_t> door_ = 0;
  alignas(64) std::atomic<int> inside_ = 0;  // how many that entered have left
};

// That of this process: one that was forked has none of its parent's threads. Never destroyed, since threads wait in it.
Pool& pool() {
  static std::mutex in_use;
  static Pool* made = nullptr;
  static pid_t owner = 0;
  const std::lock_guard<std::mutex> turn(in_use);
  if (owner != getpid()) {
    made = new Pool;
    owner = getpid();
  }
  return *made;
}

}  // namespace

void run_on_pool(int threads, Job job) { pool().run(threads, job); }

}  // namespace carousel
