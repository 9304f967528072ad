// expert_fixture.h - one rank's expert stage on small random weights, and its definition to the
// bit.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "backend/ops.h"
#include "bench/random_experts.h"
#include "core/unwatched.h"
#include "quant/code_table.h"
#include "sluice/quant.h"

namespace sluice::testing {

struct StageCase {
  ModelGeometry geometry{
      .name = "test", .num_experts = 1, .num_topk = 1, .hidden = 128, .intermediate = 128};
  DType scale_dtype = DType::kFloat32;
  std::vector<std::int32_t> rows = {1};  ///< [num_experts]
  std::int64_t max_m = 0;                ///< Rows reserved per expert; 0 = contiguous.
  float s1 = 0, s2 = 0;                  ///< Static scales of GEMM1's and GEMM2's input; 0 = group.
  std::uint64_t seed = 1;
};

/// Buffers of one call. Bytes of rows that belong to no expert hold kSentinel.
struct StageBuffers {
  static constexpr std::uint8_t kSentinel = 0xa5;

  explicit StageBuffers(const StageCase& c)
      : hidden(c.geometry.hidden), inner(c.geometry.intermediate), max_m(c.max_m) {
    num_rows = c.rows;
    std::int64_t next = 0;
    for (std::size_t e = 0; e < c.rows.size(); ++e) {
      row_begin.push_back(c.max_m > 0 ? static_cast<std::int64_t>(e) * c.max_m : next);
      next += c.rows[e];
    }
    max_rows = c.max_m > 0 ? static_cast<std::int64_t>(c.rows.size()) * c.max_m : next;
    const auto n = static_cast<std::size_t>(max_rows);
    const auto h = static_cast<std::size_t>(hidden), i = static_cast<std::size_t>(inner);
    codes.assign(n * h, kSentinel), scale.assign(n * h / 128, 0.0f);
    h_codes.assign(n * i, kSentinel), h_scale.assign(n * i / 128, -1.0f);
    out.assign(n * h, 0xa5a5);
    std::vector<std::uint8_t> row_codes(h);
    std::vector<float> row_scale(h / 128);
    for (std::size_t e = 0; e < c.rows.size(); ++e) {
      for (std::int64_t r = 0; r < c.rows[e]; ++r) {
        const std::int64_t row = row_begin[e] + r;
        random_rows(c.seed * 1000003 + e * 1009 + static_cast<std::uint64_t>(r), 1, hidden,
                    &codes[static_cast<std::size_t>(row * hidden)],
                    &scale[static_cast<std::size_t>(row * hidden / 128)]);
      }
    }
    s1 = c.s1, s2 = c.s2;
  }

  [[nodiscard]] RowRanges rows() const {
    return {.num_experts = static_cast<int>(num_rows.size()),
            .begin = max_m > 0 ? nullptr : row_begin.data(),
            .count = num_rows.data(),
            .max_rows = max_rows,
            .max_rows_per_expert = max_m > 0 ? max_m : max_rows,
            .expected_m = 1};
  }
  [[nodiscard]] Fp8Rows in() {
    return {codes.data(), s1 != 0 ? nullptr : scale.data(), s1, hidden};
  }
  /// The same codes in the rows of `out`, each at the beginning of its row of out.
  [[nodiscard]] Fp8Rows in_out() {
    Fp8Rows rows = in();
    rows.codes = reinterpret_cast<std::uint8_t*>(out.data());
    rows.stride = 2 * hidden;
    return rows;
  }
  [[nodiscard]] Fp8Rows h() {
    return {h_codes.data(), s2 != 0 ? nullptr : h_scale.data(), s2, inner};
  }

  std::int64_t hidden, inner, max_m, max_rows = 0;
  std::vector<std::int64_t> row_begin;
  std::vector<std::int32_t> num_rows;
  std::vector<std::uint8_t> codes, h_codes;
  std::vector<float> scale, h_scale;
  std::vector<std::uint16_t> out;
  float s1 = 0, s2 = 0;
};

inline double weight_scale(const QuantMatrix& m, std::int64_t n, std::int64_t group) {
  return scale_value(m.scales, n * (m.k() / m.group_size) + group);
}

inline const CodeTable& table_of(WeightFormat format) {
  static const CodeTable int4(WeightFormat::kInt4), mxfp4(WeightFormat::kMxfp4);
  return format == WeightFormat::kInt4 ? int4 : mxfp4;
}
inline const std::array<float, 256>& e4m3_table() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> values{};
    for (int b = 0; b < 256; ++b) {
      values[static_cast<std::size_t>(b)] = e4m3_to_float(static_cast<std::uint8_t>(b));
    }
    return values;
  }();
  return table;
}

struct GroupDot {
  double sum = 0, magnitude = 0;
};
SLUICE_UNWATCHED inline GroupDot dot_of_group(const float (*code_values)[2],
                                              const std::uint8_t* weights, const float* e4m3_values,
                                              const std::uint8_t* codes, int size) {
  GroupDot dot;
  for (int k = 0; k < size; ++k) {
    const double product = static_cast<double>(code_values[weights[k / 2]][k % 2]) *
                           static_cast<double>(e4m3_values[codes[k]]);
    dot.sum += product, dot.magnitude += std::fabs(product);
  }
  return dot;
}

/// One element of codes * w^T: exact in float64, its sum of magnitudes, and the bits that the CPU
/// backend promises: exact group sums, then float32 additions in order of group.
struct DotProduct {
  double exact = 0, magnitude = 0;
  float promised = 0;
};

inline DotProduct dot(const QuantMatrix& m, std::int64_t n, const std::uint8_t* codes,
                      const float* scale, float static_scale) {
  const std::uint8_t* weights = m.codes.as<std::uint8_t>() + n * m.k() / 2;
  DotProduct out;
  for (std::int64_t g = 0; g < m.k() / m.group_size; ++g) {
    const std::int64_t first = g * m.group_size;
    const float as = scale != nullptr ? scale[first / 128] : static_scale;
    const auto ws = static_cast<float>(weight_scale(m, n, g));
    const GroupDot group = dot_of_group(table_of(m.format).value, weights + first / 2,
                                        e4m3_table().data(), codes + first, m.group_size);
    out.exact += group.sum * ws * as;
    out.magnitude += group.magnitude * ws * as;
    // In units of 2^-9 the sum is an integer below 2^31. A NaN anywhere spoils the group.
    const float term = static_cast<float>(group.sum * 512) * (ws * (as * 0x1p-9f));
    out.promised = out.promised + term;
  }
  return out;
}

}  // namespace sluice::testing
