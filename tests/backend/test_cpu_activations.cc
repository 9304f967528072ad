// Every activation function on the CPU: codes against the scalar definition, and the whole expert
// stage within the float64 reference's bounds where limits bite.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "activation_fixture.h"
#include "backend/cpu/row_kernels.h"

namespace sluice::testing {
namespace {

TEST(CpuActivations, CodesAreThoseOfTheScalarDefinition) {
  const std::vector<float> list = edges();
  ASSERT_EQ(list.size(), 32u);
  for (const char* const text : kActivations) {
    const ActivationFn fn = parse_activation(text);
    for (const float scale : {0.0f, 1.0f, 0.0078125f, 1e-6f}) {
      for (std::size_t first = 0; first < list.size(); ++first) {
        std::vector<float> gate(128), up(128);
        for (std::size_t i = 0; i < 128; ++i) {
          gate[i] = list[i % 32];
          up[i] = list[(first + i / 32 * 8 + i % 32 * 5) % 32];
        }
        std::vector<std::uint8_t> codes(128);
        const float got =
            cpu::activate_quantize_group(fn, gate.data(), up.data(), scale, codes.data());
        expect_codes_of(fn, gate.data(), up.data(), scale, codes.data(), got,
                        std::string(text) + " scale " + std::to_string(scale));
      }
    }
  }
}

TEST(CpuActivations, TheStageKeepsTheReferencesBoundsWhereLimitsBite) {
  const auto device = make_backend({.num_threads = 1});
  for (const char* const text : kActivations) {
    const ActivationFn fn = parse_activation(text);
    for (const bool is_static : {false, true}) {
      Bitten bitten;
      const VerifyReport report = verify_stage(*device, fn, fn, is_static, 128, 6, bitten);
      EXPECT_TRUE(report.passed()) << text << (is_static ? " static: " : ": ") << report.num_wrong
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
