// The dispatch policy as a table: recipe x mode x override x checkpoint -> wire format or refusal.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "sluice/error.h"
#include "sluice/recipe.h"

namespace sluice {
namespace {

constexpr std::string_view kLayer = "model.layers.3.mlp.experts";
const StaticScales kScales{.s1 = 0.02f, .s2 = 0.3f};

// What each recipe sends under each override; a missing entry is a refusal.
using Row = std::map<DispatchDtype, WireFormat>;
const std::map<RecipeName, Row> kPolicy = {
    {RecipeName::kDirect,
     {{DispatchDtype::kAuto, WireFormat::kE4m3Group},
      {DispatchDtype::kFp8, WireFormat::kE4m3Group},
      {DispatchDtype::kBf16, WireFormat::kBf16}}},
    {RecipeName::kDirectBf16,
     {{DispatchDtype::kAuto, WireFormat::kBf16}, {DispatchDtype::kBf16, WireFormat::kBf16}}},
    {RecipeName::kBf16Static,
     {{DispatchDtype::kAuto, WireFormat::kBf16}, {DispatchDtype::kBf16, WireFormat::kBf16}}},
    {RecipeName::kRequantStatic,
     {{DispatchDtype::kAuto, WireFormat::kE4m3Group},
      {DispatchDtype::kFp8, WireFormat::kE4m3Group}}},
    {RecipeName::kStatic,
     {{DispatchDtype::kAuto, WireFormat::kE4m3Static},
      {DispatchDtype::kFp8Static, WireFormat::kE4m3Static},
      {DispatchDtype::kBf16, WireFormat::kBf16}}},
    {RecipeName::kPow2Static, {{DispatchDtype::kAuto, WireFormat::kE4m3Pow2}}},
};

bool needs_scales(RecipeName name) {
  return name != RecipeName::kDirect && name != RecipeName::kDirectBf16;
}

TEST(DispatchPolicy, WholeTable) {
  int refusals = 0;
  for (const RecipeName name : all_recipes()) {
    for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
      for (const DispatchDtype dtype : {DispatchDtype::kAuto, DispatchDtype::kBf16,
                                        DispatchDtype::kFp8, DispatchDtype::kFp8Static}) {
        for (const bool with_scales : {true, false}) {
          SCOPED_TRACE(testing::Message() << to_string(name) << ' ' << to_string(mode) << ' '
                                          << to_string(dtype) << " scales=" << with_scales);
          const std::optional<StaticScales> scales =
              with_scales ? std::optional(kScales) : std::nullopt;
          const Row& row = kPolicy.at(name);
          const bool allowed = row.contains(dtype) && (with_scales || !needs_scales(name));
          if (allowed) {
            const Recipe recipe = resolve_recipe(name, mode, dtype, scales, kLayer);
            EXPECT_EQ(recipe.wire, row.at(dtype));
            EXPECT_EQ(recipe.mode, mode);
            // GEMM1 sees received bytes only if they are already in its format.
            const bool same =
                (recipe.wire == WireFormat::kE4m3Group && recipe.gemm1 == GemmInput::kGroup) ||
                (recipe.wire == WireFormat::kE4m3Static && recipe.gemm1 == GemmInput::kStatic);
            EXPECT_EQ(recipe.gemm1_as_sent, same);
            continue;
          }
          ++refusals;
          try {
            (void)resolve_recipe(name, mode, dtype, scales, kLayer);
            ADD_FAILURE() << "not refused";
          } catch (const Error& error) {
            EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
            // The refusal names the recipe, the mode, the layer, and the variable or the tensor.
            EXPECT_THAT(error.what(), testing::HasSubstr(to_string(name)));
            EXPECT_THAT(error.what(), testing::HasSubstr(to_string(mode)));
            EXPECT_THAT(error.what(), testing::HasSubstr(std::string(kLayer)));
            EXPECT_THAT(error.what(), testing::AnyOf(testing::HasSubstr("SLUICE_DISPATCH_DTYPE"),
                                                     testing::HasSubstr("input_scale")));
          }
        }
      }
    }
  }
  EXPECT_EQ(refusals, 2 * (2 * 6 * 4 - 2 * (3 + 2) - (2 + 2 + 3 + 1)));
}

// Low-latency may insist on bf16 while normal sends FP8, and the other way round.
TEST(DispatchPolicy, ModesAreIndependent) {
  const Recipe decode = resolve_recipe(RecipeName::kBf16Static, Mode::kLowLatency,
                                       DispatchDtype::kAuto, kScales, kLayer);
  const Recipe prefill =
      resolve_recipe(RecipeName::kStatic, Mode::kNormal, DispatchDtype::kAuto, kScales, kLayer);
  EXPECT_EQ(decode.wire, WireFormat::kBf16);
  EXPECT_EQ(prefill.wire, WireFormat::kE4m3Static);
}

TEST(DispatchPolicy, Pow2RoundsTheStaticScaleUp) {
  const Recipe recipe = resolve_recipe(RecipeName::kPow2Static, Mode::kNormal, DispatchDtype::kAuto,
                                       StaticScales{.s1 = 0.02f, .s2 = 0.3f}, kLayer);
  EXPECT_EQ(recipe.s1, 0.03125f);
  EXPECT_EQ(recipe.s2, 0.3f);
}

TEST(DispatchPolicy, BadScalesAreRefused) {
  for (const float bad : {0.0f, -1.0f, 1e-42f, std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_THROW((void)resolve_recipe(RecipeName::kStatic, Mode::kNormal, DispatchDtype::kAuto,
                                      StaticScales{.s1 = bad, .s2 = 1}, kLayer),
                 Error);
  }
}

TEST(DispatchPolicy, NamesRoundTripAndUnknownOnesAreRefused) {
  for (const RecipeName name : all_recipes()) EXPECT_EQ(parse_recipe(to_string(name)), name);
  EXPECT_THROW((void)parse_recipe("dircet"), Error);
  EXPECT_THROW((void)parse_mode("decode"), Error);
  EXPECT_THROW((void)parse_dispatch_dtype("int8"), Error);
}

TEST(DispatchPolicy, WireBytes) {
  EXPECT_EQ(wire_bytes_per_token(WireFormat::kBf16, 7168), 14336u);
  EXPECT_EQ(wire_bytes_per_token(WireFormat::kE4m3Group, 7168), 7168u + 56 * 4);
  EXPECT_EQ(wire_bytes_per_token(WireFormat::kE4m3Pow2, 7168), 7168u + 56 * 4);
  EXPECT_EQ(wire_bytes_per_token(WireFormat::kE4m3Static, 7168), 7168u);
}

}  // namespace
}  // namespace sluice
