// nibbles.h - tells signed 4-bit codes from codes with an offset of 8 by how often each occurs.
//
// Weights crowd around zero. Zero is nibble 0 in two's complement and nibble 8 with an offset, and
// whichever it is not stands for the extremes, which are rare. So the three nibbles around 0 (15,
// 0, 1) are compared with the three around 8 (7, 8, 9).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace sluice {

struct NibbleEvidence {
  enum class Verdict { kNone, kSigned, kOffset };
  /// One side must outnumber the other by this much to decide.
  static constexpr double kDecides = 2.0;

  std::array<std::uint64_t, 16> counts{};  ///< By nibble, as stored.
  Verdict verdict = Verdict::kNone;

  [[nodiscard]] std::uint64_t around_0() const noexcept;  ///< Nibbles 15, 0, 1.
  [[nodiscard]] std::uint64_t around_8() const noexcept;  ///< Nibbles 7, 8, 9.
  /// "signed: nibbles around 0 occur 43210 times, around 8 123 times"
  [[nodiscard]] std::string text() const;
  /// Adds another tensor's counts and decides again.
  void add(const NibbleEvidence& other) noexcept;
};

/// Looks at the first `max_bytes` of `codes`.
[[nodiscard]] NibbleEvidence nibble_evidence(std::span<const std::byte> codes,
                                             std::size_t max_bytes = std::size_t{1} << 18);

}  // namespace sluice
