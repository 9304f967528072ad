// quantization_keys.h - keys of quantization_config and hf_quant_config.json that no reader takes.
//
//   key --check_quantization_keys()--> changes nothing here      : passed over
//                                      has one value that is read : refused with any other
//                                      sounds like the weights'   : refused unless it is off
//                                      any other                  : named in a warning
//
// As config_keys.h does it for config.json: the lists hold exact names, so that a key that changes
// what weights mean does not pass because it looks like one that does not.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/formats/format.h"

namespace sluice {

/// Looks at the keys of the whole, and of `experts`, the entry of config_groups that is theirs, or
/// null. Returns those that are not known, as "config_groups.group_0.weights.KEY".
/// Throws: kUnsupported naming file, key and value.
[[nodiscard]] std::vector<std::string> check_quantization_keys(const QuantizationConfig& config,
                                                               const QuantizationGroup* experts,
                                                               const Format& format);

}  // namespace sluice
