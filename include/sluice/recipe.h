// recipe.h - what is rounded where: the named recipes, and the one policy that picks a wire format.
//
//   recipe          on the wire              GEMM1 input                     GEMM2 input
//   direct          e4m3, f32 scale per 128  as sent                         e4m3, dynamic per 128
//   direct-bf16     bf16                     quantized at receiver, per 128  e4m3, dynamic per 128
//   bf16-static     bf16                     quantized at receiver, s1       e4m3, static s2
//   requant-static  e4m3, f32 scale per 128  re-quantized to s1              e4m3, static s2
//   static          e4m3, static s1          as sent                         e4m3, static s2
//   pow2-static     e4m3, 2^e scale per 128  exponent shift to 2^ceil(s1)    e4m3, static s2
//
// A recipe is chosen per layer and per mode and resolved when an engine is made. Nothing falls
// back.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace sluice {

enum class Mode {
  kLowLatency,  ///< Masked layout, fixed capacity, no host synchronization. Decode.
  kNormal,      ///< Contiguous rows by expert, each token sent once per destination rank. Prefill.
};

enum class RecipeName { kDirect, kDirectBf16, kBf16Static, kRequantStatic, kStatic, kPow2Static };

/// Bytes of one dispatched token.
enum class WireFormat {
  kBf16,        ///< hidden * 2 bytes.
  kE4m3Group,   ///< hidden bytes + hidden / 128 float32 scales.
  kE4m3Pow2,    ///< The same, every scale a power of two.
  kE4m3Static,  ///< hidden bytes; the scale s1 is known to every rank.
};

/// How a GEMM's e4m3 input is scaled.
enum class GemmInput { kGroup, kStatic };

/// SLUICE_DISPATCH_DTYPE.
enum class DispatchDtype { kAuto, kBf16, kFp8, kFp8Static };

/// Activation scales of one layer: the maximum over *all* experts of the layer, so that every rank
/// agrees and moving experts between ranks changes nothing.
struct StaticScales {
  float s1 = 0;  ///< GEMM1 input (gate and up).
  float s2 = 0;  ///< GEMM2 input (down).
};

/// A recipe made concrete for one layer and mode.
struct Recipe {
  RecipeName name = RecipeName::kDirect;
  Mode mode = Mode::kLowLatency;
  WireFormat wire = WireFormat::kE4m3Group;
  GemmInput gemm1 = GemmInput::kGroup;
  GemmInput gemm2 = GemmInput::kGroup;
  /// True if GEMM1 consumes the received bytes; false if the receiver (re-)quantizes them first.
  bool gemm1_as_sent = true;
  float s1 = 0;  ///< Scale of a static GEMM1 input or wire, already a power of two for pow2-static.
  float s2 = 0;  ///< Scale of a static GEMM2 input.

  /// One line, e.g. "direct (low-latency): wire e4m3+scale/128, GEMM1 as sent, GEMM2 e4m3/128".
  [[nodiscard]] std::string describe() const;
};

[[nodiscard]] const char* to_string(RecipeName name) noexcept;
[[nodiscard]] const char* to_string(Mode mode) noexcept;
[[nodiscard]] const char* to_string(WireFormat wire) noexcept;
[[nodiscard]] const char* to_string(DispatchDtype dtype) noexcept;

/// Every recipe, in the order of the table above.
[[nodiscard]] std::span<const RecipeName> all_recipes() noexcept;
/// Throws: kInvalidArgument, listing the names there are.
[[nodiscard]] RecipeName parse_recipe(std::string_view name);
[[nodiscard]] Mode parse_mode(std::string_view name);
[[nodiscard]] DispatchDtype parse_dispatch_dtype(std::string_view name);

/// The dispatch policy, in one place. `scales` is empty when the checkpoint has no static scales
/// for this layer. An override is honoured only if GEMM1 still sees the very bytes the recipe
/// promises. `layer_name` (e.g. "model.layers.3.mlp.experts") goes into messages.
/// Throws: kUnsupported naming recipe, mode, variable and reason; kInvalidArgument for a scale that
///   is not finite and positive.
[[nodiscard]] Recipe resolve_recipe(RecipeName name, Mode mode, DispatchDtype override_dtype,
                                    const std::optional<StaticScales>& scales,
                                    std::string_view layer_name);

/// Bytes one token occupies on the wire.
[[nodiscard]] std::size_t wire_bytes_per_token(WireFormat wire, int hidden) noexcept;

}  // namespace sluice
