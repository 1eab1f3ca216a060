#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace millrace {
namespace {

constexpr auto kSpin = std::chrono::microseconds(20);
constexpr uint64_t kLeftMask = 0xffffffffu;

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Spin until done() or until the time is over; true if done.
template <class Done>
bool spin(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class Pool {
 public:
  void resize(int count) {
    std::lock_guard<std::mutex> guard(resizing_);
    threads_.store(count);
    while (started_ < count - 1) {
      const int index = ++started_;
      std::thread([this, index] { work(index); }).detach();
    }
  }

  int threads() const { return threads_.load(std::memory_order_relaxed); }

  void run(int64_t count, void (*body)(void*, int64_t), void* context) {
    if (count <= 0) return;
    if (count > int64_t(kLeftMask) || !running_.try_lock()) {
      for (int64_t i = 0; i < count; ++i) body(context, i);
      return;
    }
    body_ = body;
    context_ = context;
    count_ = count;
    done_.store(0, std::memory_order_relaxed);
    epoch_ = (epoch_ + 1) & kLeftMask;
    left_.store(epoch_ << 32 | uint64_t(count));
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> guard(mutex_);
      wake_.notify_all();
    }
    take();
    const auto finished = [&] { return done_.load() == count; };
    if (!spin(finished)) {
      std::unique_lock<std::mutex> guard(mutex_);
      caller_waits_.store(true);
      finished_.wait(guard, finished);
      caller_waits_.store(false);
    }
    running_.unlock();
  }

 private:
  bool has_work() const { return (left_.load() & kLeftMask) != 0; }

  // Take iterations until none is left. The loop's fields may be read only after an iteration was
  // taken: then the loop cannot end before that iteration is counted as done.
  void take() {
    uint64_t left = left_.load();
    while (left & kLeftMask) {
      if (!left_.compare_exchange_weak(left, left - 1)) continue;
      const int64_t count = count_;
      body_(context_, count - int64_t(left & kLeftMask));
      if (done_.fetch_add(1) + 1 == count && caller_waits_.load()) {
        std::lock_guard<std::mutex> guard(mutex_);
        finished_.notify_one();
      }
      left = left_.load();
    }
  }

  void work(int index) {
    const auto ready = [this, index] { return has_work() && index < threads(); };
    for (;;) {
      if (!spin(ready)) {
        std::unique_lock<std::mutex> guard(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(guard, ready);
        sleepers_.fetch_sub(1);
      }
      take();
    }
  }

  // Epoch in the high half (so that a late compare-exchange fails), iterations left in the low one.
  alignas(64) std::atomic<uint64_t> left_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  uint64_t epoch_ = 0;
  std::atomic<int> sleepers_{0}, threads_{1};
  std::atomic<bool> caller_waits_{false};
  int started_ = 0;
  std::mutex running_, resizing_, mutex_;
  std::condition_variable wake_, finished_;
};

// Never destroyed: detached workers may outlive main().
Pool* pool() {
  static Pool* const the_pool = [] {
    Pool* made = new Pool;
    // Threads do not survive a fork: the child starts over with one, until it asks for more.
    static Pool* kept = made;
    pthread_atfork(nullptr, nullptr, [] { new (kept) Pool; });
    return made;
  }();
  return the_pool;
}

}  // namespace

int num_threads() { return pool()->threads(); }

void set_num_threads(int count) { pool()->resize(std::max(count, 1)); }

void run_parallel(int64_t count, void (*body)(void*, int64_t), void* context) {
  pool()->run(count, body, context);
}

int64_t pieces(double nanoseconds, int64_t most) {
  const int threads = num_threads();
  if (threads == 1 || nanoseconds < 8e3) return std::min<int64_t>(most, 1);
  const double worthwhile = std::max(nanoseconds / 4e3, 1.0);
  return std::clamp<int64_t>(int64_t(worthwhile), 1, std::min<int64_t>(most, threads * 4));
}

}  // namespace millrace

#pragma GCC visibility push(default)
extern "C" {
void millrace_set_num_threads(int count) { millrace::set_num_threads(count); }
int millrace_num_threads() { return millrace::num_threads(); }
}
#pragma GCC visibility pop
