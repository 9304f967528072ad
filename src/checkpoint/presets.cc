#include <array>

#include "core/fail.h"
#include "sluice/checkpoint.h"

namespace sluice {
namespace {

struct Preset {
  const char* name;
  int num_experts, num_topk, hidden, intermediate;
  float routed_scaling_factor;
  int group_size = 128;
  ActivationFn activation = {};
  WeightFormat weight_format = WeightFormat::kInt4;
  bool has_bias = false;
};

constexpr ActivationFn kV4Activation = {.kind = ActivationKind::kSwigluLimit, .limit = 10};
constexpr ActivationFn kK3Activation = {
    .kind = ActivationKind::kSitu, .beta = 4, .linear_beta = 25};

constexpr ActivationFn kGptOssActivation = {
    .kind = ActivationKind::kSwigluOai, .limit = 7, .alpha = 1.702f};

/// Sizes as TensorRT-LLM's tests/microbenchmarks/bench_moe/specs.py has them. Kimi-K2's own INT4
/// has groups of 32 (kimi-k2-int4, kimi-k2.5); `kimi-k2` is a repack in groups of 128. `hidden` is
/// what the experts see: Kimi-K3's model is twice as wide. GLM-5 has GLM-4.5's factor; the factors
/// of DeepSeek-V4, Kimi-K3 and Qwen3.8 have no source here and are 1. gpt-oss is MXFP4, and so are
/// presets with "-mxfp4"; the others are INT4.
constexpr std::array kPresets = {
    Preset{"tiny", 8, 2, 256, 128, 2.5f},
    Preset{"r1-slice", 32, 8, 7168, 2048, 2.5f},
    Preset{"r1-layer", 256, 8, 7168, 2048, 2.5f},
    Preset{"kimi-k2", 384, 8, 7168, 2048, 2.827f},
    Preset{"kimi-k2-int4", 384, 8, 7168, 2048, 2.827f, 32},
    Preset{"kimi-k2.5", 384, 8, 7168, 2048, 2.827f, 32},
    Preset{"kimi-k3", 896, 16, 3584, 3072, 1.0f, 32, kK3Activation},
    Preset{"kimi-k3-mxfp4", 896, 16, 3584, 3072, 1.0f, 32, kK3Activation, WeightFormat::kMxfp4},
    Preset{"glm-5", 256, 8, 6144, 2048, 2.5f},
    Preset{"deepseek-v4-flash", 256, 6, 4096, 2048, 1.0f, 128, kV4Activation},
    Preset{"deepseek-v4-pro", 384, 6, 7168, 3072, 1.0f, 128, kV4Activation},
    Preset{"deepseek-v4-flash-mxfp4", 256, 6, 4096, 2048, 1.0f, 32, kV4Activation,
           WeightFormat::kMxfp4},
    Preset{"deepseek-v4-pro-mxfp4", 384, 6, 7168, 3072, 1.0f, 32, kV4Activation,
           WeightFormat::kMxfp4},
    Preset{"qwen3.8", 512, 10, 8192, 2048, 1.0f},
    Preset{"qwen3-235b", 128, 8, 4096, 1536, 1.0f},
    Preset{"qwen3-30b", 128, 8, 2048, 768, 1.0f},
    Preset{"gpt-oss-120b", 128, 4, 2880, 2880, 1.0f, 32, kGptOssActivation, WeightFormat::kMxfp4,
           true},
    Preset{"gpt-oss-20b", 32, 4, 2880, 2880, 1.0f, 32, kGptOssActivation, WeightFormat::kMxfp4,
           true},
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
      ModelGeometry geometry{.name = name,
                             .num_experts = p.num_experts,
                             .num_topk = p.num_topk,
                             .group_size = p.group_size,
                             .routed_scaling_factor = p.routed_scaling_factor,
                             .weight_format = p.weight_format,
                             .activation = p.activation,
                             .has_bias = p.has_bias};
      geometry.set_widths(p.hidden, p.intermediate);
      return geometry;
    }
    known += std::string(known.empty() ? "" : ", ") + p.name;
  }
  fail(ErrorCode::kInvalidArgument, "preset '{}' is none of: {}", name, known);
}

}  // namespace sluice
