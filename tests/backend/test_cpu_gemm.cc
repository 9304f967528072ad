// The CPU's GEMM kernels by themselves: every layout of digits, on every instruction set of this
// machine, gives the bits of exact integers.
#include <gtest/gtest.h>
#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "backend/cpu/cpu_features.h"
#include "backend/cpu/gemm_tile.h"
#include "sluice/quant.h"

namespace sluice::testing {
namespace {

using cpu::CpuFeatures;
using cpu::DigitLayout;
using cpu::TileUnit;

constexpr DigitLayout kLayouts[] = {DigitLayout::kBytes, DigitLayout::kWords, DigitLayout::kTiles};

/// Which activations a case has.
enum class Codes { kAny, kOnlyLarge, kOnlySmall, kMixed, kLargeAndSmall, kLargeAndFewSmall };

/// A matrix of random weights, rows of random codes, and what their product has to be.
struct GemmCase {
  WeightFormat format = WeightFormat::kInt4;
  int group_size = 128;
  int rows = 1;
  Codes kind = Codes::kMixed;
  std::int64_t k = 384, n = 64;
};

class Gemm {
 public:
  explicit Gemm(const GemmCase& c) : c_(c), random_(static_cast<unsigned>(c.rows)) {
    codes_.resize(static_cast<std::size_t>(c.n * c.k / 2));
    for (std::uint8_t& code : codes_) code = static_cast<std::uint8_t>(random_());
    const auto num_scales = static_cast<std::size_t>(c.n * c.k / c.group_size);
    for (std::size_t i = 0; i < num_scales; ++i) {
      scales_.push_back(0.001f * static_cast<float>(1 + random_() % 1000));
    }
    x_.resize(static_cast<std::size_t>(c.rows * c.k));
    for (std::uint8_t& code : x_) code = random_code();
    for (std::size_t i = 0; i < x_.size() / 128; ++i) {
      x_scales_.push_back(0.01f * static_cast<float>(1 + random_() % 100));
    }
    expected_.resize(static_cast<std::size_t>(c.n * c.rows));
    for (std::size_t i = 0; i < expected_.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i) / 16;
      expected_[i] = expected(static_cast<int>(at % c.rows),
                              at / c.rows * 16 + static_cast<std::int64_t>(i) % 16);
    }
  }

  /// [n / 16][rows][16]
  [[nodiscard]] std::vector<float> run(DigitLayout layout) const {
    const cpu::PreparedMatrix m{.codes = codes_.data(),
                                .scales = scales_.data(),
                                .format = c_.format,
                                .scale_dtype = DType::kFloat32,
                                .group_size = c_.group_size,
                                .n = c_.n,
                                .k = c_.k};
    const std::size_t groups = x_.size() / cpu::kGroup;
    // Digits that are not to be read are not zero.
    const auto padded = static_cast<std::size_t>(cpu::RowTiles(c_.rows).padded() * c_.k / 128);
    std::vector<std::uint8_t> digits(padded * cpu::kMainDigitBytes, 0x5a), low(digits);
    std::vector<cpu::DigitGroup> infos(groups);
    std::vector<cpu::TileLows> lows(groups);
    const cpu::DigitRows rows{.layout = layout,
                              .digits = digits.data(),
                              .low = low.data(),
                              .groups = infos.data(),
                              .lows = lows.data(),
                              .rows = c_.rows};
    for (int r = 0; r < c_.rows; ++r) {
      for (std::int64_t g = 0; g < c_.k / cpu::kGroup; ++g) {
        rows.set(g, r, &x_[static_cast<std::size_t>(r * c_.k + g * cpu::kGroup)], x_scale(r, g));
      }
    }
    for (std::int64_t g = 0; g < c_.k / cpu::kGroup; ++g) rows.complete(g);
    const auto acc_rows = static_cast<std::size_t>(rows.acc_rows());
    const auto blocks = static_cast<std::size_t>(c_.n / cpu::kBlockN);
    std::vector<float> acc(blocks * acc_rows * cpu::kBlockN, -1.0f), out;
    cpu::gemm_tile(
        {.weights = &m, .num_blocks = static_cast<int>(blocks), .x = rows, .acc = acc.data()});
    for (std::size_t b = 0; b < blocks; ++b) {
      const auto first = acc.begin() + static_cast<std::ptrdiff_t>(b * acc_rows * cpu::kBlockN);
      out.insert(out.end(), first, first + std::ptrdiff_t{c_.rows} * cpu::kBlockN);
    }
    return out;
  }

