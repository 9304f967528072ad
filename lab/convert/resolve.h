// resolve.h - what a conversion makes, from what was asked for and what the source has. Everything
// that headers and configs can show to be impossible is refused here.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checkpoint/checkpoint_impl.h"
#include "convert/quantize_weights.h"
#include "convert/target_format.h"
#include "sluice/lab/convert.h"

namespace sluice {

struct ResolvedConversion {
  std::vector<int> layers;                ///< Ascending.
  int first_expert = 0, num_experts = 0;  ///< Of this run.
  TargetSpec spec;
  std::optional<QuantizeRule> rule;  ///< Of what is quantized, and then not kept.
  std::string requantized_because;   ///< Of INT4 sources that are; else empty.
};

/// Throws: as convert_checkpoint().
[[nodiscard]] ResolvedConversion resolve_conversion(const ConvertOptions& options,
                                                    const CheckpointData& source,
                                                    const TargetFormat& target);

}  // namespace sluice
