// rank_reports.h - how the ranks of a benchmark run, and what they tell each other and the
// reporter.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "core/fail.h"
#include "sluice/backend.h"
#include "sluice/lab/exchange_bench.h"
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

/// How a benchmark runs its ranks: as `given`, else as threads.
/// Throws: kInvalidArgument; what check(), which every rank makes, throws. Where all ranks refuse
/// alike, the cause is said once.
[[nodiscard]] inline RunRanks checked_ranks(int num_ranks, const RunRanks& given,
                                            const std::function<void()>& check) {
  check_argument(num_ranks >= 1, "num_ranks {}; at least one", num_ranks);
  RunRanks run_ranks =
      given ? given : [num_ranks](const auto& body) { return run_as_threads(num_ranks, body); };
  (void)run_ranks([&](int, Transport&) {
    check();
    return std::string();
  });
  return run_ranks;
}

/// Devices that the ranks are on: of `asked` or, where that is 0, of all that there are.
[[nodiscard]] inline int devices_in_use(Device::Kind kind, int num_ranks, int asked) {
  return std::clamp(asked > 0 ? asked : num_devices(kind), 1, num_ranks);
}

}  // namespace sluice
