// split.h - how many CTAs an operation of the CUDA exchange takes, and what each of them has.
//
// Pure host functions, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sluice/quant.h"
#include "sluice/recipe.h"

namespace sluice {

struct DispatchSplit {
  int num_ctas = 1;
  int parts = 1;         ///< CTAs that share a token; if more than one, each has one token.
  int chunk_tokens = 1;  ///< That a CTA stages together.
};

/// `max_ctas`: this rank's share of its device's SMs.
[[nodiscard]] inline DispatchSplit split_dispatch(std::int64_t num_tokens, int hidden,
                                                  WireFormat wire, int max_ctas) {
  DispatchSplit split;
  if (num_tokens == 0) return split;
  // One SM takes over a microsecond to quantize a token and send eight rows. Where there are SMs to
  // spare they share it, in whole groups. A scale of the whole token needs all of it in one place.
  constexpr std::int64_t kMostParts = 8;
  const std::int64_t groups = hidden / kActivationGroup;
  if (wire != WireFormat::kE4m3Token) {
    split.parts = static_cast<int>(
        std::clamp<std::int64_t>(max_ctas / num_tokens, 1, std::min(kMostParts, groups)));
  }
  split.num_ctas = static_cast<int>(std::min<std::int64_t>(num_tokens * split.parts, max_ctas));
  // Rows of the first chunk leave while the next is quantized. More than four tokens gain nothing.
  split.chunk_tokens =
      static_cast<int>(std::clamp<std::int64_t>(num_tokens / split.num_ctas / 4, 1, 4));
  return split;
}

/// A CTA for each token; fewer than 16 tokens are split, 2 kB of y for each CTA.
[[nodiscard]] inline int ctas_of_combine(std::int64_t num_tokens, int hidden, int max_ctas) {
  constexpr std::int64_t kEnough = 16;
  const std::int64_t parts = std::min(kEnough, num_tokens * hidden / 1024);
  return static_cast<int>(std::clamp<std::int64_t>(std::max(num_tokens, parts), 1, max_ctas));
}

}  // namespace sluice
