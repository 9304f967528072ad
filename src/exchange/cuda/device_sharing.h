// device_sharing.h - which ranks share a device, and whether a device reaches another's memory.
#pragma once

#include <chrono>
#include <cstddef>

#include "sluice/transport.h"

namespace sluice {

/// Lets `device` load and store where a peer's `window` lies. Throws: kUnsupported naming the two
/// devices if it cannot.
void enable_peer_access(int device, const std::byte* window);

/// Ranks on one device, this one included.
struct RanksOnDevice {
  int all = 1;
  int in_process = 1;  ///< Those of this process.
};

/// Counts the ranks whose device is this one's. Ranks that also share its process wait for each
/// other inside kernels, so no launch of theirs may wait for the device.   Ranks: collective.
/// Throws: kUnsupported where a launch may wait (kernels that are loaded lazily).
[[nodiscard]] RanksOnDevice count_ranks_on_device(Transport& transport, int device,
                                                  std::chrono::milliseconds timeout);

}  // namespace sluice
