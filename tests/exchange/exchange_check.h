// exchange_check.h - compares what an exchange delivered with what it should have, on the device,
// so that millions of rows can be looked at element by element.
//
// Every token's wire bytes are in a table that the scalar definitions made. Expected rows are a
// list that the host made. Nothing here knows how the exchange works.
#pragma once

#include <cstdint>

namespace sluice::testing {

/// What row `row` of a batch must hold: the wire bytes of `token`, for local expert `expert`.
struct ExpectedRow {
  std::int32_t row, token, expert;
};

/// Differences found, and where the first was.
struct Mismatches {
  int rows, elements, first_row, first_element;
};

struct BatchCheck {
  const ExpectedRow* expected;  // [num_expected]
  int num_expected;
  const std::uint8_t* table;  // [tokens of all ranks, payload_bytes]
  const float* table_scale;   // [tokens, num_groups]
  const std::uint8_t* x;      // The batch.
  const float* x_scale;
  int payload_bytes, num_groups, hidden, first_expert;
  std::uint16_t* expert_y;  // Filled with expert_value() of each expected row.
  Mismatches* found;
};
void launch_check_batch(const BatchCheck& check, void* stream);

struct SumCheck {
  const std::uint8_t* table;
  const std::int32_t* topk_idx;  // [num_tokens, num_topk]
  const float* weights;
  const std::uint16_t* y;  // [num_tokens, hidden]
  int num_tokens, num_topk, hidden, payload_bytes, first_token;
  float factor;
  Mismatches* found;
  int num_parts = 1;         // The sum is of so many parts, at most kMaxCheckedParts...
  int experts_per_part = 1;  // ... each of so many experts.
};
inline constexpr int kMaxCheckedParts = 8;
void launch_check_sum(const SumCheck& check, void* stream);

/// Fills num_bytes with 0xff: e4m3 NaN, bf16 NaN, f32 NaN.
void launch_poison(void* memory, std::size_t num_bytes, void* stream);

}  // namespace sluice::testing
