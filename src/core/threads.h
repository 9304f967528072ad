// threads.h - the pool of pinned threads that one rank computes with.
//
//   run(body): body(0) on the caller, body(1..n-1) on the workers; returns when all have returned.
//
// Workers sleep between calls after a short spin. Ranks that are threads of one process each have a
// pool over their own share of the cores, so the pools together never want more than there are.
// Threads: one caller at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace sluice {

/// Cores this process may run on, ascending.
[[nodiscard]] std::vector<int> available_cores();

/// The share of `cores` that belongs to rank `local_rank` of `num_local_ranks`: contiguous, even,
/// disjoint while there are enough cores, and never empty. Throws: kInvalidArgument.
[[nodiscard]] std::vector<int> core_share(const std::vector<int>& cores, int local_rank,
                                          int num_local_ranks);

class ThreadPool {
 public:
  using Body = std::function<void(int thread)>;

  /// `num_threads` counts the caller. Worker i is pinned to cores[i % cores.size()]; the caller is
  /// left where it is. Throws: kInvalidArgument; kInternal if the system has no thread to give.
  ThreadPool(int num_threads, std::vector<int> cores);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  [[nodiscard]] int num_threads() const noexcept { return static_cast<int>(workers_.size()) + 1; }

  /// Runs body(thread) once on every thread. Throws: what the lowest-numbered failing thread threw,
  /// after all have returned.
  void run(const Body& body);

  /// body(task, thread) for every task in [0, num_tasks): each thread takes the next one when it is
  /// free, in order. Throws: as run(); the tasks of a thread that threw are left undone.
  void for_each_task(std::int64_t num_tasks,
                     const std::function<void(std::int64_t task, int thread)>& body);

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

}  // namespace sluice
