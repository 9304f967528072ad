// accuracy_html.h - what the parts of the accuracy report share.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace sluice::report {

/// "#rrggbb" of a recipe, the same in every plot.
[[nodiscard]] const char* color_of(const std::string& recipe);
/// Recipes with their colours.
[[nodiscard]] std::string recipe_key(const std::vector<std::string>& recipes);
/// A value as text that may stand between tags.
[[nodiscard]] std::string text_of(const nlohmann::ordered_json& value);
/// A ratio as per cent; "-" for what is no number.
[[nodiscard]] std::string percent(const nlohmann::ordered_json& value);
/// The recipe's entry of a suite, or null where it was refused.
[[nodiscard]] const nlohmann::ordered_json& recipe_of(const nlohmann::ordered_json& suite,
                                                      const std::string& name);

}  // namespace sluice::report
