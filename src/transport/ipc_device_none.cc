// Stands in for ipc_device_cuda.cc in a build without CUDA.
#include "core/fail.h"
#include "transport/ipc_device.h"

namespace sluice {

DeviceMemoryHandle export_device_memory(std::byte* /*memory*/) {
  fail(ErrorCode::kUnsupported, "device memory over ipc: this build has no CUDA");
}

std::shared_ptr<std::byte> import_device_memory(const DeviceMemoryHandle& /*handle*/,
                                                std::function<void()> /*let_go*/) {
  fail(ErrorCode::kUnsupported, "device memory over ipc: this build has no CUDA");
}

}  // namespace sluice
