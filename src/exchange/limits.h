// limits.h - the most that an exchange takes, wherever it works: checked by its front, and what
// arrays of a fixed size below have room for.
#pragma once

namespace sluice {

inline constexpr int kMaxTopk = 32;     ///< Of ExchangeConfig::num_topk.
inline constexpr int kMaxInFlight = 8;  ///< Of ExchangeConfig::num_in_flight.

}  // namespace sluice
