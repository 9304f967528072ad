// local_kernels.h - host side of the kernels of the one-rank CUDA exchange.
//
// Plain C++: asynchronous on the stream, no allocation, no host synchronization, capturable.
#pragma once

#include <cstdint>

#include "sluice/recipe.h"

namespace sluice::cuda {

/// Most experts of one rank.
inline constexpr int kMaxLocalExperts = 1024;

/// What went wrong on the device. Host-mapped; `kind` is written last.
struct Fault {
  int kind;  // 0 none, 1 index out of range, 2 capacity
  int where, count;
  long long value;
};
enum FaultKind { kNoFault = 0, kBadIndex = 1, kOverCapacity = 2 };

struct RouteParams {
  const void* topk_idx;  // [num_tokens, num_topk] int32 or int64
  bool wide_idx;
  int num_slots, num_experts;
  int max_m;                // Masked layout, or 0: contiguous.
  std::int64_t* row_begin;  // [num_experts]
  std::int32_t* num_rows;   // [num_experts]
  std::int32_t* slot_row;   // [num_slots] row, or -1 for an empty slot
  Fault* fault;
};

/// Fills row_begin, num_rows and slot_row.
void launch_route(const RouteParams& params, void* stream);

struct ScatterParams {
  const std::uint16_t* x;        // [num_tokens, hidden] bf16
  const std::int32_t* slot_row;  // [num_tokens, num_topk]
  int num_topk, hidden;
  float static_inverse;  // 1 / s1
  std::uint8_t* rows;    // [max_rows, hidden] bf16 or e4m3
  float* row_scale;      // [max_rows, hidden / 128]
};

/// Brings each token to `wire` once and stores it in all of its rows. num_tokens may be 0.
void launch_scatter(const ScatterParams& params, WireFormat wire, std::int64_t num_tokens,
                    void* stream);

struct CombineParams {
  const std::uint16_t* expert_y;  // [max_rows, hidden] bf16
  const std::int32_t* slot_row;   // [num_tokens, num_topk]
  const float* weights;           // [num_tokens, num_topk]
  int num_topk, hidden;
  float factor;
  std::uint16_t* y;  // [num_tokens, hidden] bf16
};

void launch_combine(const CombineParams& params, std::int64_t num_tokens, void* stream);

}  // namespace sluice::cuda
