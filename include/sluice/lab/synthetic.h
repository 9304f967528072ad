// synthetic.h - checkpoints and tokens that look like a model's, made from a seed.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/tensor.h"

namespace sluice {

/// Names that SyntheticCheckpoint::format may have.
[[nodiscard]] std::vector<std::string> synthetic_format_names();

/// Writes a synthetic checkpoint in a published layout, with realistic statistics.
struct SyntheticCheckpoint {
  ModelGeometry geometry;
  /// "w4afp8", "compressed-tensors", "kimi-int4" (compressed-tensors in groups of 32, without an
  /// activation scheme), "kimi-mxfp4" (compressed-tensors of MXFP4), "deepseek-fp4" (MXFP4 as
  /// DeepSeek-V4 has it), "gpt-oss" (MXFP4 with biases, fused by layer), "angelslim",
  /// "modelopt-w4a8-awq", "fp8-block" or "bf16".
  std::string format = "w4afp8";
  /// Whose names tensors and keys of config.json have: synthetic_spelling_names().
  std::string spelling = "deepseek";
  int first_layer = 3;  ///< DeepSeek-V3's first MoE layer; DeepSeek-V4 has them from layer 0.
  int num_layers = 1;
  std::uint64_t seed = 1;
  DType scale_dtype = DType::kFloat32;   ///< Or kBFloat16; kFloat8E8M0 of MXFP4.
  bool with_input_scales = true;         ///< In formats that are published with them.
  bool with_unit_input_scales = false;   ///< All 1.0 instead of calibrated, as GLM-5's.
  bool with_static_activations = false;  ///< compressed-tensors: static e4m3 input scales.
  bool with_pre_quant_scale = false;     ///< modelopt-w4a8-awq: AWQ's factor of each input channel.
  std::size_t max_shard_bytes = std::size_t{1} << 30;
};

/// "deepseek", "glm-5", "deepseek-v4", "kimi-k2.5", "kimi-k3", "qwen3", "qwen3.8", "gpt-oss":
/// docs/converting.md.
[[nodiscard]] std::vector<std::string> synthetic_spelling_names();

/// Geometry, layout and spelling that a preset's model is published with: in INT4, but for gpt-oss
/// and presets whose name ends in "-mxfp4". Without it, models that are published in MXFP4
/// (DeepSeek-V4, Kimi-K3) get an INT4 layout that repacks of theirs have.
/// Throws: as preset_geometry().
[[nodiscard]] SyntheticCheckpoint synthetic_preset(const std::string& preset);

/// Which tokens synthetic_activations() makes.
struct SyntheticTokens {
  std::uint64_t seed = 1;        ///< SyntheticCheckpoint::seed: fixes the channels' gains.
  int layer = 3;                 ///< Gains differ from layer to layer.
  std::uint64_t token_seed = 1;  ///< The stream of tokens.
  std::int64_t first_token = 0;  ///< Position in the stream, so that ranks can take their own part.
};

/// Inputs of a MoE layer as models have them after RMSNorm: normal values times heavy-tailed
/// channel gains (log-normal, and one channel in 512 at 10 to 50 times that); one token in 128 (the
/// first among them) has a massive activation in one of three fixed channels. The checkpoint's
/// input scales are calibrated on such tokens. Depends on nothing but the arguments. x:
/// [num_tokens, hidden] bf16.   Throws: kInvalidArgument.
void synthetic_activations(const SyntheticTokens& tokens, MutableTensorView x);

/// Throws: kInvalidArgument, kIo; refuses a directory that already holds a checkpoint.
void write_synthetic_checkpoint(const SyntheticCheckpoint& spec, const std::filesystem::path& dir,
                                const Progress& progress = {});

}  // namespace sluice
