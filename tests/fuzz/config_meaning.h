// config_meaning.h - a second reading of a checkpoint's JSON files, written after
// docs/checkpoints.md and without a line in common with the readers. It says what a text means, not
// whether it is accepted.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "checkpoint/formats/format.h"
#include "checkpoint/model_config.h"
#include "checkpoint/weight_map.h"

namespace sluice::fuzz {

struct Texts {
  std::string config, algo, index;  ///< `algo`, hf_quant_config.json, is empty if there is none.
};

/// Checkpoints that the fuzz target has run so far, by what the readers said.
struct Tally {
  std::uint64_t accepted = 0, refused = 0;
};
[[nodiscard]] const Tally& tally() noexcept;

/// True if config.json says of sizes, factor, layers, activation and of keys that must be off what
/// the reader made of it.
[[nodiscard]] bool means_the_same(const Texts& texts, const ModelConfig& config);

/// True if the files declare this format, with these groups.
[[nodiscard]] bool is_declared(const Texts& texts, const Format& format);

/// True if config.json or hf_quant_config.json is not a JSON object. Only then is one of them
/// corrupt, unless a key occurs twice in it, which this reader does not see.
[[nodiscard]] bool may_be_corrupt(const Texts& texts);

/// True if every tensor is in the file that the index says, and there is no other.
[[nodiscard]] bool means_the_same(const Texts& texts, const WeightMap& map);

}  // namespace sluice::fuzz
