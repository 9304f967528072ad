// rows.h - the rows that experts work on: which ones they are, and their e4m3 values.
//
// Plain values that a kernel may take as an argument: every operation of a backend (ops.h), every
// kernel launcher and the exchange's staging use these types. The arrays that they point at live in
// the memory of the backend that works on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/host_device.h"
#include "sluice/quant.h"
#include "sluice/recipe.h"

namespace sluice {

/// Which rows of a buffer belong to which local expert, in one of two layouts:
///
///   contiguous   expert e owns rows [begin[e], begin[e] + count[e])
///   masked       begin is null: expert e owns rows [e * max_rows_per_expert, .. + count[e])
///
/// Without `count` every expert has max_rows_per_expert rows; expert_stage() needs it.
struct RowRanges {
  int num_experts = 0;
  const std::int64_t* begin = nullptr;   ///< [num_experts], or null: masked.
  const std::int32_t* count = nullptr;   ///< [num_experts], or null: all rows.
  std::int64_t max_rows = 0;             ///< Rows of the buffers, for bounds.
  std::int64_t max_rows_per_expert = 0;  ///< Masked: max_m. Contiguous: max_rows.
  int expected_m = 0;                    ///< Tuning hint: mean rows per expert.

  /// For code that can read the arrays: for host memory.
  [[nodiscard]] constexpr std::int64_t first_row(int e) const noexcept {
    return begin != nullptr ? begin[e] : e * max_rows_per_expert;
  }
  [[nodiscard]] constexpr std::int64_t num_rows(int e) const noexcept {
    return count != nullptr ? count[e] : max_rows_per_expert;
  }
};

/// e4m3 rows to read. Exactly one of `scale` and `static_scale` is used.
struct Fp8RowsView {
  const std::uint8_t* codes = nullptr;  ///< [max_rows, width] e4m3, `stride` bytes apart.
  const float* scale = nullptr;         ///< [max_rows, num_scales()], dense; null: static.
  float static_scale = 0;               ///< Used if `scale` is null; finite, > 0.
  std::int64_t width = 0;               ///< hidden or intermediate. Multiple of 128.
  /// Bytes from one row of codes to the next, at least `width` and a multiple of 16. 0: `width`.
  std::int64_t stride = 0;
  bool scale_per_row = false;  ///< `scale` has one for each row, not one for 128 channels of it.

  [[nodiscard]] SLUICE_HOST_DEVICE constexpr std::int64_t row_bytes() const noexcept {
    return stride != 0 ? stride : width;
  }
  [[nodiscard]] SLUICE_HOST_DEVICE constexpr const std::uint8_t* row(
      std::int64_t r) const noexcept {
    return codes + r * row_bytes();
  }
  /// Of a row, where `scale` is not null.
  [[nodiscard]] SLUICE_HOST_DEVICE constexpr std::int64_t num_scales() const noexcept {
    return scale_per_row ? 1 : width / kActivationGroup;
  }
  /// The scale of one group of 128 channels, in host memory.
  [[nodiscard]] constexpr float scale_of(std::int64_t row, std::int64_t group) const noexcept {
    if (scale == nullptr) return static_scale;
    return scale_per_row ? scale[row] : scale[row * num_scales() + group];
  }
};

/// e4m3 rows to write, with scales as Fp8RowsView has them.
struct Fp8Rows {
  std::uint8_t* codes = nullptr;
  float* scale = nullptr;
  float static_scale = 0;
  std::int64_t width = 0;
  std::int64_t stride = 0;
  bool scale_per_row = false;

  [[nodiscard]] SLUICE_HOST_DEVICE constexpr std::int64_t row_bytes() const noexcept {
    return stride != 0 ? stride : width;
  }
  [[nodiscard]] SLUICE_HOST_DEVICE constexpr std::uint8_t* row(std::int64_t r) const noexcept {
    return codes + r * row_bytes();
  }
  [[nodiscard]] SLUICE_HOST_DEVICE constexpr std::int64_t num_scales() const noexcept {
    return scale_per_row ? 1 : width / kActivationGroup;
  }
  /// What may be written may be read; never the other way round.
  constexpr operator Fp8RowsView() const noexcept {  // NOLINT(google-explicit-constructor)
    return {.codes = codes,
            .scale = scale,
            .static_scale = static_scale,
            .width = width,
            .stride = stride,
            .scale_per_row = scale_per_row};
  }
};

/// Tokens, and the casts that make GEMM1's input of them, one after the other (recipe.h).
struct TokenRows {
  const std::uint16_t* x = nullptr;  ///< [num_tokens, width] bf16; null: `coded` has the tokens.
  Fp8RowsView coded = {};            ///< [num_tokens, width], in some wire format.
  /// Of bf16 tokens the first cast gives e4m3. A further one moves group scales to a static scale.
  /// Coded tokens have that one at most, as `second`; `first` is then kNone.
  Cast first = Cast::kNone, second = Cast::kNone;
};

/// The top-k entries of a call, and the rows that they get. An entry has a row if its expert is in
/// [first_expert, first_expert + num_experts); any other number is an expert that lives elsewhere,
/// or none. Rows follow each other without gaps, expert after expert, and those of one expert in
/// order of (token, k).
struct EntryRows {
  const void* topk_idx = nullptr;  ///< [num_tokens, num_topk] int64 if `wide_idx`, else int32.
  bool wide_idx = false;
  std::int64_t num_tokens = 0;  ///< num_tokens * num_topk < 2^31
  int num_topk = 0;
  int first_expert = 0, num_experts = 0;
  std::int32_t* row_of = nullptr;  ///< [num_tokens, num_topk] filled; -1: no row.
  std::int64_t* begin = nullptr;   ///< [num_experts] filled, as RowRanges::begin.
  std::int32_t* count = nullptr;   ///< [num_experts] filled, as RowRanges::count.
};

/// Where rows of GEMM2 go that leave for their tokens' ranks as they are made: every row to the
/// place of its top-k entry, in memory of the rank that will sum it.
struct HomeRows {
  /// [max_rows] of each row: home rank << 32 | entry, which is token * num_topk + k there. Read for
  /// valid rows alone.
  const std::uint64_t* origin = nullptr;
  /// [num_ranks] the rows [entries, width] bf16 of each rank, 16 B aligned; the array itself is
  /// memory of this backend.
  std::uint16_t* const* rows = nullptr;
};

/// The way home: which rows make up a token, and with which weights.
struct EntrySums {
  const std::uint16_t* rows = nullptr;   ///< [.., width] bf16
  const std::int32_t* row_of = nullptr;  ///< [num_tokens, num_topk]; -1: nothing to add.
  const float* weights = nullptr;        ///< [num_tokens, num_topk]
  std::int64_t num_tokens = 0;
  int num_topk = 0;
  std::int64_t width = 0;
  float factor = 1;
  std::uint16_t* y = nullptr;  ///< [num_tokens, width] bf16
};

static_assert(std::is_trivially_copyable_v<RowRanges> && std::is_trivially_copyable_v<Fp8Rows> &&
              std::is_trivially_copyable_v<Fp8RowsView> &&
              std::is_trivially_copyable_v<TokenRows> && std::is_trivially_copyable_v<EntryRows> &&
              std::is_trivially_copyable_v<EntrySums> && std::is_trivially_copyable_v<HomeRows>);

}  // namespace sluice
