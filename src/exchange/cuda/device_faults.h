// device_faults.h - what kernels of the exchange found wrong, and the errors that say so.
//
//   a kernel --the first of each kind is kept--> two records in host-mapped memory
//   a host call <--throws what is in them--'
//
//   kFailure: a wait that ended badly; it stops the exchange for good
//   kRefusal: a dispatch that was refused; the exchange works on
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "exchange/cuda/exchange_kernels.h"
#include "sluice/error.h"
#include "sluice/exchange.h"

namespace sluice {

/// The two fault records, in host-mapped memory: they outlive a failed kernel.
class MappedFaults {
 public:
  MappedFaults();
  ~MappedFaults();
  MappedFaults(const MappedFaults&) = delete;
  MappedFaults& operator=(const MappedFaults&) = delete;
  [[nodiscard]] cuda::DeviceFault* device() const noexcept { return faults_; }
  [[nodiscard]] std::optional<cuda::DeviceFault> get(cuda::FaultRecord record) const noexcept;
  void clear(cuda::FaultRecord record) noexcept { faults_[record].kind = cuda::kNoFault; }

 private:
  cuda::DeviceFault* faults_ = nullptr;
};

/// Of one rank's exchange.
class DeviceFaults {
 public:
  /// name_of_layer: of a Routing::layer.
  DeviceFaults(const ExchangeConfig& config, int rank, int num_ranks,
               std::function<std::string(int)> name_of_layer)
      : config_(config),
        rank_(rank),
        num_ranks_(num_ranks),
        name_of_layer_(std::move(name_of_layer)) {}

  /// For kernels to write to: cuda::FaultRecord is the index.
  [[nodiscard]] cuda::DeviceFault* device() const noexcept { return records_.device(); }
  [[nodiscard]] std::optional<cuda::DeviceFault> failure() const noexcept {
    return records_.get(cuda::kFailure);
  }
  /// Throws if an earlier wait has stopped the exchange. Combine throws nothing else: whether it
  /// saw a refusal of its own dispatch already would depend on time, and peers wait for it.
  void throw_failure();
  /// The refusal that is recorded, if one is, and forgets it on the host.
  [[nodiscard]] std::optional<cuda::DeviceFault> take_refusal() noexcept;

  /// The ranks that a failure blames, and the failure in words.
  [[nodiscard]] std::vector<int> ranks_of(const cuda::DeviceFault& fault) const;
  [[nodiscard]] std::string describe(const cuda::DeviceFault& fault) const;

 private:
  ExchangeConfig config_;
  int rank_, num_ranks_;
  std::function<std::string(int)> name_of_layer_;
  MappedFaults records_;
  std::optional<Error> failure_;  // What stopped the exchange for good.
};

}  // namespace sluice
