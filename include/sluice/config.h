// config.h - the process environment, read in one place.
#pragma once

#include <chrono>

#include "sluice/recipe.h"

namespace sluice {

/// What the environment says. Everything here can also be set by the API, which wins.
struct Environment {
  DispatchDtype dispatch_dtype = DispatchDtype::kAuto;  ///< SLUICE_DISPATCH_DTYPE
  std::chrono::milliseconds peer_timeout{10'000};       ///< SLUICE_TIMEOUT_MS, 1 .. 3'600'000
};

/// Throws: kInvalidArgument naming the variable, its value and what it may be.
[[nodiscard]] Environment read_environment();

/// "0.1.0"
[[nodiscard]] const char* version() noexcept;

}  // namespace sluice
