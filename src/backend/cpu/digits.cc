#include "backend/cpu/digits.h"

#include <array>
#include <limits>

#include "sluice/quant.h"

namespace sluice::cpu {
namespace {

struct Digits {
  std::int32_t q = 0;
  std::int8_t low = 0, mid = 0, high = 0;
  bool is_nan = false;
};

std::array<Digits, 256> make_table() {
  std::array<Digits, 256> table{};
  for (int code = 0; code < 256; ++code) {
    Digits& d = table[static_cast<std::size_t>(code)];
    d.is_nan = (code & 0x7f) == 0x7f;
    if (d.is_nan) continue;
    d.q = static_cast<std::int32_t>(e4m3_to_float(static_cast<std::uint8_t>(code)) * 512.0f);
    d.low = static_cast<std::int8_t>(((d.q + 4) & 7) - 4);
    const std::int32_t rest = (d.q - d.low) / 8;
    d.mid = static_cast<std::int8_t>(((rest + 128) & 255) - 128);
    d.high = static_cast<std::int8_t>((rest - d.mid) / 256);
  }
  return table;
}

}  // namespace

DigitGroup split_digits(const std::uint8_t* codes, float scale, std::uint8_t* main,
                        std::uint8_t* low) {
  static const std::array<Digits, 256> table = make_table();
  DigitGroup out;
  out.scale = scale * 0x1p-9f;
  for (int line = 0; line < kGroup / 8; ++line) {
    std::int32_t sum = 0;
    for (int i = 0; i < 8; ++i) {
      const Digits& d = table[codes[line * 8 + i]];
      const int odd = i % 2;
      main[line * 16 + odd * 8 + i / 2] = static_cast<std::uint8_t>(d.mid);
      main[line * 16 + odd * 8 + 4 + i / 2] = static_cast<std::uint8_t>(d.high);
      low[line * 8 + odd * 4 + i / 2] = static_cast<std::uint8_t>(d.low);
      sum += d.q;
      out.has_low |= d.low;
      if (d.is_nan) out.scale = std::numeric_limits<float>::quiet_NaN();
    }
    out.sum[line / 4] += sum;
  }
  return out;
}

}  // namespace sluice::cpu
