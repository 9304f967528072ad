// Recipes by their fields: the table of names, what the fields mean together, and the dispatch
// policy (recipe x mode x override x checkpoint -> wire format or refusal).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "sluice/error.h"
#include "sluice/recipe.h"

namespace sluice {
namespace {

constexpr std::string_view kLayer = "model.layers.3.mlp.experts";
const StaticScales kScales{.s1 = 0.02f, .s2 = 0.3f};

constexpr Mode kModes[] = {Mode::kLowLatency, Mode::kNormal};
constexpr WireFormat kWires[] = {WireFormat::kBf16, WireFormat::kE4m3Group, WireFormat::kE4m3Pow2,
                                 WireFormat::kE4m3Static, WireFormat::kE4m3Token};
constexpr Cast kCasts[] = {Cast::kNone,   Cast::kGroup,      Cast::kGroupPow2,
                           Cast::kStatic, Cast::kStaticPow2, Cast::kToken};
constexpr DispatchDtype kDtypes[] = {DispatchDtype::kAuto, DispatchDtype::kBf16,
                                     DispatchDtype::kFp8, DispatchDtype::kFp8Static};

/// Every combination of fields.
std::vector<Recipe> every_recipe() {
  std::vector<Recipe> all;
  for (const WireFormat wire : kWires) {
    for (const Cast gemm1 : kCasts) {
      for (const Cast gemm2 : kCasts) all.push_back({wire, gemm1, gemm2});
    }
  }
  return all;
}

bool is_computed(const Recipe& recipe) {
  try {
    check_recipe(recipe);
    return true;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    // The refusal names the fields: no such recipe has a name.
    for (const char* text :
         {to_string(recipe.wire), to_string(recipe.gemm1), to_string(recipe.gemm2)}) {
      EXPECT_THAT(error.what(), testing::HasSubstr(text));
    }
    return false;
  }
}

/// What each name stands for, written down a second time.
struct Row {
  const char* name;
  Recipe recipe;
  std::vector<Cast> casts;                    ///< From x to GEMM1's input.
  const char* twin;                           ///< Null if no other wire gives the same bytes.
  std::map<DispatchDtype, WireFormat> wires;  ///< Sent under each override; missing: refused.
};
const Row kRows[] = {
    {"direct",
     {WireFormat::kE4m3Group, Cast::kNone, Cast::kGroup},
     {Cast::kGroup},
     "direct-bf16",
     {{DispatchDtype::kAuto, WireFormat::kE4m3Group},
      {DispatchDtype::kFp8, WireFormat::kE4m3Group},
      {DispatchDtype::kBf16, WireFormat::kBf16}}},
    {"direct-bf16",
     {WireFormat::kBf16, Cast::kGroup, Cast::kGroup},
     {Cast::kGroup},
     "direct",
     {{DispatchDtype::kAuto, WireFormat::kBf16}, {DispatchDtype::kBf16, WireFormat::kBf16}}},
    {"bf16-static",
     {WireFormat::kBf16, Cast::kStatic, Cast::kStatic},
     {Cast::kStatic},
     "static",
     {{DispatchDtype::kAuto, WireFormat::kBf16}, {DispatchDtype::kBf16, WireFormat::kBf16}}},
    {"requant-static",
     {WireFormat::kE4m3Group, Cast::kStatic, Cast::kStatic},
     {Cast::kGroup, Cast::kStatic},
     nullptr,
     {{DispatchDtype::kAuto, WireFormat::kE4m3Group},
      {DispatchDtype::kFp8, WireFormat::kE4m3Group}}},
    {"static",
     {WireFormat::kE4m3Static, Cast::kNone, Cast::kStatic},
     {Cast::kStatic},
     "bf16-static",
     {{DispatchDtype::kAuto, WireFormat::kE4m3Static},
      {DispatchDtype::kFp8Static, WireFormat::kE4m3Static},
      {DispatchDtype::kBf16, WireFormat::kBf16}}},
    {"pow2-static",
     {WireFormat::kE4m3Pow2, Cast::kStaticPow2, Cast::kStatic},
     {Cast::kGroupPow2, Cast::kStaticPow2},
     nullptr,
     {{DispatchDtype::kAuto, WireFormat::kE4m3Pow2}}},
    {"direct-token",
     {WireFormat::kE4m3Token, Cast::kNone, Cast::kGroup},
     {Cast::kToken},
     "[wire bf16, gemm1 token, gemm2 group]",
     {{DispatchDtype::kAuto, WireFormat::kE4m3Token}, {DispatchDtype::kBf16, WireFormat::kBf16}}},
};

TEST(Recipes, ANameIsARowOfTheTable) {
  ASSERT_EQ(named_recipes().size(), std::size(kRows));
  std::set<std::string> names;
  for (std::size_t i = 0; i < std::size(kRows); ++i) {
    const Row& row = kRows[i];
    SCOPED_TRACE(row.name);
    EXPECT_STREQ(named_recipes()[i].name, row.name);
    EXPECT_EQ(named_recipes()[i].recipe, row.recipe);
    EXPECT_EQ(parse_recipe(row.name), row.recipe);
    EXPECT_EQ(to_string(row.recipe), row.name);
    EXPECT_EQ(gemm1_casts(row.recipe), row.casts);
    EXPECT_NO_THROW(check_recipe(row.recipe));
    names.insert(row.name);
    // No two names for the same fields: the one that is printed would be a matter of order.
    for (std::size_t j = 0; j < i; ++j) EXPECT_NE(kRows[j].recipe, row.recipe);
  }
  EXPECT_EQ(names.size(), std::size(kRows));
  EXPECT_EQ(Recipe{}, parse_recipe("direct"));
}

TEST(Recipes, WithoutANameTheFieldsArePrinted) {
  EXPECT_EQ(to_string(Recipe{WireFormat::kBf16, Cast::kGroupPow2, Cast::kStatic}),
            "[wire bf16, gemm1 group-pow2, gemm2 static]");
  std::set<std::string> texts;
  for (const Recipe& recipe : every_recipe()) texts.insert(to_string(recipe));
  EXPECT_EQ(texts.size(), every_recipe().size());
}

TEST(Recipes, ATwinHasTheSameCastsBehindAnotherWire) {
  for (const Row& row : kRows) {
    SCOPED_TRACE(row.name);
    const std::optional<Recipe> other = twin(row.recipe);
    ASSERT_EQ(other.has_value(), row.twin != nullptr);
    if (other) {
      EXPECT_EQ(to_string(*other), row.twin);
    }
  }
  int num_twins = 0;
  for (const Recipe& recipe : every_recipe()) {
    if (!is_computed(recipe)) continue;
    SCOPED_TRACE(to_string(recipe));
    EXPECT_EQ(with_wire(recipe, recipe.wire), recipe);
    const std::optional<Recipe> other = twin(recipe);
    num_twins += other.has_value();
    // Whoever rounds once can have it done on the other side of the wire.
    if (sent_cast(recipe.wire) != Cast::kNone) {
      EXPECT_EQ(other.has_value(), gemm1_casts(recipe).size() == 1);
    }
    if (!other) continue;
    EXPECT_NE(other->wire, recipe.wire);
    EXPECT_EQ(gemm1_casts(*other), gemm1_casts(recipe));
    EXPECT_EQ(other->gemm2, recipe.gemm2);
    EXPECT_TRUE(is_computed(*other));
  }
  // Group, group-pow2, static and token, each sent or received, each with three casts of h.
  EXPECT_EQ(num_twins, 4 * 2 * 3);
}

TEST(Recipes, SameBytesAreSameCasts) {
  for (const Row& a : kRows) {
    for (const Row& b : kRows) {
      const bool same = a.casts == b.casts;
      EXPECT_EQ(gemm1_casts(a.recipe) == gemm1_casts(b.recipe), same) << a.name << ' ' << b.name;
      const auto moved = with_wire(a.recipe, b.recipe.wire);
      const bool same_gemm2 = a.recipe.gemm2 == b.recipe.gemm2;
      EXPECT_EQ(moved == std::optional(b.recipe), same && same_gemm2) << a.name << ' ' << b.name;
    }
  }
}

TEST(Recipes, WhatNothingComputesIsRefusedByItsFields) {
  int num_computed = 0;
  for (const Recipe& recipe : every_recipe()) {
    const bool gemm2 = recipe.gemm2 == Cast::kGroup || recipe.gemm2 == Cast::kStatic ||
                       recipe.gemm2 == Cast::kStaticPow2;
    const bool to_static = recipe.gemm1 == Cast::kStatic || recipe.gemm1 == Cast::kStaticPow2;
    bool gemm1 = false;
    switch (recipe.wire) {
      case WireFormat::kBf16:
        gemm1 = recipe.gemm1 != Cast::kNone;
        break;
      case WireFormat::kE4m3Group:
      case WireFormat::kE4m3Pow2:
        gemm1 = recipe.gemm1 == Cast::kNone || to_static;
        break;
      case WireFormat::kE4m3Static:
      case WireFormat::kE4m3Token:
        gemm1 = recipe.gemm1 == Cast::kNone;
        break;
    }
    EXPECT_EQ(is_computed(recipe), gemm1 && gemm2) << to_string(recipe);
    num_computed += gemm1 && gemm2;
    if (!(gemm1 && gemm2)) {
      EXPECT_THROW(
          (void)resolve_recipe(recipe, Mode::kNormal, DispatchDtype::kAuto, kScales, kLayer),
          Error);
    }
  }
  EXPECT_EQ(num_computed, (5 + 3 + 3 + 1 + 1) * 3);
}

bool needs_scales(const Recipe& recipe) {
  for (const Cast cast : {sent_cast(recipe.wire), recipe.gemm1, recipe.gemm2}) {
    if (cast == Cast::kStatic || cast == Cast::kStaticPow2) return true;
  }
  return false;
}

/// The refusal names the recipe, the mode, the layer, and the variable or the tensor.
void expect_refused(const Row& row, Mode mode, DispatchDtype dtype,
                    const std::optional<StaticScales>& scales) {
  try {
    (void)resolve_recipe(row.recipe, mode, dtype, scales, kLayer);
    ADD_FAILURE() << "not refused";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_THAT(error.what(), testing::HasSubstr(row.name));
    EXPECT_THAT(error.what(), testing::HasSubstr(to_string(mode)));
    EXPECT_THAT(error.what(), testing::HasSubstr(std::string(kLayer)));
    EXPECT_THAT(error.what(), testing::AnyOf(testing::HasSubstr("SLUICE_DISPATCH_DTYPE"),
                                             testing::HasSubstr("input_scale")));
  }
}

TEST(DispatchPolicy, WholeTable) {
  int refusals = 0;
  for (const Row& row : kRows) {
    for (const Mode mode : kModes) {
      for (const DispatchDtype dtype : kDtypes) {
        for (const bool with_scales : {true, false}) {
          SCOPED_TRACE(testing::Message() << row.name << ' ' << to_string(mode) << ' '
                                          << to_string(dtype) << " scales=" << with_scales);
          const std::optional<StaticScales> scales =
              with_scales ? std::optional(kScales) : std::nullopt;
          if (!row.wires.contains(dtype) || (!with_scales && needs_scales(row.recipe))) {
            ++refusals;
            expect_refused(row, mode, dtype, scales);
            continue;
          }
          const LayerRecipe recipe = resolve_recipe(row.recipe, mode, dtype, scales, kLayer);
          EXPECT_EQ(recipe.wire, row.wires.at(dtype));
          EXPECT_EQ(recipe.mode, mode);
          // GEMM1 sees the promised bytes, and GEMM2's input is none of the override's business.
          EXPECT_EQ(gemm1_casts(recipe), row.casts);
          EXPECT_EQ(recipe.gemm2, row.recipe.gemm2);
        }
      }
    }
  }
  EXPECT_EQ(refusals, 2 * (2 * 7 * 4 - 2 * (3 + 2 + 2) - (2 + 2 + 3 + 1)));
}

// Low-latency may insist on bf16 while normal sends FP8, and the other way round.
TEST(DispatchPolicy, ModesAreIndependent) {
  const LayerRecipe decode = resolve_recipe(parse_recipe("bf16-static"), Mode::kLowLatency,
                                            DispatchDtype::kAuto, kScales, kLayer);
  const LayerRecipe prefill =
      resolve_recipe(parse_recipe("static"), Mode::kNormal, DispatchDtype::kAuto, kScales, kLayer);
  EXPECT_EQ(decode.wire, WireFormat::kBf16);
  EXPECT_EQ(prefill.wire, WireFormat::kE4m3Static);
}

TEST(DispatchPolicy, EachCastGetsTheScaleItUses) {
  const auto scales_of = [](const Recipe& recipe) {
    const LayerRecipe r =
        resolve_recipe(recipe, Mode::kNormal, DispatchDtype::kAuto, kScales, kLayer);
    return std::pair{r.s1, r.s2};
  };
  using Pair = std::pair<float, float>;
  EXPECT_EQ(scales_of(parse_recipe("direct")), Pair(0, 0));
  EXPECT_EQ(scales_of(parse_recipe("direct-token")), Pair(0, 0));
  EXPECT_EQ(scales_of(parse_recipe("static")), Pair(0.02f, 0.3f));
  EXPECT_EQ(scales_of(parse_recipe("bf16-static")), Pair(0.02f, 0.3f));
  EXPECT_EQ(scales_of(parse_recipe("requant-static")), Pair(0.02f, 0.3f));
  EXPECT_EQ(scales_of(parse_recipe("pow2-static")), Pair(0.03125f, 0.3f));
  EXPECT_EQ(scales_of({WireFormat::kE4m3Group, Cast::kNone, Cast::kStatic}), Pair(0, 0.3f));
  EXPECT_EQ(scales_of({WireFormat::kE4m3Static, Cast::kNone, Cast::kGroup}), Pair(0.02f, 0));
  EXPECT_EQ(scales_of({WireFormat::kBf16, Cast::kStaticPow2, Cast::kStaticPow2}),
            Pair(0.03125f, 0.5f));
}

TEST(DispatchPolicy, BadScalesAreRefused) {
  for (const float bad : {0.0f, -1.0f, 1e-42f, 0x1p118f, std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_THROW((void)resolve_recipe(parse_recipe("static"), Mode::kNormal, DispatchDtype::kAuto,
                                      StaticScales{.s1 = bad, .s2 = 1}, kLayer),
                 Error);
  }
}

TEST(DispatchPolicy, NamesRoundTripAndUnknownOnesAreRefused) {
  for (const Mode mode : kModes) EXPECT_EQ(parse_mode(to_string(mode)), mode);
  for (const WireFormat wire : kWires) EXPECT_EQ(parse_wire_format(to_string(wire)), wire);
  for (const Cast cast : kCasts) EXPECT_EQ(parse_cast(to_string(cast)), cast);
  for (const DispatchDtype t : kDtypes) EXPECT_EQ(parse_dispatch_dtype(to_string(t)), t);
  EXPECT_THROW((void)parse_recipe("dircet"), Error);
  EXPECT_THROW((void)parse_mode("decode"), Error);
  EXPECT_THROW((void)parse_wire_format("int8"), Error);
  EXPECT_THROW((void)parse_cast("groups"), Error);
  EXPECT_THROW((void)parse_dispatch_dtype("int8"), Error);
}

TEST(DispatchPolicy, WireBytes) {
  EXPECT_EQ(wire_bytes_per_token(WireFormat::kBf16, 7168), 14336u);
  EXPECT_EQ(wire_bytes_per_token(WireFormat::kE4m3Group, 7168), 7168u + 56 * 4);
  EXPECT_EQ(wire_bytes_per_token(WireFormat::kE4m3Pow2, 7168), 7168u + 56 * 4);
  EXPECT_EQ(wire_bytes_per_token(WireFormat::kE4m3Static, 7168), 7168u);
  EXPECT_EQ(wire_bytes_per_token(WireFormat::kE4m3Token, 7168), 7172u);
  // What a wire's cast says of its scales is what travels.
  for (const WireFormat wire : kWires) {
    EXPECT_EQ(wire_scale_bytes(wire, 7168),
              4 * static_cast<std::size_t>(scales_per_row(sent_cast(wire), 7168)))
        << to_string(wire);
  }
}

// The texts that people and reports read.
TEST(DispatchPolicy, Descriptions) {
  const auto text = [](const Recipe& recipe) {
    return resolve_recipe(recipe, Mode::kLowLatency, DispatchDtype::kAuto, kScales, kLayer)
        .describe();
  };
  EXPECT_EQ(text(parse_recipe("direct")),
            "direct (low-latency): wire e4m3 + f32 scale per 128; GEMM1 input as sent; GEMM2 input "
            "dynamic per 128");
  EXPECT_EQ(text(parse_recipe("direct-bf16")),
            "direct-bf16 (low-latency): wire bf16; GEMM1 input quantized at the receiver, per 128; "
            "GEMM2 input dynamic per 128");
  EXPECT_EQ(text(parse_recipe("bf16-static")),
            "bf16-static (low-latency): wire bf16; GEMM1 input quantized at the receiver, static "
            "s1 = 0.02; GEMM2 input static s2 = 0.3");
  EXPECT_EQ(text(parse_recipe("requant-static")),
            "requant-static (low-latency): wire e4m3 + f32 scale per 128; GEMM1 input re-quantized "
            "at the receiver, static s1 = 0.02; GEMM2 input static s2 = 0.3");
  EXPECT_EQ(text(parse_recipe("static")),
            "static (low-latency): wire e4m3, static s1; GEMM1 input as sent; GEMM2 input static "
            "s2 = 0.3");
  EXPECT_EQ(text(parse_recipe("pow2-static")),
            "pow2-static (low-latency): wire e4m3 + power-of-two scale per 128; GEMM1 input "
            "exponent-shifted at the receiver, static s1 = 0.03125; GEMM2 input static s2 = 0.3");
  EXPECT_EQ(text(parse_recipe("direct-token")),
            "direct-token (low-latency): wire e4m3 + f32 scale per token; GEMM1 input as sent; "
            "GEMM2 input dynamic per 128");
  EXPECT_EQ(text({WireFormat::kBf16, Cast::kToken, Cast::kGroup}),
            "[wire bf16, gemm1 token, gemm2 group] (low-latency): wire bf16; GEMM1 input quantized "
            "at the receiver, per token; GEMM2 input dynamic per 128");
  EXPECT_EQ(text({WireFormat::kBf16, Cast::kGroupPow2, Cast::kGroup}),
            "[wire bf16, gemm1 group-pow2, gemm2 group] (low-latency): wire bf16; GEMM1 input "
            "quantized at the receiver, per 128, powers of two; GEMM2 input dynamic per 128");
}

}  // namespace
}  // namespace sluice
