#include "backend/cpu/digits.h"

#include <array>
#include <cstring>
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

const std::array<Digits, 256>& table() {
  static const std::array<Digits, 256> digits = make_table();
  return digits;
}

/// Where the digits of DigitLayout::kBytes go.
struct BytePlaces {
  static constexpr bool kAlwaysLow = false;
  static int step(int line, int i) { return line * 2 + i % 2; }
  void put_main(int line, int i, const Digits& d) const {
    std::uint8_t* at = main + line * 16 + i % 2 * 8 + i / 2;
    at[0] = static_cast<std::uint8_t>(d.mid);
    at[4] = static_cast<std::uint8_t>(d.high);
  }
  void put_low(int line, int i, const Digits& d) const {
    low[line * 8 + i % 2 * 4 + i / 2] = static_cast<std::uint8_t>(d.low);
  }
  std::uint8_t *main, *low;
};
/// And of kWords.
struct WordPlaces {
  static constexpr bool kAlwaysLow = false;
  static int step(int line, int i) { return line * 4 + i % 2 * 2 + i / 2 % 2; }
  static int at(int line, int i) { return 2 * (2 * step(line, i) + i / 4); }
  void put_main(int line, int i, const Digits& d) const {
    const auto word = static_cast<std::int16_t>(d.mid + d.high * 256);
    std::memcpy(main + at(line, i), &word, 2);
  }
  void put_low(int line, int i, const Digits& d) const {
    const std::int16_t word = d.low;
    std::memcpy(low + at(line, i), &word, 2);
  }
  std::uint8_t *main, *low;
};

/// And of kTiles.
struct TilePlaces : BytePlaces {
  static constexpr bool kAlwaysLow = true;
  void put_main(int line, int i, const Digits& d) const {
    std::uint8_t* at = main + line / 8 * 128 + line % 8 * 8 + i % 2 * 4 + i / 2;
    at[0] = static_cast<std::uint8_t>(d.mid);
    at[64] = static_cast<std::uint8_t>(d.high);
  }
};

template <class Places>
DigitGroup split(const Places& to, const std::uint8_t* codes, float scale) {
  const std::array<Digits, 256>& digits = table();
  DigitGroup out;
  out.scale = scale * 0x1p-9f;
  bool has_nan = false;
  for (int line = 0; line < kGroup / 8; ++line) {
    std::int32_t sum = 0;
    for (int i = 0; i < 8; ++i) {
      const Digits& d = digits[codes[line * 8 + i]];
      to.put_main(line, i, d);
      sum += d.q;
      out.low |= std::uint64_t{d.low != 0} << Places::step(line, i);
      has_nan |= d.is_nan;
    }
    out.sum[line / 4] += sum;
  }
  if (has_nan) out.scale = std::numeric_limits<float>::quiet_NaN();
  if (out.low == 0 && !Places::kAlwaysLow) return out;
  for (int k = 0; k < kGroup; ++k) to.put_low(k / 8, k % 8, digits[codes[k]]);
  return out;
}

}  // namespace

DigitGroup split_digits(DigitLayout layout, const std::uint8_t* codes, float scale,
                        std::uint8_t* main, std::uint8_t* low) {
  switch (layout) {
    case DigitLayout::kBytes:
      return split(BytePlaces{main, low}, codes, scale);
    case DigitLayout::kWords:
      return split(WordPlaces{main, low}, codes, scale);
    case DigitLayout::kTiles:
      break;
  }
  return split(TilePlaces{{main, low}}, codes, scale);
}

}  // namespace sluice::cpu
