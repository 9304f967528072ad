#include "backend/cpu/task_queue.h"

namespace sluice::cpu {

TaskQueue::TaskQueue(const MemoryNodes& nodes, std::int64_t num_items, std::int64_t num_slices)
    : nodes_(nodes), runs_(static_cast<std::size_t>(nodes.num_threads())) {
  std::vector<std::int64_t> before(static_cast<std::size_t>(nodes.count()), 0);
  for (int thread = 0; thread < nodes.num_threads(); ++thread) {
    const int node = nodes.of_thread(thread);
    const std::int64_t place = before[static_cast<std::size_t>(node)]++;
    Run& run = runs_[static_cast<std::size_t>(thread)];
    run.slices = nodes.share(node, num_slices);
    const std::int64_t tasks = num_items * (run.slices.last - run.slices.first);
    const std::int64_t threads = nodes.num_threads_of(node);
    run.next.store(tasks * place / threads, std::memory_order_relaxed);
    run.last = tasks * (place + 1) / threads;
  }
}

std::optional<StageTask> TaskQueue::take_from(Run& run) {
  // Looked at first: only a run with tasks is written to.
  if (run.next.load(std::memory_order_relaxed) >= run.last) return std::nullopt;
  const std::int64_t task = run.next.fetch_add(1, std::memory_order_relaxed);
  if (task >= run.last) return std::nullopt;
  const std::int64_t width = run.slices.last - run.slices.first;
  return StageTask{task / width, run.slices.first + task % width};
}

std::optional<StageTask> TaskQueue::take(int thread) {
  const int num_threads = nodes_.num_threads(), node = nodes_.of_thread(thread);
  for (const bool near : {true, false}) {
    for (int i = 0; i < num_threads; ++i) {
      const int other = (thread + i) % num_threads;
      if ((nodes_.of_thread(other) == node) != near) continue;
      if (const auto task = take_from(runs_[static_cast<std::size_t>(other)])) return task;
    }
  }
  return std::nullopt;
}

}  // namespace sluice::cpu
