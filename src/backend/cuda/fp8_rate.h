// fp8_rate.h - how fast this device multiplies FP8: the ceiling of every prefill kernel.
#pragma once

namespace sluice::cuda {

/// Operations per second (two per multiply-add) of m64n128k32 e4m3 products on random codes, all
/// SMs at once and nothing else; the median of passes that last 0.1 s together, so that a power cap
/// shows. Throws: kCuda.
[[nodiscard]] double measure_fp8_rate(int num_sms);

}  // namespace sluice::cuda
