// memory_nodes.h - which memory is near which thread, on machines with several nodes (NUMA).
//
// A matrix is cut by output channels into one share for each node whose cores the threads run on,
// as large as the node's share of the threads. A share's memory lies on its node, and the threads
// of a node take its tasks first (task_queue.h). Every node then reads its own memory for every
// expert, however few experts have rows. On a machine with one node nothing is asked of the system.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <vector>

namespace sluice::cpu {

class MemoryNodes {
 public:
  /// One node.
  explicit MemoryNodes(int num_threads);
  /// Thread i runs on cores[i % cores.size()] (ThreadPool). `root` has node<N>/cpulist, as
  /// /sys/devices/system/node. Where that cannot be read there is one node.
  MemoryNodes(const std::vector<int>& cores, int num_threads, const std::filesystem::path& root);

  /// Nodes that have threads.
  [[nodiscard]] int count() const noexcept { return static_cast<int>(first_thread_.size()) - 1; }
  /// Of thread `thread`, in [0, count()).
  [[nodiscard]] int of_thread(int thread) const {
    return of_thread_[static_cast<std::size_t>(thread)];
  }
  [[nodiscard]] int num_threads() const noexcept { return first_thread_.back(); }
  [[nodiscard]] int num_threads_of(int node) const {
    const auto i = static_cast<std::size_t>(node);
    return first_thread_[i + 1] - first_thread_[i];
  }
  /// The share [first, last) of [0, n) that belongs to a node.
  struct Share {
    std::int64_t first = 0, last = 0;
  };
  [[nodiscard]] Share share(int node, std::int64_t n) const;

  /// Asks the system to take the pages of [memory, memory + bytes), of `n` slices of equal size,
  /// from the nodes of their shares. Only pages that nobody has written yet are meant. A hint: a
  /// node without free memory is passed over, and a refusal changes no result.
  void place(std::byte* memory, std::size_t bytes, std::int64_t n) const;

 private:
  bool has_several_ = false;       // This machine, whether our threads use them or not.
  std::vector<int> ids_;           // [count] as the system numbers them.
  std::vector<int> of_thread_;     // [num_threads]
  std::vector<int> first_thread_;  // [count + 1] threads of the nodes before.
};

}  // namespace sluice::cpu
