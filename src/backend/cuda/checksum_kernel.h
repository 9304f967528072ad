// checksum_kernel.h - checksum_of() bytes in the device's memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/w4a8.h"

namespace sluice::cuda {

/// *sum += checksum_of(bytes): core/checksum.h. They are aligned to 16 and a multiple of 16 long.
/// Asynchronous on `stream`.
void launch_checksum(const void* bytes, std::size_t num_bytes, std::uint64_t first_word,
                     unsigned long long* sum, int num_sms, StreamHandle stream);

}  // namespace sluice::cuda
