#include "checkpoint/weight_stats.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include "sluice/weight_format.h"

namespace sluice {
namespace {

constexpr std::int64_t kMaxCodeBytes = std::int64_t{1} << 18;

std::vector<float> scales_of(const QuantMatrix& m) {
  std::vector<float> values(static_cast<std::size_t>(m.scales.shape.num_elements()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = scale_value(m.scales, static_cast<std::int64_t>(i));
  }
  return values;
}

/// Sum of the squares of two codes, by the byte that holds them. Exact: multiples of 1 / 4.
std::array<double, 256> make_byte_squares(WeightFormat format) {
  std::array<double, 256> squares{};
  for (std::size_t b = 0; b < squares.size(); ++b) {
    const auto byte = static_cast<std::uint8_t>(b);
    const double low = code_value(format, &byte, 0), high = code_value(format, &byte, 1);
    squares[b] = low * low + high * high;
  }
  return squares;
}

const std::array<double, 256>& byte_squares(WeightFormat format) {
  static const std::array tables = {make_byte_squares(WeightFormat::kInt4),
                                    make_byte_squares(WeightFormat::kMxfp4)};
  return tables[format == WeightFormat::kMxfp4 ? 1 : 0];
}

/// The bytes of codes that share scale `index`.
std::span<const std::uint8_t> group_codes(const QuantMatrix& m, std::size_t index) {
  const auto bytes = static_cast<std::size_t>(m.group_size) / 2;
  return {m.codes.as<std::uint8_t>() + index * bytes, bytes};
}

float largest_used(const QuantMatrix& m, const std::vector<float>& scales, float limit) {
  float largest = 0;
  for (std::size_t i = 0; i < scales.size(); ++i) {
    if (scales[i] <= largest) continue;
    if (scales[i] > limit && std::ranges::all_of(group_codes(m, i), [&](std::uint8_t b) {
          return byte_squares(m.format)[b] == 0;
        })) {
      continue;
    }
    largest = scales[i];
  }
  return largest;
}

void look_at_codes(const QuantMatrix& m, const std::vector<float>& scales, WeightStats& stats) {
  const auto groups_per_row = static_cast<std::size_t>(m.k() / m.group_size);
  const std::int64_t num_rows = std::clamp(kMaxCodeBytes / (m.k() / 2), std::int64_t{1}, m.n());
  const std::array<double, 256>& table = byte_squares(m.format);
  std::array<std::int64_t, 256> bytes{};
  double code_squares = 0, squares = 0;
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const auto row = static_cast<std::size_t>(i * m.n() / num_rows);
    for (std::size_t g = row * groups_per_row; g < (row + 1) * groups_per_row; ++g) {
      double sum = 0;
      for (const std::uint8_t byte : group_codes(m, g)) {
        ++bytes[byte];
        sum += table[byte];
      }
      const double scale = scales[g];
      code_squares += sum;
      squares += sum * scale * scale;
    }
  }
  for (std::size_t b = 0; b < bytes.size(); ++b) {
    stats.codes[(b & 15) ^ 8] += bytes[b];
    stats.codes[(b >> 4) ^ 8] += bytes[b];
  }
  stats.num_codes = num_rows * m.k();
  stats.code_rms = std::sqrt(code_squares / static_cast<double>(stats.num_codes));
  stats.rms = std::sqrt(squares / static_cast<double>(stats.num_codes));
  stats.size = stats.rms * std::sqrt(static_cast<double>(m.k()));
}

}  // namespace

WeightStats weight_stats(const QuantMatrix& matrix) {
  WeightStats stats;
  stats.format = matrix.format;
  std::vector<float> scales = scales_of(matrix);
  look_at_codes(matrix, scales, stats);
  std::vector<float> sorted = scales;
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  std::ranges::nth_element(sorted, middle);
  stats.median_scale = *middle;
  stats.largest_scale = std::ranges::max(scales);
  stats.largest_used_scale = largest_used(matrix, scales, stats.median_scale * kFarScale);
  return stats;
}

}  // namespace sluice
