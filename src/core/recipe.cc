// The dispatch policy. One table says what each recipe is; one function says what an override may
// do.
#include "sluice/recipe.h"

#include <array>
#include <cmath>

#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

struct Definition {
  RecipeName name;
  const char* text;
  WireFormat wire;
  GemmInput gemm1, gemm2;
  bool gemm1_as_sent;
};

constexpr std::array kDefinitions = {
    Definition{RecipeName::kDirect, "direct", WireFormat::kE4m3Group, GemmInput::kGroup,
               GemmInput::kGroup, true},
    Definition{RecipeName::kDirectBf16, "direct-bf16", WireFormat::kBf16, GemmInput::kGroup,
               GemmInput::kGroup, false},
    Definition{RecipeName::kBf16Static, "bf16-static", WireFormat::kBf16, GemmInput::kStatic,
               GemmInput::kStatic, false},
    Definition{RecipeName::kRequantStatic, "requant-static", WireFormat::kE4m3Group,
               GemmInput::kStatic, GemmInput::kStatic, false},
    Definition{RecipeName::kStatic, "static", WireFormat::kE4m3Static, GemmInput::kStatic,
               GemmInput::kStatic, true},
    Definition{RecipeName::kPow2Static, "pow2-static", WireFormat::kE4m3Pow2, GemmInput::kStatic,
               GemmInput::kStatic, false},
};

const Definition& definition(RecipeName name) {
  for (const Definition& d : kDefinitions) {
    if (d.name == name) return d;
  }
  fail(ErrorCode::kInvalidArgument, "recipe number {} does not exist", static_cast<int>(name));
}

WireFormat requested_wire(DispatchDtype dtype) {
  switch (dtype) {
    case DispatchDtype::kBf16:
      return WireFormat::kBf16;
    case DispatchDtype::kFp8:
      return WireFormat::kE4m3Group;
    default:
      return WireFormat::kE4m3Static;
  }
}

/// Why GEMM1 would not see the recipe's bytes if `wire` were sent instead; null if it would.
const char* override_conflict(const Definition& d, WireFormat wire) {
  if (wire == d.wire) return nullptr;
  if (d.wire == WireFormat::kBf16) return "the recipe requires a bf16 wire in this mode";
  if (wire == WireFormat::kBf16) {
    // The receiver can do the sender's one rounding itself; it cannot do two.
    if (d.gemm1_as_sent) return nullptr;
    return "GEMM1 must see values rounded at the sender and again at the receiver";
  }
  if (wire == WireFormat::kE4m3Static) return "GEMM1 would see statically scaled values";
  return "GEMM1 would see values scaled per group of 128";
}

}  // namespace

std::span<const RecipeName> all_recipes() noexcept {
  static constexpr auto kNames = [] {
    std::array<RecipeName, kDefinitions.size()> names{};
    for (std::size_t i = 0; i < names.size(); ++i) names[i] = kDefinitions[i].name;
    return names;
  }();
  return kNames;
}

const char* to_string(RecipeName name) noexcept {
  for (const Definition& d : kDefinitions) {
    if (d.name == name) return d.text;
  }
  return "unknown";
}

const char* to_string(Mode mode) noexcept {
  return mode == Mode::kLowLatency ? "low-latency" : "normal";
}

const char* to_string(WireFormat wire) noexcept {
  switch (wire) {
    case WireFormat::kBf16:
      return "bf16";
    case WireFormat::kE4m3Group:
      return "e4m3 + f32 scale per 128";
    case WireFormat::kE4m3Pow2:
      return "e4m3 + power-of-two scale per 128";
    case WireFormat::kE4m3Static:
      return "e4m3, static s1";
  }
  return "unknown";
}

const char* to_string(DispatchDtype dtype) noexcept {
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
  return "unknown";
}

RecipeName parse_recipe(std::string_view name) {
  std::string known;
  for (const Definition& d : kDefinitions) {
    if (name == d.text) return d.name;
    known += std::string(known.empty() ? "" : ", ") + d.text;
  }
  fail(ErrorCode::kInvalidArgument, "recipe '{}' is none of: {}", name, known);
}

