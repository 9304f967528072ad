// scale_limit.h - how large a scale of weights may be: for host and device code.
#pragma once

namespace sluice {

/// Scales are below this. They reach the kernels times 2^9, and sums of their products must stay
/// finite in float32.
inline constexpr float kScaleLimit = 0x1p118f;

}  // namespace sluice
