// elementwise.h - host side of the kernels that change the format of rows.
//
// Plain C++, as w4a8.h: asynchronous on the stream, no allocation, no host synchronization,
// capturable. Row counts are read on the device; only valid rows are read or written.
#pragma once

#include <cstdint>

#include "backend/cuda/w4a8.h"
#include "backend/rows.h"

namespace sluice::cuda {

inline constexpr int kMaxRowExperts = 1024;

struct Quantize {
  const std::uint16_t* x = nullptr;  ///< [rows, width] bf16, 16 B aligned.
  RowRanges rows;                    ///< At most kMaxRowExperts experts.
  bool pow2 = false;                 ///< Group scales are powers of two.
  /// Group scales, one scale per row, or static. Codes 8 B aligned, stride a multiple of 8 B.
  Fp8Rows out;
};
void launch_quantize(const Quantize& args, int num_sms, StreamHandle stream);

struct Requantize {
  Fp8RowsView in;  ///< By group; codes 16 B aligned, stride a multiple of 16 B.
  RowRanges rows;  ///< At most kMaxRowExperts experts.
  Fp8Rows out;     ///< Static; aligned alike; may not overlap the rows of `in`.
};
void launch_requantize(const Requantize& args, int num_sms, StreamHandle stream);

}  // namespace sluice::cuda
