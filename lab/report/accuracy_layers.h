// accuracy_layers.h - certificates of all layers of a checkpoint, side by side.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace sluice::report {

/// {"layers": [one certificate each], "budget": the worst layer's, "worst_layer", "passed"}.
[[nodiscard]] nlohmann::ordered_json join_layers(std::vector<nlohmann::ordered_json> layers);

/// A row per layer: error, headroom, clipping, verdicts; then what to do about scales that clip.
[[nodiscard]] std::string layers_text(const nlohmann::ordered_json& json);

/// The same table and, for each suite, the output error of every recipe over the layers, as HTML.
[[nodiscard]] std::string layers_section(const nlohmann::ordered_json& json);

/// The certificate that "worst_layer" names.
[[nodiscard]] const nlohmann::ordered_json& worst_layer(const nlohmann::ordered_json& json);

}  // namespace sluice::report
