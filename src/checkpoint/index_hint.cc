// What a message says is there where experts are not.
#include <string>

#include "checkpoint/tensor_index.h"
#include "checkpoint/weight_map.h"
#include "core/fail.h"

namespace sluice {

std::string TensorIndex::hint(int layer) const {
  if (has_empty_map) {
    return fmt::format(
        "; the weight_map of {} is empty, so no tensor counts; without the file, all of them would",
        kIndexFile);
  }
  if (!fused.empty()) {
    const auto own = fused.find(layer);
    const std::string& name = (own == fused.end() ? fused.begin() : own)->second;
    if (is_bias(name)) {
      return fmt::format("; {} holds the biases of all experts, which are not supported", name);
    }
    return fmt::format(
        "; {} holds the weights of all experts in one tensor, which is not supported: the file "
        "does not say whether gate or up comes first in it; export the experts one by one "
        "(...experts.E.gate_proj, up_proj, down_proj)",
        name);
  }
  if (unread.empty() && !left_out.empty()) {
    return fmt::format("; {} has {}, but {} does not name it", left_out.begin()->second,
                       left_out.begin()->first, kIndexFile);
  }
  std::string text;
  for (const std::string& name : unread) text += (text.empty() ? "" : ", ") + name;
  if (!text.empty()) return "; names that look like experts' and are not known: " + text;
  return "; no tensor's name has '.experts.' in it";
}

}  // namespace sluice
