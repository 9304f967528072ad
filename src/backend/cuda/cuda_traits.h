// cuda_traits.h - the traits of the CUDA backend. Plain C++: also part of builds without CUDA.
#pragma once

#include "backend/traits.h"

namespace sluice::cuda {

[[nodiscard]] const BackendTraits& traits() noexcept;

}  // namespace sluice::cuda
