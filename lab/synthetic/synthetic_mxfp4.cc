#include "synthetic/synthetic_mxfp4.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr std::size_t kGroup = 32;

/// The scale code of a group: floor(log2(amax)) - 2, e2m1's largest exponent, plus the bias.
int scale_code(const std::array<float, kGroup>& w) {
  float amax = 0;
  for (const float value : w) amax = std::max(amax, std::fabs(value));
  return amax == 0 ? 0 : std::clamp(std::ilogb(amax) - 2 + 127, 0, 254);
}

}  // namespace

Mxfp4Bytes mxfp4_bytes(const SyntheticMatrix& m) {
  Mxfp4Bytes out;
  const std::size_t count = static_cast<std::size_t>(m.n) * static_cast<std::size_t>(m.k);
  for (std::size_t begin = 0; begin < count; begin += kGroup) {
    std::array<float, kGroup> w{};
    for (std::size_t i = 0; i < kGroup; ++i) {
      const std::size_t at = begin + i;
      const int nibble = at % 2 == 0 ? m.codes[at / 2] % 16 : m.codes[at / 2] / 16;
      const int code = nibble < 8 ? nibble : nibble - 16;
      w[i] = static_cast<float>(code) * m.scales[at / static_cast<std::size_t>(m.group)];
    }
    const int scale = scale_code(w);
    out.scales.push_back(static_cast<std::byte>(scale));
    for (std::size_t i = 0; i < kGroup; i += 2) {
      const auto code = [&](std::size_t at) {
        return static_cast<unsigned>(e2m1_from_float(std::ldexp(w[at], 127 - scale)));
      };
      out.codes.push_back(static_cast<std::byte>(code(i) + 16 * code(i + 1)));
    }
  }
  return out;
}

std::vector<std::byte> in_turn(const std::vector<std::byte>& gate, const std::vector<std::byte>& up,
                               int num_rows) {
  const auto rows = static_cast<std::size_t>(num_rows);
  const std::size_t width = gate.size() / rows;
  std::vector<std::byte> out;
  for (std::size_t row = 0; row < rows; ++row) {
    for (const auto* matrix : {&gate, &up}) {
      for (std::size_t i = 0; i < width; ++i) out.push_back((*matrix)[row * width + i]);
    }
  }
  return out;
}

}  // namespace sluice
