// row_cast.h - what each Cast of a recipe does to a row, by the scalar formats of quant.h.
//
// A chain of casts is one cast after the other of the values that the one before left: that is what
// requantize() does to codes, and the two give the same bytes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sluice/recipe.h"

namespace sluice {

/// A row of e4m3 codes with its scales: one for each 128 channels, or a single one for all.
struct CastRow {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;

  [[nodiscard]] float scale_of(std::size_t channel) const {
    return scales.size() == 1 ? scales[0] : scales[channel / kActivationGroup];
  }
  /// Code times scale, in float32.
  [[nodiscard]] std::vector<float> values() const;
};

/// `values` rounded by `cast`. `static_scale` is the layer's, as resolve_recipe() gives it.
/// Requires: for a cast with group scales, a multiple of kActivationGroup values. cast != kNone.
[[nodiscard]] CastRow cast_row(Cast cast, std::span<const float> values, float static_scale);

}  // namespace sluice
