// memory_nodes.h - which memory is near which thread, on machines with several nodes (NUMA).
//
// A matrix is cut by output channels into one share for each node whose cores the threads run on,
// as large as the node's share of the threads. A share's memory lies on its node, and the threads
// of a node take its tasks first. Every node then reads its own memory for every expert, however
// few experts have rows. On a machine with one node nothing is asked of the system, and tasks are
// taken in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <vector>

namespace sluice {
class ThreadPool;
}

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
  /// The share [first, last) of [0, n) that belongs to a node.
  struct Share {
    std::int64_t first = 0, last = 0;
  };
  [[nodiscard]] Share share(int node, std::int64_t n) const;

  /// Asks the system to take the pages of [memory, memory + bytes), of `n` slices of equal size,
  /// from the nodes of their shares. Only pages that nobody has written yet are meant. A hint: a
  /// node without free memory is passed over, and a refusal changes no result.
  void place(std::byte* memory, std::size_t bytes, std::int64_t n) const;

  /// body(item, slice, thread) once for each of num_items * num_slices tasks. A thread takes those
  /// of its node, in order, and then those that are left elsewhere. Throws: as ThreadPool::run().
  void for_each_task(
      ThreadPool& pool, std::int64_t num_items, std::int64_t num_slices,
      const std::function<void(std::int64_t item, std::int64_t slice, int thread)>& body) const;

 private:
  bool has_several_ = false;       // This machine, whether our threads use them or not.
  std::vector<int> ids_;           // [count] as the system numbers them.
  std::vector<int> of_thread_;     // [num_threads]
  std::vector<int> first_thread_;  // [count + 1] threads of the nodes before.
};

}  // namespace sluice::cpu
