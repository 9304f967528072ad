// activation.h - the activation function of an expert, as a value.
//
//   h[i] = activate(fn, gate[i], up[i])     in float32, from GEMM1's sums, before h is quantized
//
// A function is its kind and the kind's parameters. With L the limit, s(x) = 1 / (1 + exp(-x)):
//
//   kind         g                u                    h
//   kSwiglu      gate             up                   g s(g) u
//   kSwigluLimit min(gate, L)     clamp(up, -L, L)     g s(g) u               DeepSeek-V4
//   kSwigluOai   min(gate, L)     clamp(up, -L, L)     g s(alpha g) (u + 1)   gpt-oss
//   kSitu        gate             up                   b tanh(g / b) s(g) lb tanh(u / lb)   Kimi-K3
//
// The value is part of a layer's geometry: checkpoint, reference, backends, the agreement between
// ranks and Python read it from there. A switch over kinds has no default, so that the compiler
// names those that lack a new one; docs/adding-a-format.md lists what else must answer for it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace sluice {

enum class ActivationKind : std::uint8_t {
  kSwiglu,
  kSwigluLimit,  ///< Parameter: limit.
  kSwigluOai,    ///< Parameters: alpha, limit.
  kSitu,         ///< Parameters: beta (b), linear_beta (lb).
};

/// Parameters are finite and above 0 in the kinds that have them, and 0 in the others.
struct ActivationFn {
  ActivationKind kind = ActivationKind::kSwiglu;
  float limit = 0;
  float alpha = 0;
  float beta = 0;         ///< Of the gate.
  float linear_beta = 0;  ///< Of up.
  friend bool operator==(const ActivationFn&, const ActivationFn&) = default;
};

/// Throws: kInvalidArgument naming the parameter, its value and what it must be; kInternal for a
/// kind that does not exist.
void check_activation(const ActivationFn& fn);

/// "swiglu", "swiglu:limit=10", "swiglu-oai:alpha=1.702,limit=7", "situ:beta=4,linear_beta=25".
/// Each parameter has as many digits as tell it from every other float32, so equal texts are equal
/// functions.
[[nodiscard]] std::string to_string(const ActivationFn& fn);
/// Reads what to_string() writes, parameters in any order. Throws: kUnsupported naming what there
/// is; kInvalidArgument for a parameter that is missing, not known, no number or out of range.
[[nodiscard]] ActivationFn parse_activation(std::string_view text);

/// The definition, in float32. A NaN in gate or up gives NaN: limits do not remove it. So does a
/// gate of minus infinity where s(g) multiplies g itself. Backends agree to a few ulp, not to the
/// bit: exp() and tanh() differ.
[[nodiscard]] float activate(const ActivationFn& fn, float gate, float up);

}  // namespace sluice
