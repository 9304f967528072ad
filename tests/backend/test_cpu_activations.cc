// Every activation function on the CPU: codes against the scalar definition, and the whole expert
// stage within the float64 reference's bounds where limits bite.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/row_kernels.h"
#include "expert_fixture.h"
#include "sluice/backend.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/workload.h"

namespace sluice::testing {
namespace {

const char* const kActivations[] = {"swiglu", "swiglu:limit=10", "swiglu:limit=0.25",
                                    "swiglu-oai:alpha=1.702,limit=7", "situ:beta=4,linear_beta=25"};

/// Around the limits, subnormal, huge, infinite and NaN; 32 in all.
std::vector<float> edges() {
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
bool is_code_of(std::uint8_t code, float h, float inverse) {
  for (const float near : {h * (1 - 0x1p-19f), h, h * (1 + 0x1p-19f)}) {
    if (code == e4m3_from_float(near * inverse)) return true;
  }
  return false;
}

TEST(CpuActivations, CodesAreThoseOfTheScalarDefinition) {
  const std::vector<float> list = edges();
  ASSERT_EQ(list.size(), 32u);
  for (const char* const text : kActivations) {
    const ActivationFn fn = parse_activation(text);
    for (const float scale : {0.0f, 1.0f, 0.0078125f, 1e-6f}) {
      for (std::size_t first = 0; first < list.size(); ++first) {
        std::vector<float> gate(128), up(128), h(128);
        for (std::size_t i = 0; i < 128; ++i) {
          gate[i] = list[i % 32];
          up[i] = list[(first + i / 32 * 8 + i % 32 * 5) % 32];
          h[i] = activate(fn, gate[i], up[i]);
        }
        std::vector<std::uint8_t> codes(128), expected(128);
        const float group = quantize_group(h, expected);
        const float got =
            cpu::activate_quantize_group(fn, gate.data(), up.data(), scale, codes.data());
        if (std::isinf(group)) {  // A product that float32 does not have.
          EXPECT_TRUE(scale != 0 || std::isinf(got)) << text;
          continue;
        }
        EXPECT_NEAR(got / (scale == 0 ? group : scale), 1, 0x1p-19) << text;
        for (std::size_t i = 0; i < 128; ++i) {
          EXPECT_EQ((codes[i] & 0x7f) == 0x7f, std::isnan(h[i]));
          if (std::isnan(h[i])) continue;
          EXPECT_TRUE(is_code_of(codes[i], h[i], 1.0f / got) ||
                      is_code_of(codes[i], h[i], kE4m3Max / (got * kE4m3Max)))
              << text << " scale " << scale << " gate " << gate[i] << " up " << up[i] << ": code "
              << int{codes[i]} << " for " << h[i];
        }
      }
    }
  }
}

/// How many elements of gate and up lie beyond the limit.
struct Bitten {
  std::int64_t gate = 0, up = 0, of = 0;
};

VerifyReport run_stage(const ActivationFn& fn, const std::string& recipe_name, float x_scale,
                       Bitten& bitten) {
  StageCase c;
  c.geometry.hidden = 256, c.geometry.intermediate = 384, c.geometry.activation = fn;
  c.rows = {6};
  const ExpertWeights weights = random_experts(c.geometry, DType::kFloat32, 5);
  Workload load = make_workload({.num_experts = 1, .num_topk = 1, .hidden = 256, .seed = 9}, 0, 6);
  for (std::uint16_t& v : load.x) v = bf16_from_float(bf16_to_float(v) * x_scale);
  const bool is_static = recipe_name != "direct";
  if (is_static) c.s1 = 6 * x_scale / kE4m3Max, c.s2 = 100.0f / kE4m3Max;

  const auto device = make_backend({.num_threads = 1});
  StageBuffers b(c);
  ops(*device).quantize(load.x.data(), b.rows(), false,
                        {.codes = b.codes.data(),
                         .scale = is_static ? nullptr : b.scale.data(),
                         .static_scale = c.s1,
                         .width = 256},
                        {});
  const auto prepared = ops(*device).prepare(weights);
  ops(*device).expert_stage(*prepared, b.in(), b.rows(), b.h(), b.out.data(), {}, nullptr);

  std::optional<StaticScales> scales;
  if (is_static) scales = StaticScales{.s1 = c.s1, .s2 = c.s2};
  const LayerReference reference(weights,
                                 resolve_recipe(parse_recipe(recipe_name), Mode::kNormal,
                                                DispatchDtype::kAuto, scales, "test"),
                                 1.0f);
  VerifyReport report;
  const std::int32_t expert = 0;
  const float weight = 1, limit = fn.limit > 0 ? fn.limit : fn.beta;
  for (std::int64_t row = 0; row < 6; ++row) {
    compare_row(reference.row(&load.x[static_cast<std::size_t>(row * 256)], &expert, &weight, 1),
                &b.out[static_cast<std::size_t>(row * 256)], row, report);
    const float* xs = is_static ? nullptr : &b.scale[static_cast<std::size_t>(row * 2)];
    const std::uint8_t* x = &b.codes[static_cast<std::size_t>(row * 256)];
    for (std::int64_t n = 0; n < 384; ++n, ++bitten.of) {
      bitten.gate += dot(weights.experts[0].gate, n, x, xs, c.s1).exact > limit;
      bitten.up += std::fabs(dot(weights.experts[0].up, n, x, xs, c.s1).exact) > limit;
    }
  }
  return report;
}

TEST(CpuActivations, TheStageKeepsTheReferencesBoundsWhereLimitsBite) {
  for (const char* const text : kActivations) {
    const ActivationFn fn = parse_activation(text);
    for (const char* const recipe : {"direct", "bf16-static"}) {
      Bitten bitten;
      const VerifyReport report = run_stage(fn, recipe, 20, bitten);
      EXPECT_TRUE(report.passed()) << text << ' ' << recipe << ": " << report.num_wrong
                                   << " wrong, worst " << report.worst_actual << " for "
                                   << report.worst_expected << " +- " << report.worst_bound;
      if (fn.kind == ActivationKind::kSwiglu) continue;
      EXPECT_GT(bitten.gate, bitten.of / 20) << text;
      EXPECT_GT(bitten.up, bitten.of / 10) << text;
      EXPECT_LT(bitten.up, bitten.of) << text;
    }
  }
}

// A bound that let the neighbour pass would certify a backend that forgets the limit.
TEST(CpuActivations, AnotherActivationIsBeyondTheBounds) {
  const auto wrong_with = [](const char* right, const char* other) {
    StageCase c;
    c.geometry.hidden = 256, c.geometry.intermediate = 384;
    c.geometry.activation = parse_activation(right);
    ExpertWeights weights = random_experts(c.geometry, DType::kFloat32, 5);
    Workload load =
        make_workload({.num_experts = 1, .num_topk = 1, .hidden = 256, .seed = 9}, 0, 1);
    for (std::uint16_t& v : load.x) v = bf16_from_float(bf16_to_float(v) * 20);
    const LayerRecipe recipe =
        resolve_recipe(parse_recipe("direct"), Mode::kNormal, DispatchDtype::kAuto, {}, "test");
    const std::int32_t expert = 0;
    const float weight = 1;
    const LayerReference reference(weights, recipe, 1.0f);
    weights.geometry.activation = parse_activation(other);
    const ReferenceRow there =
        LayerReference(weights, recipe, 1.0f).row(load.x.data(), &expert, &weight, 1);
    std::vector<std::uint16_t> y;
    for (const double v : there.y) y.push_back(bf16_from_float(static_cast<float>(v)));
    VerifyReport report;
    compare_row(reference.row(load.x.data(), &expert, &weight, 1), y.data(), 0, report);
    return report.num_wrong;
  };
  for (const char* const text : kActivations) {
    if (std::string(text) == "swiglu") continue;
    EXPECT_GT(wrong_with(text, "swiglu"), 128) << text;
    EXPECT_GT(wrong_with("swiglu", text), 128) << text;
  }
  EXPECT_GT(wrong_with("swiglu:limit=10", "swiglu:limit=9"), 128);
  EXPECT_GT(wrong_with("situ:beta=4,linear_beta=25", "situ:beta=4,linear_beta=20"), 128);
}

}  // namespace
}  // namespace sluice::testing
