#include "report/accuracy_html.h"

#include <fmt/core.h>

#include <map>

#include "report/svg_plot.h"

namespace sluice::report {

const char* color_of(const std::string& recipe) {
  static const std::map<std::string, const char*> colors = {
      {"direct", "#1668dc"},         {"direct-bf16", "#8fc1ff"}, {"bf16-static", "#f2a93b"},
      {"requant-static", "#d6336c"}, {"static", "#8a6d3b"},      {"pow2-static", "#2f9e68"},
      {"direct-token", "#6741d9"}};
  const auto found = colors.find(recipe);
  return found == colors.end() ? "#777777" : found->second;
}

std::string recipe_key(const std::vector<std::string>& recipes) {
  std::string html = "<div class='key'>";
  for (const std::string& name : recipes) {
    html += fmt::format("<span><i style='background:{}'></i>{}</span>", color_of(name),
                        escape_html(name));
  }
  return html + "</div>";
}

const nlohmann::ordered_json& recipe_of(const nlohmann::ordered_json& suite,
                                        const std::string& name) {
  static const nlohmann::ordered_json nothing;
  for (const nlohmann::ordered_json& r : suite.at("recipes")) {
    if (r.at("name") == name && !r.contains("refused")) return r;
  }
  return nothing;
}

std::string text_of(const nlohmann::ordered_json& value) {
  return escape_html(value.is_string() ? value.get<std::string>() : value.dump());
}

std::string percent(const nlohmann::ordered_json& value) {
  if (!value.is_number()) return "-";
  const double p = value.get<double>() * 100;
  if (p != 0 && p < 0.01) return fmt::format("{:.1e} %", p);
  return p < 10 ? fmt::format("{:.2f} %", p) : fmt::format("{:.1f} %", p);
}

}  // namespace sluice::report
