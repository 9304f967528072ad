#include "exchange/cuda/device_faults.h"

#include <cuda_runtime_api.h>

#include "backend/cuda/check.h"
#include "core/fail.h"
#include "exchange/cuda/fault_words.h"
#include "exchange/impl.h"

namespace sluice {

using cuda::DeviceFault;

MappedFaults::MappedFaults() {
  SLUICE_CUDA_CHECK(cudaHostAlloc(reinterpret_cast<void**>(&faults_), 2 * sizeof(DeviceFault),
                                  cudaHostAllocMapped | cudaHostAllocPortable));
  faults_[0] = faults_[1] = {};
}

MappedFaults::~MappedFaults() {
  (void)cudaFreeHost(faults_);
}

std::optional<DeviceFault> MappedFaults::get(cuda::FaultRecord record) const noexcept {
  const DeviceFault* const fault = faults_ + record;
  if (static_cast<const volatile DeviceFault*>(fault)->kind == cuda::kNoFault) return {};
  return *fault;
}

std::vector<int> DeviceFaults::ranks_of(const DeviceFault& fault) const {
  std::vector<int> ranks;
  for (int r = 0; r < num_ranks_; ++r) {
    if (fault.missing >> r & 1) ranks.push_back(r);
  }
  return ranks;
}

std::string DeviceFaults::describe(const DeviceFault& fault) const {
  if (fault.kind == cuda::kOtherLayer) {
    const std::vector<int> ranks = ranks_of(fault);
    return fmt::format(
        "{} epoch {} on rank {}: {}", operation_of(fault), fault.epoch, rank_,
        different_calls({{list_of(ranks).substr(1), name_of_layer_(static_cast<int>(fault.seen))}},
                        fmt::format("{}", rank_),
                        name_of_layer_(static_cast<int>(fault.expected))));
  }
  const char* const what = fault.kind == cuda::kPeerMissing ? "still missing rank(s)"
                           : fault.kind == cuda::kDropped
                               ? "dropped their dispatch instead of combining it: rank(s)"
                               : "out of step: a later epoch from rank(s)";
  return fmt::format("{} epoch {} on rank {}: waited at most {} ms, {}{} (flag {}, expected {})",
                     operation_of(fault), fault.epoch, rank_, config_.peer_timeout.count(), what,
                     list_of(ranks_of(fault)), fault.seen, fault.expected);
}

void DeviceFaults::throw_failure() {
  if (failure_) {
    fail_of_ranks(ErrorCode::kTransport, failure_->ranks(), "this exchange stopped earlier: {}",
                  failure_->what());
  }
  const auto fault = failure();
  if (!fault) return;
  failure_ =
      Error(fault->kind == cuda::kPeerMissing ? ErrorCode::kPeerTimeout : ErrorCode::kTransport,
            describe(*fault), ranks_of(*fault));
  throw *failure_;
}

std::optional<DeviceFault> DeviceFaults::take_refusal() noexcept {
  const auto refusal = records_.get(cuda::kRefusal);
  if (refusal) records_.clear(cuda::kRefusal);
  return refusal;
}

}  // namespace sluice
