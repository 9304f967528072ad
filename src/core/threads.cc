#include "core/threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

/// Long enough to bridge the gap between two phases of one expert stage, short enough to cost
/// nothing when a rank waits for its peers.
constexpr std::chrono::microseconds kSpin{50};
constexpr int kMaxThreads = 1024;

/// Spins until `done()` or until kSpin has passed.
template <class Done>
bool spin_until(Done done) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

void pin_this_thread(int core) noexcept {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<unsigned>(core), &set);
  // Refused only if the core went away meanwhile; running unpinned is then the best there is.
  (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

}  // namespace

std::vector<int> available_cores() {
  std::vector<int> cores;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int i = 0; i < CPU_SETSIZE; ++i) {
      if (CPU_ISSET(static_cast<unsigned>(i), &set)) cores.push_back(i);
    }
  }
  if (cores.empty()) {  // More cores than a cpu_set_t holds.
    const int n = static_cast<int>(std::thread::hardware_concurrency());
    for (int i = 0; i < (n > 0 ? n : 1); ++i) cores.push_back(i);
  }
  return cores;
}

std::vector<int> core_share(const std::vector<int>& cores, int local_rank, int num_local_ranks) {
  check_argument(num_local_ranks >= 1, "num_local_ranks {} is not positive", num_local_ranks);
  check_argument(local_rank >= 0 && local_rank < num_local_ranks,
                 "local_rank {} is not in [0, num_local_ranks {})", local_rank, num_local_ranks);
  check_argument(!cores.empty(), "no cores to share");
  const auto n = static_cast<std::int64_t>(cores.size());
  const std::int64_t first = n * local_rank / num_local_ranks;
  const std::int64_t last = n * (local_rank + 1) / num_local_ranks;
  if (first == last) return {cores[static_cast<std::size_t>(local_rank % n)]};
  return {cores.begin() + first, cores.begin() + last};
}

/// The threads of a pool beside the caller, and what they share with it.
class ThreadPool::Workers {
 public:
  Workers(int num_threads, std::vector<int> cores)
      : cores_(std::move(cores)), errors_(static_cast<std::size_t>(num_threads)) {
    workers_.reserve(static_cast<std::size_t>(num_threads - 1));
    try {
      for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error& e) {
      stop();
      fail(ErrorCode::kInternal, "cannot start thread {} of {}: {}", workers_.size() + 1,
           num_threads, e.what());
    }
  }
  ~Workers() { stop(); }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  void run(const Body& body);

 private:
  void work(int thread);
  void stop() noexcept;
  /// Waits until `epoch_` is not `seen`; returns the new one.
  std::uint64_t wait_for_work(std::uint64_t seen);
  void wait_for_workers();

  std::vector<int> cores_;
  std::vector<std::exception_ptr> errors_;  // [num_threads]
  const Body* body_ = nullptr;              // Published by epoch_.
  std::atomic<std::uint64_t> epoch_{0};
  std::atomic<int> num_running_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable work_ready_;
  std::condition_variable work_done_;
  std::vector<std::thread> workers_;
};

void ThreadPool::Workers::stop() noexcept {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    epoch_.fetch_add(1);
  }
  work_ready_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

std::uint64_t ThreadPool::Workers::wait_for_work(std::uint64_t seen) {
  if (!spin_until([&] { return epoch_.load(std::memory_order_acquire) != seen; })) {
    std::unique_lock lock(mutex_);
    work_ready_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
  }
  return epoch_.load(std::memory_order_acquire);
}

void ThreadPool::Workers::wait_for_workers() {
  const auto idle = [&] { return num_running_.load(std::memory_order_acquire) == 0; };
  if (spin_until(idle)) return;
  std::unique_lock lock(mutex_);
  work_done_.wait(lock, idle);
}

void ThreadPool::Workers::work(int thread) {
  pin_this_thread(cores_[static_cast<std::size_t>(thread) % cores_.size()]);
  std::uint64_t seen = 0;
  for (;;) {
    seen = wait_for_work(seen);
    if (stopping_) return;
    try {
      (*body_)(thread);
    } catch (...) {
      errors_[static_cast<std::size_t>(thread)] = std::current_exception();
    }
    if (num_running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      { const std::lock_guard lock(mutex_); }  // The caller is either not yet or already waiting.
      work_done_.notify_one();
    }
  }
}

void ThreadPool::Workers::run(const Body& body) {
  body_ = &body;
  num_running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  {
    const std::lock_guard lock(mutex_);
    epoch_.fetch_add(1, std::memory_order_release);
  }
  work_ready_.notify_all();
  try {
    body(0);
  } catch (...) {
    errors_[0] = std::current_exception();
  }
  wait_for_workers();
  std::exception_ptr first;
  for (std::exception_ptr& error : errors_) {
    if (error && !first) first = error;
    error = nullptr;
  }
  if (first) std::rethrow_exception(first);
}

ThreadPool::ThreadPool(int num_threads, std::vector<int> cores) : num_threads_(num_threads) {
  check_argument(num_threads >= 1 && num_threads <= kMaxThreads, "num_threads {} is not in [1, {}]",
                 num_threads, kMaxThreads);
  check_argument(!cores.empty(), "a thread pool needs at least one core");
  if (num_threads > 1) workers_.reset(new Workers(num_threads, std::move(cores)));
}

ThreadPool::~ThreadPool() = default;

void ThreadPool::run(const Body& body) {
  if (!workers_) return body(0);
  workers_.get_deleter().home().require("backend's worker threads");
  workers_->run(body);
}

void ThreadPool::for_each_task(std::int64_t num_tasks,
                               const std::function<void(std::int64_t task, int thread)>& body) {
  std::atomic<std::int64_t> next{0};
  run([&](int thread) {
    for (;;) {
      const std::int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) return;
      body(task, thread);
    }
  });
}

}  // namespace sluice
