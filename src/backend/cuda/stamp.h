// stamp.h - the device's own clock, read at a point of a stream.
#pragma once

#include <cstdint>

namespace sluice::cuda {

/// Writes the nanoseconds of the device's clock to *at when the stream gets there. An event in a
/// graph would say the same, but holds up its stream for tens of microseconds; this costs about
/// two.
void launch_stamp(std::uint64_t* at, void* stream);

}  // namespace sluice::cuda
