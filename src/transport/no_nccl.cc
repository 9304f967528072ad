// NCCL in a build without it: a refusal.
#include "core/fail.h"
#include "transport/nccl_api.h"

namespace sluice {

const NcclApi& nccl_library(const std::string&) {
  fail(ErrorCode::kUnsupported,
       "transport 'nccl' is not in this build: configure with SLUICE_NCCL=ON and SLUICE_CUDA=ON");
}

}  // namespace sluice
