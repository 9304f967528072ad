// recipe.h - what is rounded where, and the one policy that picks a wire format.
//
// A recipe is its three fields. They say which casts to e4m3 a token goes through:
//
//   sender    x [hidden] bf16      --sent_cast(wire)--> a row in the wire format
//   receiver  a row as it arrived  --gemm1------------> GEMM1's input
//             h [intermediate] f32 --gemm2------------> GEMM2's input
//
// The casts from x to GEMM1's input, sender's and receiver's, are the recipe's gemm1_casts(). Where
// two recipes have the same ones, GEMM1 reads the same bytes, whatever travels between the ranks.
//
// A name is a label of a row of this table, which src/quant/recipe.cc holds:
//
//   name            wire         gemm1        gemm2    in words
//   direct          kE4m3Group   kNone        kGroup   quantized once, by the sender
//   direct-bf16     kBf16        kGroup       kGroup   the same bytes, quantized by the receiver
//   bf16-static     kBf16        kStatic      kStatic  quantized by the receiver with s1
//   requant-static  kE4m3Group   kStatic      kStatic  rounded twice: per 128, then to s1
//   static          kE4m3Static  kNone        kStatic  quantized by the sender with s1
//   pow2-static     kE4m3Pow2    kStaticPow2  kStatic  exponents shifted to a power of two >= s1
//   direct-token    kE4m3Token   kNone        kGroup   quantized once, one scale per token
//
// A recipe is chosen per layer and per mode, and gets the layer's scales when the layer is added
// (LayerRecipe). Nothing falls back to another recipe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/error.h"
#include "sluice/quant.h"

namespace sluice {

enum class Mode {
  kLowLatency,  ///< Masked layout, fixed capacity, no host synchronization. Decode.
  kNormal,      ///< Contiguous rows by expert, each token sent once per destination rank. Prefill.
};

/// Bytes of one dispatched token.
enum class WireFormat {
  kBf16,        ///< hidden * 2 bytes.
  kE4m3Group,   ///< hidden bytes + hidden / 128 float32 scales.
  kE4m3Pow2,    ///< The same, every scale a power of two.
  kE4m3Static,  ///< hidden bytes; the scale s1 is known to every rank.
  kE4m3Token,   ///< hidden bytes + one float32 scale.
};

/// One rounding of a row to e4m3 codes, by the functions of quant.h.
enum class Cast : std::uint8_t {
  kNone,        ///< The row stays as it is.
  kGroup,       ///< A float32 scale for each group of 128 channels: quantize_group().
  kGroupPow2,   ///< The same, every scale a power of two: quantize_group_pow2().
  kStatic,      ///< The layer's static scale: quantize_static(), requantize().
  kStaticPow2,  ///< The same with the static scale rounded up to a power of two.
  kToken,       ///< A float32 scale for all channels of the row: quantize_group() of the row.
};

/// What the sender of a row in `wire` format does to x. A wire carries one cast at most.
[[nodiscard]] Cast sent_cast(WireFormat wire);
/// Whether the cast gives a row one scale per 128 channels of its own (kGroup, kGroupPow2).
[[nodiscard]] bool has_group_scales(Cast cast);
/// float32 scales that a row of `width` channels has of its own after the cast: one for each 128
/// channels, one (kToken), or 0 where the scale is the layer's or there is none.
[[nodiscard]] std::int64_t scales_per_row(Cast cast, std::int64_t width);
/// Whether the cast uses a static scale of the layer (kStatic, kStaticPow2).
[[nodiscard]] bool has_static_scale(Cast cast);

/// Asks for another wire format than the recipe's: what SLUICE_DISPATCH_DTYPE may say.
enum class DispatchDtype { kAuto, kBf16, kFp8, kFp8Static };

/// Which casts a token goes through. The default is `direct`.
struct Recipe {
  WireFormat wire = WireFormat::kE4m3Group;
  Cast gemm1 = Cast::kNone;   ///< The receiver's, before GEMM1. kNone: GEMM1 reads what was sent.
  Cast gemm2 = Cast::kGroup;  ///< Of h, before GEMM2.
  friend bool operator==(const Recipe&, const Recipe&) = default;
};

/// A row of the table of names.
struct NamedRecipe {
  const char* name;
  Recipe recipe;
};

/// Activation scales of one layer: the maximum over *all* experts of the layer, so that every rank
/// agrees and moving experts between ranks changes nothing.
struct StaticScales {
  float s1 = 0;  ///< GEMM1 input (gate and up).
  float s2 = 0;  ///< GEMM2 input (down).
};

/// A recipe with the static scales of one layer, for one mode.
struct LayerRecipe : Recipe {
  Mode mode = Mode::kLowLatency;
  float s1 = 0;  ///< Static scale of the wire or of GEMM1's input; a power of two if its cast is.
  float s2 = 0;  ///< Static scale of GEMM2's input; a power of two if its cast is.
  friend bool operator==(const LayerRecipe&, const LayerRecipe&) = default;

