// cpu_traits.h - the traits of the CPU backend.
#pragma once

#include "backend/traits.h"

namespace sluice::cpu {

[[nodiscard]] const BackendTraits& traits() noexcept;

}  // namespace sluice::cpu
