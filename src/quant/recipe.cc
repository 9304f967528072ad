// The table of recipes, what their fields mean together, and the dispatch policy.
#include "sluice/recipe.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "core/fail.h"
#include "quant/scale_limit.h"

namespace sluice {
namespace {

constexpr std::array kNamedRecipes = {
    NamedRecipe{"direct", {WireFormat::kE4m3Group, Cast::kNone, Cast::kGroup}},
    NamedRecipe{"direct-bf16", {WireFormat::kBf16, Cast::kGroup, Cast::kGroup}},
    NamedRecipe{"bf16-static", {WireFormat::kBf16, Cast::kStatic, Cast::kStatic}},
    NamedRecipe{"requant-static", {WireFormat::kE4m3Group, Cast::kStatic, Cast::kStatic}},
    NamedRecipe{"static", {WireFormat::kE4m3Static, Cast::kNone, Cast::kStatic}},
    NamedRecipe{"pow2-static", {WireFormat::kE4m3Pow2, Cast::kStaticPow2, Cast::kStatic}},
    NamedRecipe{"direct-token", {WireFormat::kE4m3Token, Cast::kNone, Cast::kGroup}},
};

// The texts of the enumerations; null for what is no value of them.
constexpr const char* name_of(WireFormat wire) {
  switch (wire) {
    case WireFormat::kBf16:
      return "bf16";
    case WireFormat::kE4m3Group:
      return "e4m3 + f32 scale per 128";
    case WireFormat::kE4m3Pow2:
      return "e4m3 + power-of-two scale per 128";
    case WireFormat::kE4m3Static:
      return "e4m3, static s1";
    case WireFormat::kE4m3Token:
      return "e4m3 + f32 scale per token";
  }
  return nullptr;
}

constexpr const char* name_of(Cast cast) {
  switch (cast) {
    case Cast::kNone:
      return "none";
    case Cast::kGroup:
      return "group";
    case Cast::kGroupPow2:
      return "group-pow2";
    case Cast::kStatic:
      return "static";
    case Cast::kStaticPow2:
      return "static-pow2";
    case Cast::kToken:
      return "token";
  }
  return nullptr;
}

constexpr const char* name_of(DispatchDtype dtype) {
  switch (dtype) {
    case DispatchDtype::kAuto:
      return "auto";
    case DispatchDtype::kBf16:
      return "bf16";
    case DispatchDtype::kFp8:
      return "fp8";
    case DispatchDtype::kFp8Static:
      return "fp8-static";
  }
  return nullptr;
}

const char* or_unknown(const char* name) {
  return name != nullptr ? name : "unknown";
}

// Every value of each enumeration, for what parses or searches.
constexpr std::array kModes = {Mode::kLowLatency, Mode::kNormal};
constexpr std::array kWires = {WireFormat::kBf16, WireFormat::kE4m3Group, WireFormat::kE4m3Pow2,
                               WireFormat::kE4m3Static, WireFormat::kE4m3Token};
constexpr std::array kCasts = {Cast::kNone,   Cast::kGroup,      Cast::kGroupPow2,
                               Cast::kStatic, Cast::kStaticPow2, Cast::kToken};
constexpr std::array kDispatchDtypes = {DispatchDtype::kAuto, DispatchDtype::kBf16,
                                        DispatchDtype::kFp8, DispatchDtype::kFp8Static};

/// Whether `values` has every value that name_of() knows. Its switches have no default, so that the
/// compiler asks for the name of a new enumerator; with a name, it is missed here.
template <class Values>
constexpr bool is_complete(const Values& values) {
  using Value = typename Values::value_type;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] != static_cast<Value>(i)) return false;
  }
  return name_of(static_cast<Value>(values.size())) == nullptr;
}
static_assert(is_complete(kWires) && is_complete(kCasts) && is_complete(kDispatchDtypes));

/// The value that to_string() calls `name`.
template <class Values>
auto parse(const char* what, std::string_view name, const Values& values) {
  std::string known;
  for (const auto value : values) {
    if (name == to_string(value)) return value;
    known += std::string(known.empty() ? "" : ", ") + to_string(value);
  }
  fail(ErrorCode::kInvalidArgument, "{} '{}' is none of: {}", what, name, known);
}

/// The wire format that an override asks for; empty if it asks for none.
std::optional<WireFormat> requested_wire(DispatchDtype dtype) {
  switch (dtype) {
    case DispatchDtype::kAuto:
      return std::nullopt;
    case DispatchDtype::kBf16:
      return WireFormat::kBf16;
    case DispatchDtype::kFp8:
      return WireFormat::kE4m3Group;
    case DispatchDtype::kFp8Static:
      return WireFormat::kE4m3Static;
  }
  fail(ErrorCode::kInternal, "dispatch dtype {} does not exist", static_cast<int>(dtype));
}

