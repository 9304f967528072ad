// wire_token.h - one token as it is sent: its bytes in the wire format, and where its rows go.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace sluice {

/// Borrows everything.
struct WireToken {
  std::int32_t idx = 0;                 ///< Of the token at its source.
  std::span<const std::byte> payload;   ///< Without scales.
  std::span<const std::byte> scales;    ///< Empty where the wire format has none.
  std::span<const std::int32_t> slots;  ///< [num_topk] of expert slots, -1: none.
};

}  // namespace sluice
