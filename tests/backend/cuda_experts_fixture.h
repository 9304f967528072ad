// cuda_experts_fixture.h - rows of experts on a CUDA device, as test_cuda_experts.cc runs and
// checks them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "sluice/lab/parallel.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/workload.h"
#include "sluice/quant.h"
#include "sluice/recipe.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {

/// Every boundary of a token tile, with empty experts first and last.
inline const std::vector<std::int32_t> kRows = {0,  1,  3,   7,   8,   9,    16,   17, 63,
                                                64, 65, 127, 128, 129, 1000, 1024, 0};
inline constexpr std::int64_t kCheckedRows = 3;  // Of each expert: first, middle, last.
inline constexpr std::uint16_t kNan = 0x7fc1;

/// The tokens of make_workload(), made by several threads: millions of values for each case.
inline Workload make_tokens(const WorkloadSpec& spec, std::int64_t count) {
  constexpr std::int64_t kParts = 64;
  std::vector<Workload> parts(kParts);
  for_each_in_parallel(parts.size(), [&](std::size_t part) {
    const auto i = static_cast<std::int64_t>(part);
    const std::int64_t first = count * i / kParts;
    parts[part] = make_workload(spec, first, count * (i + 1) / kParts - first);
  });
  Workload all;
  all.num_tokens = count, all.hidden = spec.hidden, all.num_topk = spec.num_topk;
  for (const Workload& part : parts) all.x.insert(all.x.end(), part.x.begin(), part.x.end());
  return all;
}

class CudaExpertsTest : public CudaBackendTest {
 protected:
  /// The rows of `num_rows`, quantized and on the device.
  struct Rows {
    Workload load;
    std::vector<std::int32_t> num_rows;
    std::vector<std::int64_t> row_begin;
    std::unique_ptr<DeviceBuffer> x, begin, count, codes, scale, h_codes, h_scale, y;
    RowRanges rows;
    Fp8Rows in, h;
  };

  /// Masked: every expert has as many rows reserved as the largest needs.
  Rows make_rows(const ModelGeometry& g, const std::vector<std::int32_t>& num_rows, InputKind kind,
                 bool masked) {
    Rows r;
    const std::int64_t total = lay_out(r, num_rows, masked);
    r.load = make_tokens(
        {.num_experts = g.num_experts, .num_topk = 1, .hidden = g.hidden, .input = kind, .seed = 3},
        total);
    return put_on_device(g, std::move(r), total, masked);
  }

  /// The rows of `dense` in masked layout, with NaN where no row is.
  Rows make_masked(const ModelGeometry& g, const Rows& dense) {
    Rows r;
    const std::int64_t total = lay_out(r, dense.num_rows, true);
    r.load.num_tokens = total, r.load.hidden = g.hidden, r.load.num_topk = 1;
    r.load.x.assign(static_cast<std::size_t>(total * g.hidden), kNan);
    for (std::size_t e = 0; e < r.num_rows.size(); ++e) {
      std::copy_n(&dense.load.x[static_cast<std::size_t>(dense.row_begin[e] * g.hidden)],
                  r.num_rows[e] * g.hidden,
                  &r.load.x[static_cast<std::size_t>(r.row_begin[e] * g.hidden)]);
    }
    return put_on_device(g, std::move(r), total, true);
  }

  /// Where each expert's rows begin; returns how many places there are.
  static std::int64_t lay_out(Rows& r, const std::vector<std::int32_t>& num_rows, bool masked) {
    r.num_rows = num_rows;
    const std::int64_t max_m = *std::ranges::max_element(num_rows);
    std::int64_t total = 0;
    for (const std::int32_t n : num_rows) {
      r.row_begin.push_back(total);
      total += masked ? max_m : n;
    }
    return total;
  }

  Rows put_on_device(const ModelGeometry& g, Rows r, std::int64_t total, bool masked) {
    const std::int64_t max_m = *std::ranges::max_element(r.num_rows);
    const auto count = static_cast<std::int64_t>(r.num_rows.size());
    const auto elements = static_cast<std::size_t>(total) * static_cast<std::size_t>(g.hidden);
    const auto inner = static_cast<std::size_t>(total) * static_cast<std::size_t>(g.intermediate);
    r.x = upload(r.load.x), r.begin = upload(r.row_begin), r.count = upload(r.num_rows);
    r.codes = backend_->allocate(elements), r.scale = backend_->allocate(elements / 32);
    r.h_codes = backend_->allocate(inner), r.h_scale = backend_->allocate(inner / 32);
    r.y = upload(std::vector<std::uint16_t>(elements, kNan));
    r.rows = {.num_experts = g.num_experts,
              .begin = masked ? nullptr : as<std::int64_t>(r.begin),
              .count = as<std::int32_t>(r.count),
              .max_rows = total,
              .max_rows_per_expert = masked ? max_m : total,
              .expected_m = static_cast<int>(total / count)};
    r.in = {.codes = as<std::uint8_t>(r.codes), .scale = as<float>(r.scale), .width = g.hidden};
    r.h = {.codes = as<std::uint8_t>(r.h_codes),
           .scale = as<float>(r.h_scale),
           .width = g.intermediate};
    ops_->quantize(as<std::uint16_t>(r.x), r.rows, false, r.in, stream_);
    return r;
  }

