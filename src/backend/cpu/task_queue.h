// task_queue.h - the tasks of one phase of the expert stage, each taken by one thread.
//
//   task = (item, slice), in this order; a node's threads have the slices of its share
//   (memory_nodes.h), in consecutive runs of equal length, one for each thread
//
// A thread takes its own run from the front, then what is left of the others', of its node first.
// So a thread works on few items, whose digits stay in its caches, and no thread waits for another
// while any task is left.
// Threads: any number may take at the same time.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "backend/cpu/memory_nodes.h"

namespace sluice::cpu {

struct StageTask {
  std::int64_t item = 0, slice = 0;
};

class TaskQueue {
 public:
  /// `nodes` outlives the queue.
  TaskQueue(const MemoryNodes& nodes, std::int64_t num_items, std::int64_t num_slices);

  /// The next task for `thread`, which is one that `nodes` knows. None: all are taken.
  [[nodiscard]] std::optional<StageTask> take(int thread);

 private:
  /// A thread's tasks, numbered from item to item of its node's slices.
  struct alignas(64) Run {
    std::atomic<std::int64_t> next{0};
    std::int64_t last = 0;
    MemoryNodes::Share slices;
  };
  [[nodiscard]] std::optional<StageTask> take_from(Run& run);

  const MemoryNodes& nodes_;
  std::vector<Run> runs_;  // [num_threads]
};

}  // namespace sluice::cpu