/// Why GEMM1 would not see the bytes of `recipe` if `wire` were sent instead.
const char* conflict_of(const Recipe& recipe, WireFormat wire) {
  if (recipe.wire == WireFormat::kBf16) return "the recipe requires a bf16 wire in this mode";
  switch (sent_cast(wire)) {
    case Cast::kNone:
      return "GEMM1 must see values rounded at the sender and again at the receiver";
    case Cast::kGroup:
      return "GEMM1 would see values scaled per group of 128";
    case Cast::kGroupPow2:
      return "GEMM1 would see values scaled by powers of two per group of 128";
    case Cast::kStatic:
    case Cast::kStaticPow2:
      return "GEMM1 would see statically scaled values";
    case Cast::kToken:
      return "GEMM1 would see values with one scale per token";
  }
  fail(ErrorCode::kInternal, "wire format {} does not exist", static_cast<int>(wire));
}

/// The recipe with the wire that `dtype` asks for. Throws: kUnsupported.
Recipe overridden(const Recipe& recipe, Mode mode, DispatchDtype dtype,
                  std::string_view layer_name) {
  const std::optional<WireFormat> wire = requested_wire(dtype);
  if (!wire || *wire == recipe.wire) return recipe;
  const std::optional<Recipe> other =
      recipe.wire == WireFormat::kBf16 ? std::nullopt : with_wire(recipe, *wire);
  if (!other) {
    fail(ErrorCode::kUnsupported,
         "dispatch dtype {} (SLUICE_DISPATCH_DTYPE) cannot be honoured by recipe {} in {} mode "
         "({}): {}",
         to_string(dtype), to_string(recipe), to_string(mode), layer_name,
         conflict_of(recipe, *wire));
  }
  return *other;
}

/// The static scale that `cast` uses where the layer's is `s`; 0 if it uses none.
float resolved_scale(Cast cast, float s) {
  switch (cast) {
    case Cast::kNone:
    case Cast::kGroup:
    case Cast::kGroupPow2:
    case Cast::kToken:
      return 0;
    case Cast::kStatic:
      return s;
    case Cast::kStaticPow2:
      return ceil_pow2(s);
  }
  fail(ErrorCode::kInternal, "cast {} does not exist", static_cast<int>(cast));
}

}  // namespace

std::span<const NamedRecipe> named_recipes() noexcept {
  return kNamedRecipes;
}

Recipe parse_recipe(std::string_view name) {
  std::string known;
  for (const NamedRecipe& row : kNamedRecipes) {
    if (name == row.name) return row.recipe;
    known += std::string(known.empty() ? "" : ", ") + row.name;
  }
  fail(ErrorCode::kInvalidArgument, "recipe '{}' is none of: {}", name, known);
}

std::string to_string(const Recipe& recipe) {
  for (const NamedRecipe& row : kNamedRecipes) {
    if (row.recipe == recipe) return row.name;
  }
  return fmt::format("[wire {}, gemm1 {}, gemm2 {}]", to_string(recipe.wire),
                     to_string(recipe.gemm1), to_string(recipe.gemm2));
}

const char* to_string(Mode mode) noexcept {
  return mode == Mode::kLowLatency ? "low-latency" : "normal";
}

const char* to_string(WireFormat wire) noexcept {
  return or_unknown(name_of(wire));
}
const char* to_string(Cast cast) noexcept {
  return or_unknown(name_of(cast));
}
const char* to_string(DispatchDtype dtype) noexcept {
  return or_unknown(name_of(dtype));
}

Mode parse_mode(std::string_view name) {
  return parse("mode", name, kModes);
}
WireFormat parse_wire_format(std::string_view name) {
  return parse("wire", name, kWires);
}
Cast parse_cast(std::string_view name) {
  return parse("cast", name, kCasts);
}
DispatchDtype parse_dispatch_dtype(std::string_view name) {
  return parse("dispatch dtype", name, kDispatchDtypes);
}

Cast sent_cast(WireFormat wire) {
  switch (wire) {
    case WireFormat::kBf16:
      return Cast::kNone;
    case WireFormat::kE4m3Group:
      return Cast::kGroup;
    case WireFormat::kE4m3Pow2:
      return Cast::kGroupPow2;
    case WireFormat::kE4m3Static:
      return Cast::kStatic;
    case WireFormat::kE4m3Token:
      return Cast::kToken;
  }
  fail(ErrorCode::kInternal, "wire format {} does not exist", static_cast<int>(wire));
}

bool has_group_scales(Cast cast) {
  switch (cast) {
    case Cast::kGroup:
    case Cast::kGroupPow2:
      return true;
    case Cast::kNone:
    case Cast::kStatic:
    case Cast::kStaticPow2:
    case Cast::kToken:
      return false;
  }
  fail(ErrorCode::kInternal, "cast {} does not exist", static_cast<int>(cast));
}

std::int64_t scales_per_row(Cast cast, std::int64_t width) {
  switch (cast) {
    case Cast::kGroup:
    case Cast::kGroupPow2:
      return width / kActivationGroup;
    case Cast::kToken:
      return 1;
    case Cast::kNone:
    case Cast::kStatic:
    case Cast::kStaticPow2:
      return 0;
  }
  fail(ErrorCode::kInternal, "cast {} does not exist", static_cast<int>(cast));
}

