// What a synthetic checkpoint says of its numbers: quantization_config and hf_quant_config.json.
#include "synthetic/synthetic_families.h"
#include "synthetic/synthetic_formats.h"

namespace sluice {

using Json = nlohmann::ordered_json;

Json synthetic_quantization_config(const SyntheticCheckpoint& spec) {
  const int group = spec.geometry.group_size;
  switch (definition(spec).family) {
    case Family::kW4afp8:
      return {{"quant_method", "w4afp8"},
              {"group_size", group},
              {"activation_scheme", spec.with_input_scales ? "static" : "dynamic"}};
    case Family::kCompressedTensors:
    case Family::kKimi: {
      Json inputs = nullptr;
      if (definition(spec).family == Family::kCompressedTensors) {
        inputs = {{"num_bits", 8},
                  {"type", "float"},
                  {"symmetric", true},
                  {"strategy", spec.with_static_activations ? "tensor" : "token"},
                  {"dynamic", !spec.with_static_activations}};
      }
      const Json weights = {{"num_bits", 4},       {"type", "int"},       {"symmetric", true},
                            {"strategy", "group"}, {"group_size", group}, {"dynamic", false},
                            {"actorder", nullptr}};
      return {{"quant_method", "compressed-tensors"},
              {"format", "pack-quantized"},
              {"quantization_status", "compressed"},
              {"config_groups",
               {{"group_0",
                 {{"targets", {"Linear"}},
                  {"weights", weights},
                  {"input_activations", inputs},
                  {"output_activations", nullptr}}}}},
              {"kv_cache_scheme", nullptr},
              {"ignore", {"lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"}}};
    }
    case Family::kKimiMxfp4: {
      const Json weights = {{"num_bits", 4},       {"type", "float"},
                            {"symmetric", true},   {"strategy", "group"},
                            {"group_size", group}, {"dynamic", false},
                            {"actorder", nullptr}, {"scale_dtype", "torch.uint8"}};
      return {{"quant_method", "compressed-tensors"},
              {"format", "mxfp4-pack-quantized"},
              {"quantization_status", "compressed"},
              {"config_groups",
               {{"group_0",
                 {{"targets", {"Linear"}},
                  {"format", "mxfp4-pack-quantized"},
                  {"weights", weights},
                  {"input_activations", nullptr},
                  {"output_activations", nullptr}}}}},
              {"kv_cache_scheme", nullptr},
              {"ignore", {"lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"}}};
    }
    case Family::kDeepseekFp4:
      // Of the rest of the model; config.json says expert_dtype beside it.
      return {{"quant_method", "fp8"},
              {"fmt", "e4m3"},
              {"scale_fmt", "ue8m0"},
              {"weight_block_size", {128, 128}},
              {"activation_scheme", "dynamic"}};
    case Family::kGptOss:
      return {{"quant_method", "mxfp4"},
              {"modules_to_not_convert",
               {"model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                "lm_head"}}};
    case Family::kAngelslim:
      return {{"quant_method", "w4a8_awq"},
              {"kv_cache_quant_method", "fp8"},
              {"weight_group_size", group},
              {"activation_scheme", spec.with_input_scales ? "static" : "dynamic"},
              {"ignored_quantization_config", {{"quant_method", "fp8_block_scales"}}}};
    case Family::kFp8Block:
      return {{"quant_method", "fp8"},
              {"fmt", "e4m3"},
              {"weight_block_size", {128, 128}},
              {"activation_scheme", "dynamic"}};
    case Family::kModelopt:
    case Family::kBf16:
      return nullptr;
  }
  return nullptr;
}

Json synthetic_algo_config(const SyntheticCheckpoint& spec) {
  if (definition(spec).family != Family::kModelopt) return nullptr;
  return {{"producer", {{"name", "sluice make-checkpoint"}}},
          {"quantization",
           {{"quant_algo", "W4A8_AWQ"},
            {"kv_cache_quant_algo", nullptr},
            {"group_size", spec.geometry.group_size},
            {"has_zero_point", false},
            {"pre_quant_scale", spec.with_pre_quant_scale}}}};
}

}  // namespace sluice
