#include "sluice/config.h"

#include <charconv>
#include <cstdlib>
#include <string_view>

#include "core/fail.h"

namespace sluice {

Environment read_environment() {
  Environment environment;
  if (const char* text = std::getenv("SLUICE_DISPATCH_DTYPE")) {
    try {
      environment.dispatch_dtype = parse_dispatch_dtype(text);
    } catch (const Error& error) {
      fail(ErrorCode::kInvalidArgument, "SLUICE_DISPATCH_DTYPE: {}", error.what());
    }
  }
  if (const char* text = std::getenv("SLUICE_TIMEOUT_MS")) {
    const std::string_view view = text;
    int ms = 0;
    const auto [end, error] = std::from_chars(view.data(), view.data() + view.size(), ms);
    check_argument(
        error == std::errc{} && end == view.data() + view.size() && ms >= 1 && ms <= 3'600'000,
        "SLUICE_TIMEOUT_MS='{}' is not a whole number of milliseconds in [1, 3600000]", view);
    environment.peer_timeout = std::chrono::milliseconds(ms);
  }
  return environment;
}

const char* version() noexcept {
  return SLUICE_VERSION;
}

}  // namespace sluice
