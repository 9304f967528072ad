// arithmetic_rate.h - the arithmetic ceiling of this machine's cores.
#pragma once

namespace sluice {

/// float32 multiply-adds per second of `num_threads` threads, times two; best of five passes.
[[nodiscard]] double measure_fma_flops(int num_threads);

}  // namespace sluice
