#include <array>

#include "core/fail.h"
#include "sluice/checkpoint.h"

namespace sluice {
namespace {

struct Preset {
  const char* name;
  int num_experts, num_topk, hidden, intermediate;
  float routed_scaling_factor;
};

/// Group 128 throughout, because w4afp8 knows no other; Kimi-K2's own INT4 has groups of 32.
constexpr std::array kPresets = {
    Preset{"tiny", 8, 2, 256, 128, 2.5f},           Preset{"r1-slice", 32, 8, 7168, 2048, 2.5f},
    Preset{"r1-layer", 256, 8, 7168, 2048, 2.5f},   Preset{"kimi-k2", 384, 8, 7168, 2048, 2.827f},
    Preset{"qwen3-235b", 128, 8, 4096, 1536, 1.0f}, Preset{"qwen3-30b", 128, 8, 2048, 768, 1.0f},
};

}  // namespace

std::vector<std::string> preset_names() {
  std::vector<std::string> names;
  for (const Preset& p : kPresets) names.emplace_back(p.name);
  return names;
}

ModelGeometry preset_geometry(const std::string& name) {
  std::string known;
  for (const Preset& p : kPresets) {
    if (name == p.name) {
      return {.name = name,
              .num_experts = p.num_experts,
              .num_topk = p.num_topk,
              .hidden = p.hidden,
              .intermediate = p.intermediate,
              .group_size = 128,
              .routed_scaling_factor = p.routed_scaling_factor};
    }
    known += std::string(known.empty() ? "" : ", ") + p.name;
  }
  fail(ErrorCode::kInvalidArgument, "preset '{}' is none of: {}", name, known);
}

}  // namespace sluice
