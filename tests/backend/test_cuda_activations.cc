// Every activation function in the CUDA kernels' epilogue: codes of chosen sums against the scalar
// definition, the whole expert stage against float64 where limits bite, and what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "activation_fixture.h"
#include "sluice/error.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

constexpr std::int64_t kPairs = 1024;  // Channels of h: every pair of two of the 32 edge values.

/// One expert whose sums are chosen: for a row of code 256 and scale s, channel i has gate = s
/// gate[i] and up = s up[i], exactly but for one rounding. 256 * 4 * v / 1024 = v.
class ChosenSums {
 public:
  ChosenSums() {
    // Weight scales are finite and below 2^118, so no single sum can be NaN. A row of NaN is.
    std::vector<float> list = edges();
    std::ranges::replace_if(
        list, [](float v) { return std::isnan(v); }, 2.36e38f);
    weights.geometry.num_experts = weights.geometry.num_topk = 1;
    weights.geometry.hidden = 128, weights.geometry.intermediate = kPairs;
    gate.resize(kPairs), up.resize(kPairs);
    for (std::size_t i = 0; i < kPairs; ++i) gate[i] = list[i % 32], up[i] = list[i / 32];
    weights.experts = {{.gate = matrix(0, kPairs, 128, &gate),
                        .up = matrix(1, kPairs, 128, &up),
                        .down = matrix(2, 128, kPairs, nullptr)}};
  }
  ChosenSums(const ChosenSums&) = delete;
  ChosenSums& operator=(const ChosenSums&) = delete;

  ExpertWeights weights;
  std::vector<float> gate, up;

 private:
  /// [n, k]; of each row only the first weight is not 0, unless `values` is null: all are 0 then.
  QuantMatrix matrix(int index, std::int64_t n, std::int64_t k, std::vector<float>* values) {
    std::vector<std::uint8_t>& codes = codes_[index];
    std::vector<float>& scales = scales_[index];
    codes.assign(static_cast<std::size_t>(n * k / 2), 0);
    scales.assign(static_cast<std::size_t>(n * k / 128), 1.0f);
    for (std::size_t row = 0; values != nullptr && row < values->size(); ++row) {
      float& v = (*values)[row];
      scales[row] = std::fabs(v) / 1024;
      codes[row * static_cast<std::size_t>(k / 2)] = v < 0 ? 0xc : 0x4;  // -4 or 4
      v = std::copysign(scales[row] * 1024, v);  // What is left of a subnormal number.
    }
    return {.codes = {codes.data(), DType::kPackedInt4, {n, k / 2}},
            .scales = {scales.data(), DType::kFloat32, {n, k / 128}}};
  }

  std::vector<std::uint8_t> codes_[3];
  std::vector<float> scales_[3];
};

/// What row `row` multiplies the chosen sums by, as a code and a scale.
struct RowFactor {
  std::uint8_t code;
  float scale;
  /// A sum of products is never -0.
  [[nodiscard]] float of(float v) const { return e4m3_to_float(code) / 256 * (v * scale) + 0.0f; }
};
constexpr RowFactor kFactors[] = {{0x78, 1},         {0xf8, 1},        {0x78, 0x1p-9f},
                                  {0x78, 0x1p-100f}, {0xf8, 0x1p100f}, {0x7f, 1}};

class CudaActivationsTest : public CudaBackendTest {};

