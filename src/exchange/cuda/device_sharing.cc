#include "exchange/cuda/device_sharing.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <span>

#include "backend/cuda/check.h"
#include "core/fail.h"
#include "core/random_bytes.h"

namespace sluice {
namespace {

/// What tells devices and processes apart.
struct DeviceAndProcess {
  cudaUUID_t device;
  std::uint64_t process;
};

std::uint64_t this_process() {
  static const std::uint64_t token = [] {
    std::uint64_t drawn = 0;
    draw_random(std::as_writable_bytes(std::span(&drawn, 1)));
    return drawn;
  }();
  return token;
}

/// True if a kernel is loaded at its first launch, which may wait for everything on the device.
bool loads_kernels_lazily() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  SLUICE_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuModuleGetLoadingMode", &entry, 12000,
                                                     cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || entry == nullptr) return false;
  CUmoduleLoadingMode mode{};
  const auto query = reinterpret_cast<decltype(&cuModuleGetLoadingMode)>(entry);
  return query(&mode) == CUDA_SUCCESS && mode == CU_MODULE_LAZY_LOADING;
}

}  // namespace

void enable_peer_access(int device, const std::byte* window) {
  cudaPointerAttributes attributes{};
  SLUICE_CUDA_CHECK(cudaPointerGetAttributes(&attributes, window));
  if (attributes.device == device) return;
  int has_atomics = 0;
  SLUICE_CUDA_CHECK(cudaDeviceGetP2PAttribute(&has_atomics, cudaDevP2PAttrNativeAtomicSupported,
                                              device, attributes.device));
  if (has_atomics == 0) {
    fail(
        ErrorCode::kUnsupported,
        "cuda:{} cannot add to words in the memory of cuda:{}, which the exchange's flags need: no "
        "NVLink connects them",
        device, attributes.device);
  }
  const cudaError_t status = cudaDeviceEnablePeerAccess(attributes.device, 0);
  if (status == cudaErrorPeerAccessAlreadyEnabled) {
    (void)cudaGetLastError();
  } else if (status != cudaSuccess) {
    (void)cudaGetLastError();
    fail(ErrorCode::kUnsupported, "cuda:{} cannot reach the memory of cuda:{}: {}", device,
         attributes.device, cudaGetErrorString(status));
  }
}

RanksOnDevice count_ranks_on_device(Transport& transport, int device,
                                    std::chrono::milliseconds timeout) {
  cudaDeviceProp properties{};
  SLUICE_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  const DeviceAndProcess mine{properties.uuid, this_process()};
  RanksOnDevice ranks{.all = 0, .in_process = 0};
  for (const auto& bytes : transport.all_gather(std::as_bytes(std::span(&mine, 1)), timeout)) {
    DeviceAndProcess theirs{};
    std::memcpy(&theirs, bytes.data(), sizeof(theirs));
    if (std::memcmp(&theirs.device, &mine.device, sizeof(mine.device)) != 0) continue;
    ranks.all += 1;
    ranks.in_process += theirs.process == mine.process;
  }
  if (ranks.in_process > 1 && loads_kernels_lazily()) {
    fail(ErrorCode::kUnsupported,
         "{} ranks of this process share cuda:{} and kernels are loaded lazily, which can wait for "
         "a rank that waits: set CUDA_MODULE_LOADING=EAGER before the first CUDA call",
         ranks.in_process, device);
  }
  return ranks;
}

}  // namespace sluice
