// activation.h - the activation function of an expert, as a value.
//
//   h[i] = activate(fn, gate[i], up[i])     in float32, from GEMM1's sums, before h is quantized
//
// A function is its kind and the kind's parameters. SwiGLU, the only kind there is, has none. The
// value is part of a layer's geometry: checkpoint, reference, backends, the agreement between ranks
// and Python read it from there. A switch over kinds has no default, so that the compiler names
// those that lack a new one; docs/adding-a-format.md lists what else must answer for it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace sluice {

enum class ActivationKind : std::uint8_t {
  kSwiglu,  ///< gate / (1 + exp(-gate)) * up
};

struct ActivationFn {
  ActivationKind kind = ActivationKind::kSwiglu;
  friend bool operator==(const ActivationFn&, const ActivationFn&) = default;
};

/// "swiglu".
[[nodiscard]] std::string to_string(const ActivationFn& fn);
/// Throws: kUnsupported naming what there is.
[[nodiscard]] ActivationFn parse_activation(std::string_view name);

/// The definition, in float32. Backends agree to a few ulp, not to the bit: exp() differs.
[[nodiscard]] float activate(const ActivationFn& fn, float gate, float up);

}  // namespace sluice