TEST_F(CudaActivationsTest, CodesAreThoseOfTheScalarDefinition) {
  ChosenSums sums;
  for (const char* const text : kActivations) {
    const ActivationFn fn = sums.weights.geometry.activation = parse_activation(text);
    for (const std::int32_t num_rows : {6, 33, 100}) {  // Both kernel configurations.
      for (const float s2 : {0.0f, 1.0f, 0.0078125f, 1e-6f}) {
        for (const bool x_is_static : {false, true}) {
          StageCase c;
          c.geometry = sums.weights.geometry;
          c.rows = {num_rows}, c.s1 = x_is_static ? 1 : 0, c.s2 = s2;
          StageBuffers b(c);
          b.codes.assign(b.codes.size(), 0);
          for (std::size_t row = 0; row < b.scale.size(); ++row) {
            b.codes[row * 128] = kFactors[row % 6].code;
            b.scale[row] = kFactors[row % 6].scale;
          }
          const StageResult r = run_stage(*backend_, sums.weights, b, num_rows);
          std::vector<float> gate(kPairs), up(kPairs);
          for (std::size_t row = 0; row < b.scale.size(); ++row) {
            RowFactor factor = kFactors[row % 6];
            if (x_is_static) factor.scale = 1;
            for (std::size_t i = 0; i < kPairs; ++i) {
              gate[i] = factor.of(sums.gate[i]), up[i] = factor.of(sums.up[i]);
            }
            for (std::size_t g = 0; g < kPairs / 128; ++g) {
              const float scale = s2 != 0 ? s2 : r.h_scale[row * (kPairs / 128) + g];
              expect_codes_of(fn, &gate[g * 128], &up[g * 128], s2,
                              &r.h_codes[row * kPairs + g * 128], scale,
                              std::string(text) + " row " + std::to_string(row) + " of " +
                                  std::to_string(num_rows));
            }
            if (HasFailure()) return;  // One is enough of a hundred thousand.
          }
        }
      }
    }
  }
}

TEST_F(CudaActivationsTest, TheStageKeepsTheReferencesBoundsWhereLimitsBite) {
  for (const char* const text : kActivations) {
    const ActivationFn fn = parse_activation(text);
    for (const int group_size : {128, 32}) {
      for (const bool is_static : {false, true}) {
        for (const std::int32_t num_rows : {1, 6, 12, 24, 60, 130}) {
          Bitten bitten;
          const VerifyReport report =
              verify_stage(*backend_, fn, fn, is_static, group_size, num_rows, bitten);
          EXPECT_TRUE(report.passed())
              << text << " groups of " << group_size << (is_static ? " static " : " ") << num_rows
              << " rows: " << report.num_wrong << " wrong, worst " << report.worst_actual << " for "
              << report.worst_expected << " +- " << report.worst_bound;
          if (fn.kind == ActivationKind::kSwiglu) continue;
          EXPECT_GT(bitten.gate, bitten.of / 20) << text;
          EXPECT_GT(bitten.up, bitten.of / 10) << text;
        }
      }
    }
  }
}

// A bound that let the neighbour pass would certify a kernel that forgets the parameters.
TEST_F(CudaActivationsTest, AnotherActivationIsBeyondTheBounds) {
  const auto num_wrong = [&](const char* text, const char* other) {
    Bitten bitten;
    return verify_stage(*backend_, parse_activation(text), parse_activation(other), false, 128, 6,
                        bitten)
        .num_wrong;
  };
  for (const char* const text : kActivations) {
    if (std::string(text) == "swiglu") continue;
    EXPECT_GT(num_wrong(text, "swiglu"), 128) << text;
    EXPECT_GT(num_wrong("swiglu", text), 128) << text;
  }
  EXPECT_GT(num_wrong("swiglu:limit=10", "swiglu:limit=9"), 128);
  EXPECT_GT(num_wrong("situ:beta=4,linear_beta=25", "situ:beta=4,linear_beta=10"), 128);
}

TEST_F(CudaActivationsTest, WhatTheKernelsCannotComputeIsRefusedBeforeAnythingIsPacked) {
  ChosenSums sums;
  const auto refused = [&](const ActivationFn& fn, ErrorCode code, const char* why) {
    sums.weights.geometry.activation = fn;
    try {
      (void)ops_->prepare(sums.weights);
      ADD_FAILURE() << "not refused";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code);
      EXPECT_THAT(error.what(), ::testing::HasSubstr(why));
    }
  };
  refused({static_cast<ActivationKind>(7)}, ErrorCode::kUnsupported, "activation 7");
  refused({.kind = ActivationKind::kSwigluLimit}, ErrorCode::kInvalidArgument, "limit = 0");
  refused({.kind = ActivationKind::kSitu, .beta = 1e-40f, .linear_beta = 1},
          ErrorCode::kUnsupported, "2^-126");
  refused({.kind = ActivationKind::kSitu, .beta = 1, .linear_beta = 3e38f}, ErrorCode::kUnsupported,
          "2^126");
}

}  // namespace
}  // namespace sluice::testing
