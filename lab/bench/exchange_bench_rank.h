// exchange_bench_rank.h - one rank of `bench exchange`: its tensors, its exchange, its check.
#pragma once

#include <cstdint>
#include <memory>

#include "backend/ops.h"
#include "bench/exchange_traffic.h"
#include "bench/rank_reports.h"
#include "sluice/exchange.h"
#include "sluice/transport.h"

namespace sluice {

class BenchRank {
 public:
  /// Collective. Borrows all three.
  BenchRank(const Traffic& traffic, Transport& transport, BackendOps& backend);

  void barrier() { (void)transport_.all_gather({}, kBenchTimeout); }
  [[nodiscard]] Exchange& exchange() { return *exchange_; }

  [[nodiscard]] Dispatched dispatch();
  void combine(Dispatched d);

  /// One pair, every byte compared; returns how many elements were. Throws: kInternal naming rank,
  /// row and element of the first difference.
  [[nodiscard]] std::int64_t check();

  /// False where the host waits in each dispatch, for the sizes of what other hosts send.
  [[nodiscard]] bool can_be_captured() const {
    const ExchangeConfig& config = exchange_->config();
    return config.hosts.num_hosts() == 1 || config.mode == Mode::kLowLatency;
  }

  /// One pair that is not marked, in which ranks that were launched early wait for the others; then
  /// `pairs` between two marks, or with a mark after each operation. Called anew at each replay
  /// where it cannot be captured.
  [[nodiscard]] std::unique_ptr<Recording> record(int pairs, bool mark_operations);

  /// Host time of the two calls, medians over `pairs` calls that wait for nothing.
  struct CallTimes {
    double dispatch_us = 0, combine_us = 0;
  };
  [[nodiscard]] CallTimes time_calls(int pairs);

 private:
  [[nodiscard]] std::unique_ptr<DeviceBuffer> upload(const void* host, std::size_t bytes);
  [[nodiscard]] MutableTensorView rows_of(const Dispatched& d) const;
  [[nodiscard]] std::int64_t check_rows(const Dispatched& d);
  [[nodiscard]] std::int64_t check_sums();
  void check_sums_of(std::size_t token, const std::uint16_t* y) const;

  const Traffic& traffic_;
  Transport& transport_;
  BackendOps& backend_;
  int rank_;
  std::unique_ptr<DeviceBuffer> x_, idx_, weights_, y_, rows_;
  std::unique_ptr<Exchange> exchange_;
};

}  // namespace sluice
