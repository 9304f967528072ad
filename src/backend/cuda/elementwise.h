// elementwise.h - host side of the kernels that change the format of rows.
//
// Plain C++, as w4a8.h: asynchronous on the stream, no allocation, no host synchronization,
// capturable. Row counts are read on the device; only valid rows are read or written.
#pragma once

#include <cstdint>

#include "backend/cuda/w4a8.h"

namespace sluice::cuda {

/// Expert e owns rows [row_begin[e], row_begin[e] + num_rows[e]). Device memory.
struct RowRanges {
  int num_experts = 0;                      ///< 1..kMaxRowExperts
  const std::int64_t* row_begin = nullptr;  ///< [num_experts]
  const std::int32_t* num_rows = nullptr;   ///< [num_experts]
  std::int64_t expected_rows = 0;           ///< Over all experts; sizes the grid, nothing else.
};
inline constexpr int kMaxRowExperts = 1024;

enum class QuantizeScale : std::uint8_t { kGroup, kPow2, kStatic };

struct Quantize {
  const std::uint16_t* x = nullptr;  ///< [rows, width] bf16, 16 B aligned.
  RowRanges rows;
  int width = 0;  ///< Multiple of 128.
  QuantizeScale kind = QuantizeScale::kGroup;
  std::uint8_t* codes = nullptr;  ///< [rows, width] e4m3, 8 B aligned.
  float* scale = nullptr;         ///< [rows, width / 128], unless kStatic.
  float static_scale = 0;         ///< kStatic.
};
void launch_quantize(const Quantize& args, int num_sms, StreamHandle stream);

struct Requantize {
  const std::uint8_t* in = nullptr;  ///< [rows, width] e4m3, 16 B aligned.
  const float* in_scale = nullptr;   ///< [rows, width / 128]
  RowRanges rows;
  int width = 0;
  float static_scale = 0;
  std::uint8_t* out = nullptr;  ///< [rows, width] e4m3, 16 B aligned; may not alias `in`.
};
void launch_requantize(const Requantize& args, int num_sms, StreamHandle stream);

}  // namespace sluice::cuda
