// The only place that names concrete backends.
#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_traits.h"
#include "backend/cuda/cuda_traits.h"
#include "core/fail.h"
#include "sluice/backend.h"

namespace sluice {

#ifdef SLUICE_HAS_CUDA
// cuda/cuda_backend.cc
std::unique_ptr<Backend> make_cuda_backend(const BackendConfig& config);
int num_cuda_devices() noexcept;
#endif

const BackendTraits& traits_of(Device::Kind kind) {
  switch (kind) {
    case Device::Kind::kHost:
      return cpu::traits();
    case Device::Kind::kCuda:
      return cuda::traits();
  }
  fail(ErrorCode::kInvalidArgument, "unknown device kind {}", static_cast<int>(kind));
}

ErrorModel error_model(Device::Kind kind) {
  return traits_of(kind).error;
}

int num_devices(Device::Kind kind) noexcept {
  if (kind == Device::Kind::kHost) return 1;
#ifdef SLUICE_HAS_CUDA
  return num_cuda_devices();
#else
  return 0;
#endif
}

BackendConfig place_rank(Device::Kind kind, int local_rank, int num_local_ranks, int devices) {
  check_argument(num_local_ranks >= 1 && local_rank >= 0 && local_rank < num_local_ranks,
                 "local_rank {} is not in [0, {})", local_rank, num_local_ranks);
  const int found = num_devices(kind);
  check_argument(devices >= 0 && (devices == 0 || devices <= found), "{} devices; there are {}",
                 devices, found);
  // Without a device, device 0: making its backend says what is missing.
  const int used = std::max(1, std::min(devices > 0 ? devices : found, num_local_ranks));
  if (kind == Device::Kind::kHost) {
    return {.local_rank = local_rank, .num_local_ranks = num_local_ranks};
  }
  const int index = local_rank % used;
  return {.device = {kind, index},
          .local_rank = local_rank / used,
          .num_local_ranks = (num_local_ranks - index + used - 1) / used};
}

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
