// second_scale.h - the per-tensor FP8 scale that two-level quantizers store beside their INT4 one.
//
// They round twice: w -> q * s (INT4, per group), then q * s -> e4m3(q * s / s2) * s2, where
// s2 = amax / 448. Codes and s alone give the INT4 weights; s2 says how an FP8 GEMM may hold them.
// Were s stored relative to s2, as FP4 formats do it, q * s would reach 448 instead of 448 * s2.
#pragma once

#include "checkpoint/tensor_index.h"
#include "sluice/tensor.h"

namespace sluice {

/// `scales` are those of `scale`. Throws: kCorruptFile, and kUnsupported if the weights that they
/// give do not fit under 448 * s2.
void check_second_scale(const TensorRef& second, const TensorRef& scale, const TensorView& scales);

}  // namespace sluice