  /// One line, e.g. "direct (low-latency): wire e4m3 + f32 scale per 128; GEMM1 input as sent; ..."
  [[nodiscard]] std::string describe() const;
  /// What dispatch() is given: s1 if the wire has that scale, else 0.
  [[nodiscard]] float wire_static_scale() const {
    return has_static_scale(sent_cast(wire)) ? s1 : 0.0f;
  }
};

/// Every recipe that has a name, in the order of the table above.
[[nodiscard]] std::span<const NamedRecipe> named_recipes() noexcept;
/// Throws: kInvalidArgument, listing the names there are.
[[nodiscard]] Recipe parse_recipe(std::string_view name);
/// Its name, or its fields where the table has no such row.
[[nodiscard]] std::string to_string(const Recipe& recipe);

[[nodiscard]] const char* to_string(Mode mode) noexcept;
[[nodiscard]] const char* to_string(WireFormat wire) noexcept;
[[nodiscard]] const char* to_string(Cast cast) noexcept;
[[nodiscard]] const char* to_string(DispatchDtype dtype) noexcept;
/// Each throws kInvalidArgument, listing what there is.
[[nodiscard]] Mode parse_mode(std::string_view name);
[[nodiscard]] WireFormat parse_wire_format(std::string_view name);
[[nodiscard]] Cast parse_cast(std::string_view name);
[[nodiscard]] DispatchDtype parse_dispatch_dtype(std::string_view name);

/// The casts from x to GEMM1's input in their order, kNone left out. Two recipes give GEMM1 the
/// same bytes if these are equal (and the static scales, where one is used).
[[nodiscard]] std::vector<Cast> gemm1_casts(const Recipe& recipe);
/// The recipe that sends `wire` and gives both GEMMs the bytes that `recipe` gives them; empty if
/// there is none. A receiver does one cast at most, and cannot undo the sender's.
[[nodiscard]] std::optional<Recipe> with_wire(const Recipe& recipe, WireFormat wire);
/// A recipe with another wire and the same bytes for both GEMMs, to prove one by the other; empty
/// if there is none (a recipe that rounds twice has none).
[[nodiscard]] std::optional<Recipe> twin(const Recipe& recipe);

/// Throws: kUnsupported naming the fields, for a combination that no backend computes:
///   - GEMM1 would read bf16 (a bf16 wire and no cast);
///   - a cast of e4m3 rows by the receiver other than from group scales to a static scale;
///   - a GEMM2 cast other than kGroup, kStatic and kStaticPow2.
void check_recipe(const Recipe& recipe);

/// The dispatch policy, in one place. `scales` is empty when the checkpoint has no static scales
/// for this layer. An override is honoured only if with_wire() says that GEMM1 still sees the very
/// bytes the recipe promises, and never where the recipe itself sends bf16: whoever chose such a
/// recipe asked for rows that are not rounded before they travel. `layer_name` (e.g.
/// "model.layers.3.mlp.experts") goes into messages.
/// Throws: kUnsupported naming recipe, mode, variable and reason; kInvalidArgument for a scale that
///   is not positive, normal and below 2^118; whatever check_recipe() throws.
[[nodiscard]] LayerRecipe resolve_recipe(const Recipe& recipe, Mode mode,
                                         DispatchDtype override_dtype,
                                         const std::optional<StaticScales>& scales,
                                         std::string_view layer_name);

/// Bytes of one token's elements on the wire.
[[nodiscard]] constexpr std::size_t wire_payload_bytes(WireFormat wire, int hidden) {
  const auto elems = static_cast<std::size_t>(hidden);
  switch (wire) {
    case WireFormat::kBf16:
      return elems * 2;
    case WireFormat::kE4m3Group:
    case WireFormat::kE4m3Pow2:
    case WireFormat::kE4m3Static:
    case WireFormat::kE4m3Token:
      return elems;
  }
  throw Error(ErrorCode::kInternal, "wire_payload_bytes: no such wire format");
}

/// Bytes of the scales that travel with them: one float32 for each kActivationGroup channels, one
/// for the token, or none.
[[nodiscard]] constexpr std::size_t wire_scale_bytes(WireFormat wire, int hidden) {
  switch (wire) {
    case WireFormat::kBf16:
    case WireFormat::kE4m3Static:
      return 0;
    case WireFormat::kE4m3Group:
    case WireFormat::kE4m3Pow2:
      return static_cast<std::size_t>(hidden) / kActivationGroup * sizeof(float);
    case WireFormat::kE4m3Token:
      return sizeof(float);
  }
  throw Error(ErrorCode::kInternal, "wire_scale_bytes: no such wire format");
}

/// Bytes one token occupies on the wire.
[[nodiscard]] constexpr std::size_t wire_bytes_per_token(WireFormat wire, int hidden) {
  return wire_payload_bytes(wire, hidden) + wire_scale_bytes(wire, hidden);
}

}  // namespace sluice
