// synthetic_spelling.h - whose names the tensors and the keys of config.json have.
//
//   language_model.model.layers.3 .block_sparse_moe.experts. 17 . w1 .weight_packed
//   `------- prefix -----------'  `----- container -------'       stem
//
// Written after docs/checkpoints.md and the models' published files, and without a line in common
// with the readers: each is the other's test.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "sluice/lab/synthetic.h"

namespace sluice {

/// Throws: kInvalidArgument for a spelling that is not known.
void check_synthetic_spelling(const SyntheticCheckpoint& spec);

/// `part` as "gate_proj.weight" or "w1.input_scale".
[[nodiscard]] std::string synthetic_tensor_name(const SyntheticCheckpoint& spec, int layer,
                                                int expert, const std::string& part);

/// config.json, with the format's quantization_config.
[[nodiscard]] nlohmann::ordered_json synthetic_model_config(const SyntheticCheckpoint& spec);

}  // namespace sluice
