// The only place that names concrete backends.
#include "backend/cpu/cpu_backend.h"
#include "core/fail.h"
#include "sluice/backend.h"

namespace sluice {

#ifdef SLUICE_HAS_CUDA
std::unique_ptr<Backend> make_cuda_backend(const BackendConfig& config);  // cuda/cuda_backend.cc
#endif

std::unique_ptr<Backend> make_backend(const BackendConfig& config) {
  switch (config.device.kind) {
    case Device::Kind::kHost:
      return make_cpu_backend(config);
    case Device::Kind::kCuda:
#ifdef SLUICE_HAS_CUDA
      return make_cuda_backend(config);
#else
      fail(ErrorCode::kUnsupported,
           "device cuda:{}: this build has no CUDA backend (configure with -DSLUICE_CUDA=ON)",
           config.device.index);
#endif
  }
  fail(ErrorCode::kInvalidArgument, "unknown device kind {}", static_cast<int>(config.device.kind));
}

}  // namespace sluice
