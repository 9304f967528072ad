// wave_progress.h - which digits of a wave (expert_stage.h) are there.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace sluice::cpu {

/// Threads: any. What a thread did before it reported a task is seen by those that waited for it.
class WaveProgress {
 public:
  /// x of each item becomes digits in `x_tasks` tasks, h in `h_tasks`.
  WaveProgress(std::int64_t num_items, std::int64_t x_tasks, std::int64_t h_tasks);

  void report_x(std::int64_t item);
  void report_h(std::int64_t item);
  /// A task that was taken will not be done.
  void report_failure() noexcept { failed_.store(true, std::memory_order_relaxed); }

  /// Wait for all digits of x, or of h, of one item, or of x of all. False: some will never come.
  [[nodiscard]] bool wait_for_x(std::int64_t item) const { return wait(at(item).x_left); }
  [[nodiscard]] bool wait_for_h(std::int64_t item) const { return wait(at(item).h_left); }
  [[nodiscard]] bool wait_for_all_x() const { return wait(items_without_x_); }

 private:
  struct Item {
    std::atomic<std::int64_t> x_left{0}, h_left{0};
  };
  [[nodiscard]] const Item& at(std::int64_t item) const {
    return items_[static_cast<std::size_t>(item)];
  }
  [[nodiscard]] bool wait(const std::atomic<std::int64_t>& left) const;

  std::vector<Item> items_;
  std::atomic<std::int64_t> items_without_x_;
  std::atomic<bool> failed_{false};
};

}  // namespace sluice::cpu
