#include "core/random_bytes.h"

#include <sys/random.h>

#include <cerrno>
#include <cstring>

#include "core/fail.h"

namespace sluice {

void draw_random(std::span<std::byte> bytes) {
  // Up to 256 bytes come whole and are not interrupted.
  if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    fail(ErrorCode::kInternal, "getrandom of {} bytes: {}", bytes.size(), std::strerror(errno));
  }
}

}  // namespace sluice