bool has_static_scale(Cast cast) {
  switch (cast) {
    case Cast::kStatic:
    case Cast::kStaticPow2:
      return true;
    case Cast::kNone:
    case Cast::kGroup:
    case Cast::kGroupPow2:
    case Cast::kToken:
      return false;
  }
  fail(ErrorCode::kInternal, "cast {} does not exist", static_cast<int>(cast));
}

std::vector<Cast> gemm1_casts(const Recipe& recipe) {
  std::vector<Cast> casts;
  for (const Cast cast : {sent_cast(recipe.wire), recipe.gemm1}) {
    if (cast != Cast::kNone) casts.push_back(cast);
  }
  return casts;
}

std::optional<Recipe> with_wire(const Recipe& recipe, WireFormat wire) {
  const std::vector<Cast> casts = gemm1_casts(recipe);
  for (const Cast gemm1 : kCasts) {
    const Recipe other{.wire = wire, .gemm1 = gemm1, .gemm2 = recipe.gemm2};
    if (gemm1_casts(other) == casts) return other;
  }
  return std::nullopt;
}

std::optional<Recipe> twin(const Recipe& recipe) {
  for (const WireFormat wire : kWires) {
    if (wire == recipe.wire) continue;
    if (const std::optional<Recipe> other = with_wire(recipe, wire)) return other;
  }
  return std::nullopt;
}

void check_recipe(const Recipe& recipe) {
  const Cast sent = sent_cast(recipe.wire);
  const auto require = [&](bool ok, const char* reason) {
    if (!ok) fail(ErrorCode::kUnsupported, "recipe {}: {}", to_string(recipe), reason);
  };
  require(sent != Cast::kNone || recipe.gemm1 != Cast::kNone,
          "GEMM1 reads e4m3, and neither the wire nor gemm1 rounds to it");
  require(sent == Cast::kNone || recipe.gemm1 == Cast::kNone ||
              (has_group_scales(sent) && has_static_scale(recipe.gemm1)),
          "the receiver can bring e4m3 rows from group scales to a static scale, and no others");
  require(recipe.gemm2 == Cast::kGroup || has_static_scale(recipe.gemm2),
          "gemm2 is none of: group, static, static-pow2");
}

LayerRecipe resolve_recipe(const Recipe& recipe, Mode mode, DispatchDtype override_dtype,
                           const std::optional<StaticScales>& scales, std::string_view layer_name) {
  check_recipe(recipe);
  LayerRecipe layer{overridden(recipe, mode, override_dtype, layer_name), mode};
  const std::vector<Cast> casts = gemm1_casts(layer);
  const auto cast1 = std::ranges::find_if(casts, has_static_scale);
  if (cast1 == casts.end() && !has_static_scale(layer.gemm2)) return layer;
  if (!scales) {
    fail(ErrorCode::kUnsupported,
         "recipe {} in {} mode needs static activation scales, and none are given for {}; a "
         "checkpoint has them as input_scale of its experts' w1, w2, w3, or gate_proj, up_proj, "
         "down_proj; use direct or direct-bf16",
         to_string(recipe), to_string(mode), layer_name);
  }
  for (const auto& [field, value] :
       {std::pair{"s1 (w1, w3)", scales->s1}, {"s2 (w2)", scales->s2}}) {
    check_argument(std::isnormal(value) && value > 0 && value < kScaleLimit,
                   "{}: static input scale {} = {} is not a positive normal number below 2^118",
                   layer_name, field, value);
  }
  layer.s1 = cast1 == casts.end() ? 0 : resolved_scale(*cast1, scales->s1);
  layer.s2 = resolved_scale(layer.gemm2, scales->s2);
  return layer;
}

namespace {

/// The scale of a cast, as describe() says it.
std::string scale_text(Cast cast, const char* group, const char* static_name, float static_scale) {
  switch (cast) {
    case Cast::kNone:
      return "none";
    case Cast::kGroup:
      return group;
    case Cast::kGroupPow2:
      return fmt::format("{}, powers of two", group);
    case Cast::kStatic:
    case Cast::kStaticPow2:
      return fmt::format("static {} = {:.6g}", static_name, static_scale);
    case Cast::kToken:
      return "per token";
  }
  fail(ErrorCode::kInternal, "cast {} does not exist", static_cast<int>(cast));
}

/// What the receiver does to a row before GEMM1.
std::string receiver_text(const LayerRecipe& recipe) {
  if (recipe.gemm1 == Cast::kNone) return "as sent";
  const Cast sent = sent_cast(recipe.wire);
  const char* verb = sent == Cast::kNone ? "quantized"
                     : sent == Cast::kGroupPow2 && recipe.gemm1 == Cast::kStaticPow2
                         ? "exponent-shifted"
                         : "re-quantized";
  return fmt::format("{} at the receiver, {}", verb,
                     scale_text(recipe.gemm1, "per 128", "s1", recipe.s1));
}

}  // namespace

std::string LayerRecipe::describe() const {
  return fmt::format("{} ({}): wire {}; GEMM1 input {}; GEMM2 input {}", to_string(*this),
                     to_string(mode), to_string(wire), receiver_text(*this),
                     scale_text(gemm2, "dynamic per 128", "s2", s2));
}

}  // namespace sluice
