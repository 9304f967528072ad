#include "exchange/cuda/fault_words.h"

#include "core/fail.h"

namespace sluice {

const char* operation_of(const cuda::DeviceFault& fault) {
  static constexpr const char* kOperations[] = {"dispatch (row counts)", "dispatch", "combine",
                                                "dispatch (reuse of buffers)"};
  return kOperations[fault.operation];
}

void throw_refusal(const ExchangeConfig& config, const cuda::DeviceFault& refusal) {
  if (refusal.kind == cuda::kBadIndex) {
    fail(ErrorCode::kInvalidArgument,
         "an earlier dispatch had topk_idx[{}, {}] = {}, not in [-1, {}): that slot was left empty",
         refusal.where / config.num_topk, refusal.where % config.num_topk, refusal.value,
         config.num_experts);
  }
  fail(ErrorCode::kInvalidArgument,
       "an earlier dispatch would have given expert {} {} rows, max_m is {}: every rank refused "
       "it, its combine gave NaN",
       refusal.where, refusal.count, refusal.value);
}

}  // namespace sluice
