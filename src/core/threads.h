// threads.h - the pool of pinned threads that one rank computes with.
//
//   run(body): body(0) on the caller, body(1..n-1) on the workers; returns when all have returned.
//
// Workers sleep between calls after a short spin. Ranks that are threads of one process each have a
// pool over their own share of the cores, so the pools together never want more than there are.
// Threads: one caller at a time. A child of fork() has no workers: there run() refuses a pool that
// has some, and destruction leaves them alone.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "core/home_process.h"

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

  [[nodiscard]] int num_threads() const noexcept { return num_threads_; }

  /// Runs body(thread) once on every thread. Throws: what the lowest-numbered failing thread threw,
  /// after all have returned; kInvalidArgument in a child of the process that made the pool.
  void run(const Body& body);

  /// body(task, thread) for every task in [0, num_tasks): each thread takes the next one when it is
  /// free, in order. Throws: as run(); the tasks of a thread that threw are left undone.
  void for_each_task(std::int64_t num_tasks,
                     const std::function<void(std::int64_t task, int thread)>& body);

 private:
  class Workers;
  int num_threads_;
  std::unique_ptr<Workers, DeletedAtHome<Workers>> workers_;  // None: the caller is alone.
};

}  // namespace sluice
