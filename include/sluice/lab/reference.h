// reference.h - the layer in float64 from the checkpoint's own numbers, and element-wise error
// bounds.
//
// The oracle of every backend: it walks the casts of the recipe with the scalar formats of
// src/quant, and shares nothing else with them.
//
// Because GEMM2's input is quantized, a last-bit difference in h can flip one e4m3 code. The
// reference therefore carries an interval: with |h - h_ref| <= delta (what float32 accumulation may
// do), it finds every value the quantized element may take and adds |w2| * (largest deviation) to
// the bound.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sluice/backend.h"
#include "sluice/checkpoint.h"
#include "sluice/exchange.h"
#include "sluice/recipe.h"
#include "sluice/tensor.h"

namespace sluice {

/// y and its admissible error, one token.
struct ReferenceRow {
  std::vector<double> y;      ///< [hidden]
  std::vector<double> bound;  ///< [hidden] largest |y_backend - y| that is still correct.
};

/// Computes one token's output exactly as `recipe` defines it.
/// x: [hidden] bf16 bits. topk_idx: global expert indices, -1 = empty. `experts` must hold every
/// expert named (first_expert 0 .. num_experts of the layer).
class LayerReference {
 public:
  LayerReference(ExpertWeights experts, LayerRecipe recipe, float routed_scaling_factor,
                 ErrorModel model = {});
  [[nodiscard]] ReferenceRow row(const std::uint16_t* x, const std::int32_t* topk_idx,
                                 const float* topk_weights, int num_topk) const;

 private:
  ExpertWeights experts_;
  LayerRecipe recipe_;
  float routed_scaling_factor_;
  ErrorModel model_;
};

/// The outcome of comparing rows with the reference.
struct VerifyReport {
  std::int64_t num_rows = 0, num_elements = 0, num_wrong = 0;
  double worst_ratio = 0;  ///< max |error| / bound; <= 1 passes.
  std::int64_t worst_token = -1, worst_element = -1;
  double worst_expected = 0, worst_actual = 0, worst_bound = 0;
  double relative_l2 =
      0;  ///< ||y - ref|| / ||ref|| over the rows compared. For people; not the gate.
  double sum_squares = 0;  ///< ||ref||^2
  [[nodiscard]] bool passed() const noexcept { return num_rows > 0 && num_wrong == 0; }
};

/// Adds one row to `report`. NaN and infinity never pass unless the reference has them too.
void compare_row(const ReferenceRow& reference, const std::uint16_t* y, std::int64_t token,
                 VerifyReport& report);

}  // namespace sluice
