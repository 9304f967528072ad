// ipc_device.h - device memory of one process at an address of another: CUDA IPC behind two
// functions, so that the transport is the same with and without CUDA.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <memory>

namespace sluice {

/// What a process gives away so that others can map its memory. Plain bytes.
using DeviceMemoryHandle = std::array<std::byte, 64>;

/// Handle of a device allocation, from its first byte. Throws: kCuda; kUnsupported without CUDA.
[[nodiscard]] DeviceMemoryHandle export_device_memory(std::byte* memory);

/// Maps another process's memory for the current device; unmapped when the pointer goes, after
/// which `let_go` is called. Throws: kCuda.
[[nodiscard]] std::shared_ptr<std::byte> import_device_memory(const DeviceMemoryHandle& handle,
                                                              std::function<void()> let_go);

}  // namespace sluice
