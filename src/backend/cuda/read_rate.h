// read_rate.h - how fast this device reads its memory: the ceiling of every decode kernel.
#pragma once

#include <cstddef>

namespace sluice::cuda {

/// Bytes per second of a plain streaming read of 4 GiB (or half the free memory if less), the
/// median of five passes. Allocates and frees its buffer. Throws: kOutOfMemory, kCuda.
[[nodiscard]] double measure_read_rate(int num_sms);

}  // namespace sluice::cuda
