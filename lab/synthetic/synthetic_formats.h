// synthetic_formats.h - what one synthetic expert looks like in each published layout.
//
// Written element by element from the values, after docs/checkpoint-formats.md, and without
// a line in common with the readers in formats/: each is the other's test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "synthetic/random_weights.h"

namespace sluice {

/// One tensor of an expert.
struct SyntheticTensor {
  enum class Content {
    kNibblesAlongK,  ///< Two's complement, even k low.
    kNibblesAlongN,  ///< Two's complement, even n low.
    kWords,          ///< q + 8, eight to an int32, lowest bits first.
    kScales,
    kShape,
    kSecondScale,  ///< amax / 448 of the INT4 weights.
    kInputScale,
    kPreQuantScale,  ///< AWQ's factor of each input channel.
    kMxfp4Codes,
    kMxfp4Scales,
    kBias,
    kFusedCodes,  ///< gpt-oss: rows of gate and up in turn (matrix 0), or of down (2).
    kFusedScales,
    kFusedBias,
    kFp8Codes,  ///< Blocks of 128 x 128.
    kFp8Scales,
    kBf16,
  };
  std::string part;  ///< "gate_proj.weight_packed"
  std::string dtype;
  std::vector<std::uint64_t> shape;
  Content content = Content::kScales;
  std::size_t matrix = 0;  ///< gate, up, down
};

/// Names that SyntheticCheckpoint::format may have.
[[nodiscard]] std::vector<std::string> synthetic_format_names();

/// Throws: kInvalidArgument for a format, group size or scale dtype that is not published.
void check_synthetic_format(const SyntheticCheckpoint& spec);

/// True if input scales are calibrated and written, in shards or in act_scales.safetensors.
[[nodiscard]] bool has_input_scales(const SyntheticCheckpoint& spec);

/// True if a tensor is of all experts of a layer, [E, ..], one part after the other.
[[nodiscard]] bool is_fused(const SyntheticCheckpoint& spec);

/// Of one expert, in the order they are written; w4afp8's input scales have a file of their own.
[[nodiscard]] std::vector<SyntheticTensor> synthetic_tensors(const SyntheticCheckpoint& spec);

/// `inputs` is looked at for kInputScale only.
[[nodiscard]] std::vector<std::byte> synthetic_bytes(const SyntheticTensor& tensor,
                                                     const SyntheticCheckpoint& spec,
                                                     const SyntheticExpert& expert,
                                                     const InputScales& inputs);

/// config.json's quantization_config, or null.
[[nodiscard]] nlohmann::ordered_json synthetic_quantization_config(const SyntheticCheckpoint& spec);
/// hf_quant_config.json, or null.
[[nodiscard]] nlohmann::ordered_json synthetic_algo_config(const SyntheticCheckpoint& spec);

}  // namespace sluice
