// fake_gather.h - an all-gather between threads that does not wait without end: fake_nccl.h's.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <span>
#include <vector>

#include "transport/nccl_api.h"

namespace sluice::testing {

class FakeGather {
 public:
  /// all: [num_ranks, bytes of `mine`], as many on each rank. As NcclApi::gather.
  int gather(int rank, int num_ranks, std::span<const std::byte> mine, std::byte* all,
             std::chrono::milliseconds timeout) {
    std::unique_lock lock(mutex_);
    parts_.resize(static_cast<std::size_t>(num_ranks));
    auto& own = parts_[static_cast<std::size_t>(rank)];
    const std::size_t begin = own.size();
    own.insert(own.end(), mine.begin(), mine.end());
    changed_.notify_all();
    const auto have_come = [&] {
      return std::ranges::all_of(parts_,
                                 [&](const auto& p) { return p.size() >= begin + mine.size(); });
    };
    if (!changed_.wait_for(lock, timeout, have_come)) return kNcclTimedOut;
    for (const auto& part : parts_) {
      all = std::copy_n(part.begin() + static_cast<std::ptrdiff_t>(begin), mine.size(), all);
    }
    return kNcclSuccess;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::vector<std::byte>> parts_;  // Of each rank, what it gave, in order.
};

}  // namespace sluice::testing
