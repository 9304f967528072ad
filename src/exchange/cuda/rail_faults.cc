#include "exchange/cuda/rail_faults.h"

#include <utility>

#include "core/fail.h"
#include "exchange/cuda/fault_words.h"
#include "exchange/impl.h"

namespace sluice {

using cuda::DeviceFault;

RailFaults::RailFaults(const ExchangeConfig& config, int rank, const Rail& rail,
                       std::shared_ptr<DeviceFault> records,
                       std::function<std::string(int)> name_of_layer)
    : config_(config),
      rank_(rank),
      host_(config.hosts.host_of(rank)),
      rail_(rail),
      records_(std::move(records)),
      name_of_layer_(std::move(name_of_layer)) {}

std::optional<DeviceFault> RailFaults::find(cuda::FaultRecord record) const noexcept {
  const DeviceFault* const fault = records_.get() + record;
  if (__atomic_load_n(&fault->kind, __ATOMIC_ACQUIRE) == cuda::kNoFault) return {};
  return *fault;
}

std::vector<int> RailFaults::ranks_of(const DeviceFault& fault) const {
  if (fault.kind == cuda::kGaveUp || fault.kind == cuda::kOtherLayer) return {fault.where};
  std::vector<int> ranks;
  const auto mates = config_.hosts.ranks_of(host_);
  for (std::size_t m = 0; m < mates.size(); ++m) {
    if (fault.missing >> m & 1) ranks.push_back(mates[m]);
  }
  return ranks;
}

std::string RailFaults::describe(const DeviceFault& fault) const {
  const std::string where =
      fmt::format("{} epoch {} on {}: ", operation_of(fault), fault.epoch, rail_.names_of({rank_}));
  const std::string who = rail_.names_of(ranks_of(fault));
  const std::string flag = fmt::format(" (flag {}, expected {})", fault.seen, fault.expected);
  switch (fault.kind) {
    case cuda::kGaveUp:
      if (fault.value == fault.where) return where + who + " has stopped";
      return where + "still missing " + who + ", for which " +
             rail_.names_of({static_cast<int>(fault.value)}) + " has stopped";
    case cuda::kOtherLayer:
      return where +
             different_calls(
                 {{fmt::format("{}", fault.where), name_of_layer_(static_cast<int>(fault.seen))}},
                 fmt::format("{}", rank_), name_of_layer_(static_cast<int>(fault.expected)));
    case cuda::kDropped:
      return where + who + " dropped its dispatch instead of combining it" + flag;
    case cuda::kOutOfStep:
      return where + "out of step: a later epoch from " + who + flag;
    default:
      return where + "still missing " + who + flag;
  }
}

void RailFaults::throw_failure() {
  if (failure_) {
    fail_of_ranks(ErrorCode::kTransport, failure_->ranks(), "this exchange stopped earlier: {}",
                  failure_->what());
  }
  try {
    // A rank that stopped for another layer leaves the rail waiting, which is not the cause.
    auto fault = find(cuda::kFailure);
    if (!fault || fault->kind != cuda::kOtherLayer) {
      rail_.check();
      fault = find(cuda::kFailure);
    }
    if (!fault) return;
    throw Error(fault->kind == cuda::kPeerMissing ? ErrorCode::kPeerTimeout : ErrorCode::kTransport,
                describe(*fault), ranks_of(*fault));
  } catch (const Error& error) {
    failure_ = error;
    throw;
  }
}

std::optional<DeviceFault> RailFaults::take_refusal() noexcept {
  const auto refusal = find(cuda::kRefusal);
  if (refusal)
    __atomic_store_n(&records_.get()[cuda::kRefusal].kind, int{cuda::kNoFault}, __ATOMIC_RELEASE);
  return refusal;
}

}  // namespace sluice
