// rank_reports.h - what the ranks of a benchmark tell each other and the reporter.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "sluice/lab/ranks.h"
#include "sluice/transport.h"

namespace sluice {

/// For collectives of the measurement itself; ranks check large batches at their own pace.
inline constexpr std::chrono::milliseconds kBenchTimeout{60'000};

/// The largest of what the ranks measured, entry by entry.
inline void keep_slowest(Transport& transport, std::span<double> mine) {
  const auto all = transport.all_gather(std::as_bytes(mine), kBenchTimeout);
  for (const auto& bytes : all) {
    for (std::size_t i = 0; i < mine.size(); ++i) {
      double theirs = 0;
      std::memcpy(&theirs, bytes.data() + i * sizeof(theirs), sizeof(theirs));
      mine[i] = std::max(mine[i], theirs);
    }
  }
}

template <class T>
std::string to_bytes(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}
template <class T>
T from_bytes(const std::string& bytes) {
  T value{};
  std::memcpy(&value, bytes.data(), sizeof(value));
  return value;
}

/// Ranks as threads of this process.
inline std::vector<std::string> run_as_threads(
    int num_ranks, const std::function<std::string(int, Transport&)>& body) {
  std::vector<std::string> results(static_cast<std::size_t>(num_ranks));
  auto transports = make_inproc_transports(num_ranks);
  on_every_rank(num_ranks, [&](int r) {
    const auto i = static_cast<std::size_t>(r);
    results[i] = body(r, *transports[i]);
  });
  return results;
}

}  // namespace sluice
