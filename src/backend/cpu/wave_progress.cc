#include "backend/cpu/wave_progress.h"

#include <thread>

namespace sluice::cpu {
namespace {

/// Some ten microseconds. Then the core may be one that another thread needs.
constexpr int kSpins = 1000;

}  // namespace

WaveProgress::WaveProgress(std::int64_t num_items, std::int64_t x_tasks, std::int64_t h_tasks)
    : items_(static_cast<std::size_t>(num_items)), items_without_x_(num_items) {
  for (Item& item : items_) {
    item.x_left.store(x_tasks, std::memory_order_relaxed);
    item.h_left.store(h_tasks, std::memory_order_relaxed);
  }
}

void WaveProgress::report_x(std::int64_t item) {
  if (items_[static_cast<std::size_t>(item)].x_left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    items_without_x_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

void WaveProgress::report_h(std::int64_t item) {
  items_[static_cast<std::size_t>(item)].h_left.fetch_sub(1, std::memory_order_acq_rel);
}

bool WaveProgress::wait(const std::atomic<std::int64_t>& left) const {
  for (int spins = 0; left.load(std::memory_order_acquire) > 0; ++spins) {
    if (failed_.load(std::memory_order_relaxed)) return false;
    if (spins > kSpins) {
      std::this_thread::yield();
      continue;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
  return true;
}

}  // namespace sluice::cpu
