#include "checkpoint/formats/nibbles.h"

#include <fmt/core.h>

#include <algorithm>

namespace sluice {
namespace {

/// A handful of nibbles proves nothing.
constexpr double kAtLeast = 64;

NibbleEvidence::Verdict decide(const NibbleEvidence& e) {
  const auto signed_side = static_cast<double>(e.around_0());
  const auto offset_side = static_cast<double>(e.around_8());
  if (signed_side > NibbleEvidence::kDecides * offset_side + kAtLeast) {
    return NibbleEvidence::Verdict::kSigned;
  }
  if (offset_side > NibbleEvidence::kDecides * signed_side + kAtLeast) {
    return NibbleEvidence::Verdict::kOffset;
  }
  return NibbleEvidence::Verdict::kNone;
}

}  // namespace

std::uint64_t NibbleEvidence::around_0() const noexcept {
  return counts[15] + counts[0] + counts[1];
}

std::uint64_t NibbleEvidence::around_8() const noexcept {
  return counts[7] + counts[8] + counts[9];
}

std::string NibbleEvidence::text() const {
  const char* const names[] = {"undecided", "signed", "offset 8"};
  return fmt::format("{}: nibbles around 0 occur {} times, around 8 {} times",
                     names[static_cast<std::size_t>(verdict)], around_0(), around_8());
}

void NibbleEvidence::add(const NibbleEvidence& other) noexcept {
  for (std::size_t i = 0; i < counts.size(); ++i) counts[i] += other.counts[i];
  verdict = decide(*this);
}

NibbleEvidence nibble_evidence(std::span<const std::byte> codes, std::size_t max_bytes) {
  std::array<std::uint64_t, 256> bytes{};
  for (const std::byte b : codes.first(std::min(codes.size(), max_bytes))) {
    ++bytes[static_cast<std::size_t>(b)];
  }
  NibbleEvidence result;
  for (std::size_t b = 0; b < bytes.size(); ++b) {
    result.counts[b & 0xf] += bytes[b];
    result.counts[b >> 4] += bytes[b];
  }
  result.verdict = decide(result);
  return result;
}

}  // namespace sluice