  void check(DigitLayout layout) const {
    const std::vector<float> acc = run(layout);
    for (std::size_t i = 0; i < acc.size(); ++i) {
      const float y = acc[i], z = expected_[i];
      if (std::isnan(y) && std::isnan(z)) continue;
      const std::size_t block = i / 16 / static_cast<std::size_t>(c_.rows);
      ASSERT_EQ(std::bit_cast<std::uint32_t>(y), std::bit_cast<std::uint32_t>(z))
          << "row " << i / 16 % static_cast<std::size_t>(c_.rows) << " of " << c_.rows
          << ", channel " << block * 16 + i % 16 << ": " << y << ", not " << z << "; layout "
          << static_cast<int>(layout) << ", groups of " << c_.group_size;
    }
  }

 private:
  [[nodiscard]] float expected(int row, std::int64_t channel) const {
    float acc = 0;
    for (std::int64_t first = 0; first < c_.k; first += c_.group_size) {
      std::int64_t sum = 0;
      bool is_nan = false;
      for (std::int64_t k = first / 128 * 128; k < first / 128 * 128 + 128; ++k) {
        const float a = e4m3_to_float(x_[static_cast<std::size_t>(row * c_.k + k)]);
        is_nan |= std::isnan(a);
        if (k < first || k >= first + c_.group_size || std::isnan(a)) continue;
        sum += weight(channel, k) * static_cast<std::int64_t>(a * 512);
      }
      const std::int64_t at = (channel / 16 * (c_.k / c_.group_size) + first / c_.group_size) * 16;
      const float scale = is_nan ? std::nanf("") : x_scale(row, first / 128) * 0x1p-9f;
      const float factor = scales_[static_cast<std::size_t>(at + channel % 16)] * scale;
      acc = acc + static_cast<float>(sum) * factor;
    }
    return acc;
  }

  std::uint8_t random_code() {
    const auto sign = static_cast<std::uint8_t>(random_() & 0x80);
    switch (c_.kind) {
      case Codes::kAny:
        return static_cast<std::uint8_t>(random_());
      case Codes::kOnlyLarge:
        return sign | 0x7e;
      case Codes::kOnlySmall:
        return static_cast<std::uint8_t>(sign | random_() % 32);
      case Codes::kLargeAndSmall:  // Sums beyond float32's 24 bits whose last bits are not zero.
        return static_cast<std::uint8_t>(sign & (random_() % 8 == 0 ? 0x80 : 0)) |
               static_cast<std::uint8_t>(random_() % 16 == 0 ? random_() % 32 : 0x7e);
      case Codes::kLargeAndFewSmall:  // About one row of two has a low digit.
        return static_cast<std::uint8_t>(
            sign | (random_() % 128 == 0 ? random_() % 32 : 0x68 + random_() % 16));
      case Codes::kMixed:
        break;
    }
    // Mostly without a low digit.
    const unsigned draw = random_() % 64;
    return static_cast<std::uint8_t>(sign | (draw == 0 ? random_() % 32 : 0x28 + draw));
  }
  [[nodiscard]] float x_scale(int row, std::int64_t group) const {
    return x_scales_[static_cast<std::size_t>(row * (c_.k / 128) + group)];
  }
  /// int4, or twice the e2m1 value (whose scale counts half: ours are not e8m0).
  [[nodiscard]] std::int64_t weight(std::int64_t n, std::int64_t k) const {
    const std::int64_t line = n / 16 * (c_.k / 8) + k / 8;
    const std::uint8_t byte = codes_[static_cast<std::size_t>(line * 64 + n % 16 * 4 + k % 8 / 2)];
    const int nibble = k % 2 == 0 ? byte & 0xf : byte >> 4;
    if (c_.format == WeightFormat::kInt4) return nibble - 8;
    constexpr int kTwice[] = {0, 1, 2, 3, 4, 6, 8, 12};
    return nibble < 8 ? kTwice[nibble] : -kTwice[nibble - 8];
  }