Mode parse_mode(std::string_view name) {
  if (name == "low-latency") return Mode::kLowLatency;
  if (name == "normal") return Mode::kNormal;
  fail(ErrorCode::kInvalidArgument, "mode '{}' is none of: low-latency, normal", name);
}

DispatchDtype parse_dispatch_dtype(std::string_view name) {
  for (const auto dtype : {DispatchDtype::kAuto, DispatchDtype::kBf16, DispatchDtype::kFp8,
                           DispatchDtype::kFp8Static}) {
    if (name == to_string(dtype)) return dtype;
  }
  fail(ErrorCode::kInvalidArgument, "dispatch dtype '{}' is none of: auto, bf16, fp8, fp8-static",
       name);
}

Recipe resolve_recipe(RecipeName name, Mode mode, DispatchDtype override_dtype,
                      const std::optional<StaticScales>& scales, std::string_view layer_name) {
  const Definition& d = definition(name);
  Recipe recipe{.name = name,
                .mode = mode,
                .wire = d.wire,
                .gemm1 = d.gemm1,
                .gemm2 = d.gemm2,
                .gemm1_as_sent = d.gemm1_as_sent};

  if (override_dtype != DispatchDtype::kAuto) {
    const WireFormat wire = requested_wire(override_dtype);
    if (const char* conflict = override_conflict(d, wire)) {
      fail(ErrorCode::kUnsupported,
           "SLUICE_DISPATCH_DTYPE={} cannot be honoured by recipe {} in {} mode ({}): {}",
           to_string(override_dtype), d.text, to_string(mode), layer_name, conflict);
    }
    recipe.wire = wire;
    recipe.gemm1_as_sent = d.gemm1_as_sent && wire == d.wire;
  }

  const bool needs_s1 = d.gemm1 == GemmInput::kStatic;
  const bool needs_s2 = d.gemm2 == GemmInput::kStatic;
  if (needs_s1 || needs_s2) {
    if (!scales) {
      fail(ErrorCode::kUnsupported,
           "recipe {} in {} mode needs static activation scales, but the checkpoint has no "
           "{}.*.input_scale (of w1, w2, w3, or of gate_proj, up_proj, down_proj); use direct or "
           "direct-bf16",
           d.text, to_string(mode), layer_name);
    }
    for (const auto& [field, value] :
         {std::pair{"s1 (w1, w3)", scales->s1}, {"s2 (w2)", scales->s2}}) {
      check_argument(std::isnormal(value) && value > 0,
                     "{}: static input scale {} = {} is not a positive normal number", layer_name,
                     field, value);
    }
    recipe.s1 = needs_s1 ? scales->s1 : 0;
    recipe.s2 = needs_s2 ? scales->s2 : 0;
    if (name == RecipeName::kPow2Static) recipe.s1 = ceil_pow2(recipe.s1);
  }
  return recipe;
}

std::string Recipe::describe() const {
  std::string gemm1_text = "as sent";
  if (!gemm1_as_sent) {
    gemm1_text = wire == WireFormat::kBf16       ? "quantized at the receiver, "
                 : wire == WireFormat::kE4m3Pow2 ? "exponent-shifted at the receiver, "
                                                 : "re-quantized at the receiver, ";
    gemm1_text += gemm1 == GemmInput::kGroup ? "per 128" : fmt::format("static s1 = {:.6g}", s1);
  }
  const std::string gemm2_text =
      gemm2 == GemmInput::kGroup ? "dynamic per 128" : fmt::format("static s2 = {:.6g}", s2);
  return fmt::format("{} ({}): wire {}; GEMM1 input {}; GEMM2 input {}", to_string(name),
                     to_string(mode), to_string(wire), gemm1_text, gemm2_text);
}

std::size_t wire_bytes_per_token(WireFormat wire, int hidden) noexcept {
  const auto elems = static_cast<std::size_t>(hidden);
  switch (wire) {
    case WireFormat::kBf16:
      return elems * 2;
    case WireFormat::kE4m3Group:
    case WireFormat::kE4m3Pow2:
      return elems + elems / kActivationGroup * sizeof(float);
    case WireFormat::kE4m3Static:
      return elems;
  }
  return 0;
}

}  // namespace sluice
