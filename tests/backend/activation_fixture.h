// activation_fixture.h - the activation functions under test, numbers where they end, and the whole
// expert stage of either backend on them.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "expert_fixture.h"
#include "sluice/activation.h"
#include "sluice/backend.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/workload.h"

namespace sluice::testing {

inline const char* const kActivations[] = {"swiglu", "swiglu:limit=10", "swiglu:limit=0.25",
                                           "swiglu-oai:alpha=1.702,limit=7",
                                           "situ:beta=4,linear_beta=25"};

/// Around the limits, subnormal, huge and NaN; 32 in all.
inline std::vector<float> edges() {
  std::vector<float> list = {0, 1e-45f, 1e-40f, 1.2e-38f, 1e-4f, 0.2499f, 0.25f, 1, 2.4f, 25, 90};
  for (const float limit : {7.0f, 10.0f}) {
    list.push_back(std::nextafter(limit, 0.0f)), list.push_back(limit);
  }
  const std::size_t count = list.size();
  for (std::size_t i = 0; i < count; ++i) list.push_back(-list[i]);
  list.push_back(std::numeric_limits<float>::quiet_NaN());
  list.push_back(3.4e38f);
  return list;
}

/// The code of `h`, or of a number a few ulp beside it: exp() and tanh() differ that much.
inline bool is_code_of(std::uint8_t code, float h, float inverse) {
  for (const float near : {h * (1 - 0x1p-19f), h, h * (1 + 0x1p-19f)}) {
    if (code == e4m3_from_float(near * inverse)) return true;
  }
  return false;
}

/// Codes and scale of 128 elements of h against the scalar definition. static_scale 0: by group.
inline void expect_codes_of(const ActivationFn& fn, const float* gate, const float* up,
                            float static_scale, const std::uint8_t* codes, float scale,
                            const std::string& where) {
  std::vector<float> h(128);
  for (std::size_t i = 0; i < 128; ++i) h[i] = activate(fn, gate[i], up[i]);
  std::vector<std::uint8_t> expected(128);
  const float group = quantize_group(h, expected);
  if (std::isinf(group) && static_scale == 0) {  // A product that float32 does not have.
    EXPECT_TRUE(std::isinf(scale)) << where;
    return;
  }
  EXPECT_NEAR(scale / (static_scale == 0 ? group : static_scale), 1, 0x1p-19) << where;
  for (std::size_t i = 0; i < 128; ++i) {
    EXPECT_EQ((codes[i] & 0x7f) == 0x7f, std::isnan(h[i])) << where << gate[i] << ' ' << up[i];
    if (std::isnan(h[i])) continue;
    EXPECT_TRUE(is_code_of(codes[i], h[i], 1.0f / scale) ||
                is_code_of(codes[i], h[i], kE4m3Max / (scale * kE4m3Max)))
        << where << " gate " << gate[i] << " up " << up[i] << ": code " << int{codes[i]} << " for "
        << h[i];
  }
}

/// What a stage leaves on its device.
struct StageResult {
  std::vector<std::uint8_t> h_codes;
  std::vector<float> h_scale;
  std::vector<std::uint16_t> y;
};

/// Runs the stage on the rows of `b`, whose codes and scales lie in host memory.
inline StageResult run_stage(Backend& backend, const ExpertWeights& weights, StageBuffers& b,
                             int expected_m) {
  const Stream stream = backend.stream();
  const auto upload = [&](const auto& host) {
    const std::size_t bytes = host.size() * sizeof(host[0]);
    auto buffer = backend.allocate(bytes);
    backend.copy_from_host(buffer->data(), host.data(), bytes, stream);
    return buffer;
  };
  const auto codes = upload(b.codes), scale = upload(b.scale), begin = upload(b.row_begin),
             count = upload(b.num_rows), h_codes = upload(b.h_codes), h_scale = upload(b.h_scale),
             y = upload(b.out);
  Fp8Rows in = b.in(), h = b.h();
  in.codes = reinterpret_cast<std::uint8_t*>(codes->data());
  h.codes = reinterpret_cast<std::uint8_t*>(h_codes->data());
  if (in.scale != nullptr) in.scale = reinterpret_cast<float*>(scale->data());
  if (h.scale != nullptr) h.scale = reinterpret_cast<float*>(h_scale->data());
  RowRanges rows = b.rows();
  rows.begin = reinterpret_cast<const std::int64_t*>(begin->data());
  rows.count = reinterpret_cast<const std::int32_t*>(count->data());
  rows.expected_m = expected_m;
  const auto experts = ops(backend).prepare(weights);
  ops(backend).expert_stage(*experts, in, rows, h, reinterpret_cast<std::uint16_t*>(y->data()),
                            stream, nullptr);
  StageResult out{b.h_codes, b.h_scale, b.out};
  backend.copy_to_host(out.h_codes.data(), h_codes->data(), out.h_codes.size(), stream);
  backend.copy_to_host(out.h_scale.data(), h_scale->data(), out.h_scale.size() * 4, stream);
  backend.copy_to_host(out.y.data(), y->data(), out.y.size() * 2, stream);
  return out;
}

/// How many elements of gate and up lie beyond the limit.
struct Bitten {
  std::int64_t gate = 0, up = 0, of = 0;
};

/// The stage on large rows, compared with the float64 reference. `other`: the function that the
/// reference has instead.
inline VerifyReport verify_stage(Backend& backend, const ActivationFn& fn,
                                 const ActivationFn& other, bool is_static, int group_size,
                                 std::int32_t num_rows, Bitten& bitten) {
  StageCase c;
  c.geometry.hidden = 256, c.geometry.intermediate = 384, c.geometry.group_size = group_size;
  c.geometry.activation = fn;
  c.rows = {num_rows};
  ExpertWeights weights = random_experts(c.geometry, DType::kFloat32, 5);
  Workload load =
      make_workload({.num_experts = 1, .num_topk = 1, .hidden = 256, .seed = 9}, 0, num_rows);
  for (std::uint16_t& v : load.x) v = bf16_from_float(bf16_to_float(v) * 20);
  if (is_static) c.s1 = 6 * 20 / kE4m3Max, c.s2 = 100.0f / kE4m3Max;
  StageBuffers b(c);
  std::vector<float> x(128);
  for (std::size_t g = 0; g < b.scale.size(); ++g) {
    for (std::size_t i = 0; i < 128; ++i) x[i] = bf16_to_float(load.x[g * 128 + i]);
    const std::span<std::uint8_t> codes(&b.codes[g * 128], 128);
    is_static ? quantize_static(x, c.s1, codes) : void(b.scale[g] = quantize_group(x, codes));
  }
  const StageResult result = run_stage(backend, weights, b, num_rows);

  std::optional<StaticScales> scales;
  if (is_static) scales = StaticScales{.s1 = c.s1, .s2 = c.s2};
  weights.geometry.activation = other;
  const LayerReference reference(
      weights,
      resolve_recipe(parse_recipe(is_static ? "bf16-static" : "direct"), Mode::kNormal,
                     DispatchDtype::kAuto, scales, "test"),
      1.0f, error_model(backend.device().kind));
  VerifyReport report;
  const std::int32_t expert = 0, step = std::max(1, num_rows / 6);
  const float weight = 1, limit = fn.limit > 0 ? fn.limit : fn.beta;
  for (std::int64_t row = 0; row < num_rows; row += step) {
    const auto at = static_cast<std::size_t>(row);
    compare_row(reference.row(&load.x[at * 256], &expert, &weight, 1), &result.y[at * 256], row,
                report);
    const float* const xs = is_static ? nullptr : &b.scale[at * 2];
    for (std::int64_t n = 0; n < 384; ++n, ++bitten.of) {
      const auto sum = [&](const QuantMatrix& m) {
        return dot(m, n, &b.codes[at * 256], xs, c.s1).exact;
      };
      bitten.gate += sum(weights.experts[0].gate) > limit;
      bitten.up += std::fabs(sum(weights.experts[0].up)) > limit;
    }
  }
  return report;
}

}  // namespace sluice::testing
