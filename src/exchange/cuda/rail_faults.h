// rail_faults.h - what stopped an exchange over hosts, or what it refused, in words.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "exchange/cuda/exchange_kernels.h"
#include "sluice/error.h"
#include "sluice/exchange.h"
#include "transport/rails.h"

namespace sluice {

class RailFaults {
 public:
  /// `records`: [2] by cuda::FaultRecord, where kernels write them.
  /// name_of_layer: of a Routing::layer.
  RailFaults(const ExchangeConfig& config, int rank, const Rail& rail,
             std::shared_ptr<cuda::DeviceFault> records,
             std::function<std::string(int)> name_of_layer);

  /// Throws what has stopped the exchange: the rail's own error, or what a kernel found. It names
  /// ranks and hosts.
  void throw_failure();
  /// The refusal that is recorded, if one is, and forgets it on the host.
  [[nodiscard]] std::optional<cuda::DeviceFault> take_refusal() noexcept;

 private:
  [[nodiscard]] std::optional<cuda::DeviceFault> find(cuda::FaultRecord record) const noexcept;
  [[nodiscard]] std::vector<int> ranks_of(const cuda::DeviceFault& fault) const;
  [[nodiscard]] std::string describe(const cuda::DeviceFault& fault) const;

  ExchangeConfig config_;
  int rank_, host_;
  const Rail& rail_;
  std::shared_ptr<cuda::DeviceFault> records_;
  std::function<std::string(int)> name_of_layer_;
  std::optional<Error> failure_;  // What stopped the exchange for good.
};

}  // namespace sluice
