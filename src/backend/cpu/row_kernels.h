// row_kernels.h - element-wise work on one row: quantize, requantize, SwiGLU, digits.
//
// Each function picks the best instruction set of this machine at run time; all of them give the
// bytes of the scalar definitions in sluice/quant.h.
#pragma once

#include <cstdint>

#include "backend/cpu/digits.h"
#include "sluice/activation.h"

namespace sluice::cpu {

/// How the scale of a group is made; kToken: the whole row is one group.
enum class GroupScale { kAmax, kPow2, kToken };

/// x [width] bf16 -> codes [width], scale [width / 128], or [1] by kToken.
void quantize_row(const std::uint16_t* x, std::int64_t width, GroupScale kind, std::uint8_t* codes,
                  float* scale);
/// x [width] bf16 -> codes [width] with the static scale `s`.
void quantize_row_static(const std::uint16_t* x, std::int64_t width, float s, std::uint8_t* codes);
/// codes [width] with scale [width / 128] -> codes with the static scale `s1`.
void requantize_row(const std::uint8_t* codes, const float* scale, std::int64_t width, float s1,
                    std::uint8_t* out);

/// 128 channels: activate(fn, gate, up) in float32, quantized with a scale of its own (returned) if
/// `static_scale` is 0, else with `static_scale`.
float activate_quantize_group(const ActivationFn& fn, const float* gate, const float* up,
                              float static_scale, std::uint8_t* codes);

/// x [n] -> bf16; n a multiple of 16.
void round_to_bf16(const float* x, std::int64_t n, std::uint16_t* out);

}  // namespace sluice::cpu
