#include "sluice/transport.h"

#include "core/fail.h"

namespace sluice {

std::vector<std::shared_ptr<std::byte>> Transport::share_device_memory(
    std::shared_ptr<std::byte> mine, std::size_t bytes, std::chrono::milliseconds timeout) {
  (void)mine, (void)timeout;
  fail(ErrorCode::kUnsupported, "transport {} cannot give {} bytes of device memory to other ranks",
       name(), bytes);
}

}  // namespace sluice