  GemmCase c_;
  std::mt19937 random_;
  std::vector<std::uint8_t> codes_, x_;
  std::vector<float> scales_, x_scales_, expected_;
};

/// This machine's features, and each of them taken away; tiles in memory in any case.
std::vector<CpuFeatures> subsets_of_features() {
  const CpuFeatures all = cpu::cpu_features();
  std::vector<CpuFeatures> out;
  for (const bool vnni : {true, false}) {
    if (vnni && !all.vnni) continue;
    if (all.tiles == TileUnit::kAmx)
      out.push_back({.vnni = vnni, .bf16 = true, .tiles = all.tiles});
    for (const bool bf16 : {true, false}) {
      if (bf16 && !all.bf16) continue;
      out.push_back({.vnni = vnni, .bf16 = bf16, .tiles = TileUnit::kScalar});
    }
  }
  return out;
}

/// Each case with every layout of digits, on each instruction set of this machine, with and without
/// what it has beyond them.
void check_on_every_target(const std::vector<Gemm>& cases) {
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (target == HWY_SSSE3) continue;  // The kernels are not compiled for it.
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    SCOPED_TRACE(hwy::TargetName(target));
    for (const CpuFeatures& features : subsets_of_features()) {
      cpu::set_cpu_features_for_test(features);
      SCOPED_TRACE(cpu::instruction_set());
      for (const Gemm& gemm : cases) {
        for (const DigitLayout layout : kLayouts) {
          if (target == HWY_SCALAR && layout != DigitLayout::kBytes) continue;  // Has bytes only.
          gemm.check(layout);
        }
      }
      cpu::set_cpu_features_for_test(std::nullopt);
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(CpuGemm, EveryLayoutOnEveryInstructionSet) {
  std::vector<Gemm> cases;
  for (const int rows : {1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 64}) {
    cases.emplace_back(GemmCase{.rows = rows});
    cases.emplace_back(GemmCase{.group_size = 32, .rows = rows});
    cases.emplace_back(GemmCase{.format = WeightFormat::kMxfp4, .group_size = 32, .rows = rows});
  }
  check_on_every_target(cases);
}

TEST(CpuGemm, AnyActivations) {
  std::vector<Gemm> cases;
  for (const Codes kind : {Codes::kAny, Codes::kOnlyLarge, Codes::kOnlySmall, Codes::kLargeAndSmall,
                           Codes::kLargeAndFewSmall}) {
    for (const int group_size : {128, 32}) {
      for (const WeightFormat format : {WeightFormat::kInt4, WeightFormat::kMxfp4}) {
        for (const int rows : {6, 17, 32, 64}) {
          cases.emplace_back(GemmCase{
              .format = format, .group_size = group_size, .rows = rows, .kind = kind, .n = 48});
        }
      }
    }
  }
  check_on_every_target(cases);
}

/// Of all 256 codes, in every place of a group.
TEST(CpuGemm, DigitsAreTheValue) {
  for (int code = 0; code < 256; ++code) {
    const float value = e4m3_to_float(static_cast<std::uint8_t>(code));
    if (std::isnan(value)) continue;
    const auto q = static_cast<std::int32_t>(value * 512);
    for (int k = 0; k < 128; ++k) {
      std::uint8_t codes[128] = {}, main[cpu::kMainDigitBytes], low[cpu::kLowDigitBytes];
      codes[k] = static_cast<std::uint8_t>(code);
      for (const DigitLayout layout : {DigitLayout::kBytes, DigitLayout::kWords}) {
        std::memset(low, 0, sizeof low);
        const cpu::DigitGroup g = cpu::split_digits(layout, codes, 3.0f, main, low);
        EXPECT_EQ(g.scale, 3.0f / 512);
        for (int i = 0; i < 4; ++i) EXPECT_EQ(g.sum[i], i == k / 32 ? q : 0);
        std::int32_t sum = 0;
        std::uint64_t mask = 0;
        const int i = k % 8, line = k / 8;
        if (layout != DigitLayout::kWords) {
          const int step = line * 2 + i % 2, half = line * 16 + i % 2 * 8 + i / 2;
          const auto digit = [](std::uint8_t byte) { return static_cast<std::int8_t>(byte); };
          sum = digit(low[step * 4 + i / 2]) + digit(main[half]) * 8 + digit(main[half + 4]) * 2048;
          if (low[step * 4 + i / 2] != 0) mask = std::uint64_t{1} << step;
        } else {
          const int step = line * 4 + i % 2 * 2 + i / 2 % 2;
          std::int16_t word, least;
          std::memcpy(&word, main + 4 * step + i / 4 * 2, 2);
          std::memcpy(&least, low + 4 * step + i / 4 * 2, 2);
          sum = least + word * 8;
          if (least != 0) mask = std::uint64_t{1} << step;
        }
        ASSERT_EQ(sum, q) << "code " << code << " k " << k;
        ASSERT_EQ(g.low, mask) << "code " << code << " k " << k;
      }
    }
  }
}

/// Digits of tiles: of each value, beside as many of the largest values as make each cut. What
/// float32 is to hold are the main digits, multiples of 2^cut whose sum is not above `magnitude`.
TEST(CpuGemm, DigitsForTilesAreTheValue) {
  constexpr std::int64_t kStride = 100;
  std::set<int> cuts;
  for (const int num_large : {0, 9, 12, 30, 127}) {
    for (int code = 0; code < 256; ++code) {
      const float value = e4m3_to_float(static_cast<std::uint8_t>(code));
      if (std::isnan(value)) continue;
      for (const int place : {0, 1, 2, 3, 4, 5, 6, 7, 45, 127}) {
        std::uint8_t codes[128] = {}, main[4 * kStride], low[cpu::kLowDigitBytes] = {};
        for (int i = 1; i <= num_large; ++i) codes[(place + i) % 128] = 0xfe;
        codes[place] = static_cast<std::uint8_t>(code);
        const cpu::DigitGroup g = cpu::split_digits_for_tiles(codes, 3.0f, main, kStride, low);
        EXPECT_EQ(g.scale, 3.0f / 512);
        double sum = 0;
        std::uint64_t mask = 0;
        float main_of_place = 0;
        for (int k = 0; k < 128; ++k) {
          const int at = k / 8 * 8 + k % 2 * 4 + k / 2 % 2 * 2 + k / 4 % 2;
          std::uint16_t bits = 0;
          std::memcpy(&bits, main + at / 32 * kStride + at % 32 * 2, 2);
          const float digit = bf16_to_float(bits);
          std::uint16_t least_bits = 0;
          std::memcpy(&least_bits, low + at * 2, 2);
          const float least = bf16_to_float(least_bits);
          ASSERT_EQ(digit + least, e4m3_to_float(codes[k]) * 512)
              << "code " << code << " at " << place << ", " << num_large << " large, k " << k;
          if (least != 0) mask |= std::uint64_t{1} << at / 2;
          if (k == place) main_of_place = digit;
          sum += std::fabs(digit);
        }
        ASSERT_EQ(g.low, mask);
        double all = 0, part[4] = {};
        for (int k = 0; k < 128; ++k) part[k / 32] += std::fabs(e4m3_to_float(codes[k])) * 512 + 4;
        for (const double p : part) all += p;
        double most = all * 8;
        for (const double p : part) most = std::max(most, p * 12);
        int cut = 0;
        while (cut < 3 && most > std::ldexp(1.0, 24 + cut)) ++cut;
        cuts.insert(cut);
        const double unit = std::ldexp(1.0, cut);
        ASSERT_EQ(std::fmod(main_of_place, unit), 0) << "code " << code << ", cut " << cut;
        ASSERT_LE(sum, g.magnitude * unit);
        ASSERT_LE(g.magnitude * unit, all + unit);
        for (const double p : part) ASSERT_LE(p * 12, std::ldexp(1.0, 24 + cut));
      }
    }
  }
  EXPECT_EQ(cuts.size(), 4u);
}

}  // namespace
}  // namespace sluice::testing
