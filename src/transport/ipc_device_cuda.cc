// Device memory across processes by CUDA's IPC handles. A mapping outlives the process that gave
// the memory, and is to be closed before the giver frees it: ipc.cc sees to that.
#include <cuda_runtime_api.h>

#include <cstring>

#include "core/fail.h"
#include "transport/ipc_device.h"

namespace sluice {
namespace {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  fail(ErrorCode::kCuda, "{}: {}", call, cudaGetErrorString(status));
}

}  // namespace

DeviceMemoryHandle export_device_memory(std::byte* memory) {
  cudaIpcMemHandle_t handle{};
  check(cudaIpcGetMemHandle(&handle, memory), "cudaIpcGetMemHandle");
  DeviceMemoryHandle bytes{};
  static_assert(sizeof(handle) == sizeof(bytes));
  std::memcpy(bytes.data(), &handle, sizeof(handle));
  return bytes;
}

std::shared_ptr<std::byte> import_device_memory(const DeviceMemoryHandle& handle,
                                                std::function<void()> let_go) {
  cudaIpcMemHandle_t given{};
  std::memcpy(&given, handle.data(), sizeof(given));
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  void* memory = nullptr;
  check(cudaIpcOpenMemHandle(&memory, given, cudaIpcMemLazyEnablePeerAccess),
        "cudaIpcOpenMemHandle");
  return {static_cast<std::byte*>(memory), [device, let_go = std::move(let_go)](std::byte* p) {
            if (cudaSetDevice(device) == cudaSuccess) (void)cudaIpcCloseMemHandle(p);
            let_go();
          }};
}

}  // namespace sluice