  std::vector<std::uint16_t> run(const PreparedExperts& experts, const Rows& r) {
    ops_->expert_stage(experts, r.in, r.rows, r.h, as<std::uint16_t>(r.y), stream_, nullptr);
    return download<std::uint16_t>(*r.y, r.load.x.size());
  }

  /// Gives the same rows static scales, the smallest at which nothing saturates.
  StaticScales make_static(const PreparedExperts& experts, Rows& r) {
    (void)run(experts, r);
    float amax = 0;
    for (const std::uint16_t v : r.load.x) amax = std::max(amax, std::fabs(bf16_to_float(v)));
    const auto groups = static_cast<std::size_t>(r.rows.max_rows * (r.h.width / kActivationGroup));
    const std::vector<float> h_scale = download<float>(*r.h_scale, groups);
    const StaticScales scales{amax / kE4m3Max, *std::ranges::max_element(h_scale)};
    r.in.scale = nullptr, r.in.static_scale = scales.s1;
    r.h.scale = nullptr, r.h.static_scale = scales.s2;
    ops_->quantize(as<std::uint16_t>(r.x), r.rows, false, r.in, stream_);
    return scales;
  }

  /// Gives the same rows one scale each, and h scales of its own.
  void make_token(Rows& r) {
    r.in.scale = as<float>(r.scale), r.in.static_scale = 0, r.in.scale_per_row = true;
    r.h.scale = as<float>(r.h_scale), r.h.static_scale = 0;
    ops_->quantize(as<std::uint16_t>(r.x), r.rows, false, r.in, stream_);
  }

  /// The two GEMMs by themselves and both kernels, decode's and prefill's, give the bits `y`.
  void expect_same_bits(const PreparedExperts& experts, Rows& r,
                        const std::vector<std::uint16_t>& y) {
    for (const ExpertHalf half : {ExpertHalf::kGateUp, ExpertHalf::kDown}) {
      ASSERT_TRUE(
          ops_->expert_half(half, experts, r.in, r.rows, r.h, as<std::uint16_t>(r.y), stream_));
    }
    EXPECT_TRUE(download<std::uint16_t>(*r.y, y.size()) == y) << "two GEMMs";
    for (const int expected_m : {1, 256}) {
      r.rows.expected_m = expected_m;
      EXPECT_TRUE(run(experts, r) == y) << expected_m << " rows expected";
    }
  }

  /// Element by element, a few rows of each expert; the rest only against NaN.
  static VerifyReport verify(const ExpertWeights& weights, const Rows& r,
                             const std::vector<std::uint16_t>& y,
                             const std::optional<StaticScales>& scales = {}) {
    return verify_recipe(parse_recipe(scales ? "bf16-static" : "direct"), weights, r, y, scales);
  }

  static VerifyReport verify_recipe(const Recipe& recipe, const ExpertWeights& weights,
                                    const Rows& r, const std::vector<std::uint16_t>& y,
                                    const std::optional<StaticScales>& scales) {
    const LayerRecipe resolved =
        resolve_recipe(recipe, Mode::kNormal, DispatchDtype::kAuto, scales, "test");
    const LayerReference reference(weights, resolved, 1.0f, error_model(Device::Kind::kCuda));
    const auto hidden = static_cast<std::size_t>(r.in.width);
    std::vector<VerifyReport> reports(r.num_rows.size());
    for_each_in_parallel(r.num_rows.size(), [&](std::size_t e) {
      const std::int64_t n = r.num_rows[e], checked = std::min(kCheckedRows, n);
      const auto expert = static_cast<std::int32_t>(e);
      const float weight = 1.0f;
      for (std::int64_t i = 0; i < checked; ++i) {
        const std::int64_t row =
            r.row_begin[e] + i * (n - 1) / std::max<std::int64_t>(1, checked - 1);
        const std::size_t at = static_cast<std::size_t>(row) * hidden;
        compare_row(reference.row(&r.load.x[at], &expert, &weight, 1), &y[at], row, reports[e]);
      }
    });
    VerifyReport all;
    for (const VerifyReport& one : reports) {
      all.num_rows += one.num_rows, all.num_wrong += one.num_wrong;
      if (one.worst_ratio >= all.worst_ratio) {
        all.worst_ratio = one.worst_ratio, all.worst_token = one.worst_token;
        all.worst_element = one.worst_element;
      }
    }
    return all;
  }
};

inline ModelGeometry geometry(int hidden, int intermediate, int group_size = 128) {
  return {.name = "shapes",
          .num_experts = static_cast<int>(kRows.size()),
          .num_topk = 1,
          .hidden = hidden,
          .intermediate = intermediate,
          .group_size = group_size};
}

}  // namespace sluice::testing
