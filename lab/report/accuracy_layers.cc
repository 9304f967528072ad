#include "report/accuracy_layers.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "report/accuracy_html.h"
#include "report/svg_plot.h"
#include "report/text_table.h"
#include "sluice/error.h"

namespace sluice::report {
namespace {

using Json = nlohmann::ordered_json;

/// What one layer's row says, over all suites.
struct Glance {
  int layer = 0;
  std::string gate;
  std::optional<double> output, added;  ///< Of the gate's recipe; its worst suite.
  bool has_scales = false;
  double headroom1 = INFINITY, headroom2 = INFINITY, clip_rate1 = 0, clip_rate2 = 0;
  std::string clipped_suite, recommendation;  ///< Where most is clipped; empty if nowhere.
  bool identical = true, passed = false;
  std::optional<bool> engines;

  explicit Glance(const Json& certificate);
  /// Failed layers first, then by what FP8 adds.
  [[nodiscard]] auto badness() const { return std::pair(!passed, added ? *added : -1.0); }
};

/// The larger of both; what is not finite counts most and is null in JSON.
void raise(std::optional<double>& worst, const Json& value) {
  const double number = value.is_number() ? value.get<double>() : INFINITY;
  worst = worst ? std::max(*worst, number) : number;
}

Glance::Glance(const Json& certificate)
    : layer(certificate.at("layer")),
      gate(certificate.at("gate")),
      passed(certificate.at("passed")) {
  double most_clipped = 0;
  for (const Json& suite : certificate.at("suites")) {
    for (const Json& r : suite.at("recipes")) {
      if (r.at("name") != gate || r.contains("refused")) continue;
      raise(output, r.at("output").at("relative_l2"));
      raise(added, r.at("added_percent"));
    }
    const Json& s = suite.at("static_scales");
    if (s.at("origin") == "none") continue;
    has_scales = true;
    headroom1 = std::min(headroom1, s.at("headroom1").get<double>());
    headroom2 = std::min(headroom2, s.at("headroom2").get<double>());
    const double clip1 = s.at("clip_rate1"), clip2 = s.at("clip_rate2");
    clip_rate1 = std::max(clip_rate1, clip1);
    clip_rate2 = std::max(clip_rate2, clip2);
    if (clip1 + clip2 > most_clipped) {
      most_clipped = clip1 + clip2;
      clipped_suite = suite.at("name");
      recommendation = s.at("recommendation");
    }
  }
  for (const Json& proof : certificate.at("identity")) {
    identical = identical && proof.at("passed").get<bool>();
  }
  if (certificate.contains("engines")) engines = certificate.at("engines").at("passed").get<bool>();
}

std::vector<Glance> glances(const Json& json) {
  std::vector<Glance> all;
  for (const Json& certificate : json.at("layers")) all.emplace_back(certificate);
  return all;
}

std::string percent(const std::optional<double>& value, double factor, const char* format) {
  if (!value) return "-";
  if (!std::isfinite(*value)) return "infinite";
  return fmt::format(fmt::runtime(format), *value * factor);
}

const char* verdict(bool passed) {
  return passed ? "PASS" : "FAIL";
}

const std::vector<std::string>& columns() {
  static const std::vector<std::string> names = {
      "layer",       "output %",     "adds %",   "s1 headroom", "s1 clipped %",
      "s2 headroom", "s2 clipped %", "identity", "engines",     "verdict"};
  return names;
}

std::vector<std::string> cells(const Glance& g) {
  const auto scale = [&](const char* format, double value) {
    return g.has_scales ? fmt::format(fmt::runtime(format), value) : "-";
  };
  return {std::to_string(g.layer),
          percent(g.output, 100, "{:.3f}"),
          percent(g.added, 1, "{:+.2f}"),
          scale("{:.3g}x", g.headroom1),
          scale("{:.3g}", g.clip_rate1 * 100),
          scale("{:.3g}x", g.headroom2),
          scale("{:.3g}", g.clip_rate2 * 100),
          verdict(g.identical),
          g.engines ? verdict(*g.engines) : "-",
          verdict(g.passed)};
}

/// Output error of every recipe over the layers, on one suite.
std::vector<PlotSeries> series_of(const Json& json, std::size_t suite) {
  std::vector<PlotSeries> all;
  for (const Json& first : json.at("layers").at(0).at("suites").at(suite).at("recipes")) {
    const std::string name = first.at("name");
    PlotSeries series{name, color_of(name), {}};
    for (const Json& certificate : json.at("layers")) {
      const Json& r = recipe_of(certificate.at("suites").at(suite), name);
      const bool known = !r.is_null() && r.at("output").at("relative_l2").is_number();
      series.values.push_back(
          known ? std::optional<double>(r.at("output").at("relative_l2").get<double>())
                : std::nullopt);
    }
    all.push_back(std::move(series));
  }
  return all;
}

}  // namespace

Json join_layers(std::vector<Json> layers) {
  Json json = {{"layers", std::move(layers)}};
  const std::vector<Glance> all = glances(json);
  const auto worst = std::ranges::max_element(all, {}, &Glance::badness);
  json["worst_layer"] = worst->layer;
  const Json& certificate = json["layers"][static_cast<std::size_t>(worst - all.begin())];
  if (certificate.contains("budget")) json["budget"] = certificate.at("budget");
  json["passed"] = std::ranges::all_of(all, &Glance::passed);
  return json;
}

std::string layers_text(const Json& json) {
  const std::vector<Glance> all = glances(json);
  std::string text =
      fmt::format("\n== all {}: {} over its worst suite, static scales over theirs ==\n",
                  counted(all.size(), "layer"), all.front().gate);
  Table table(columns());
  for (const Glance& g : all) table.add(cells(g));
  text += table.to_string();
  for (const Glance& g : all) {
    if (!g.recommendation.empty()) {
      text +=
          fmt::format("scales    layer {}, {}: {}\n", g.layer, g.clipped_suite, g.recommendation);
    }
  }
  std::string failed;
  for (const Glance& g : all) {
    if (!g.passed) failed += (failed.empty() ? " " : ", ") + std::to_string(g.layer);
  }
  return text + (failed.empty() ? fmt::format("layers    all {}: PASS\n", all.size())
                                : fmt::format("layers    FAIL:{}\n", failed));
}

const Json& worst_layer(const Json& json) {
  for (const Json& certificate : json.at("layers")) {
    if (certificate.at("layer") == json.at("worst_layer")) return certificate;
  }
  throw Error(ErrorCode::kInternal, "worst_layer names no layer");
}

std::string layers_section(const Json& json) {
  const std::vector<Glance> all = glances(json);
  std::string html = fmt::format(
      "<section><h2>Layer by layer</h2><p>Errors of {} on its worst suite; static scales on "
      "theirs.</p><div class='scroll'><table><tr>",
      escape_html(all.front().gate));
  for (const std::string& name : columns()) html += "<th>" + name + "</th>";
  html += "</tr>";
  for (const Glance& g : all) {
    html += "<tr>";
    for (const std::string& cell : cells(g)) {
      html += fmt::format("<td class='{}'>{}</td>", cell == "FAIL" ? "w3" : "", cell);
    }
    html += "</tr>";
  }
  html += "</table></div>";
  std::string advice;
  for (const Glance& g : all) {
    if (g.recommendation.empty()) continue;
    advice += fmt::format("<p>Layer {}, {}: {}</p>", g.layer, escape_html(g.clipped_suite),
                          escape_html(g.recommendation));
  }
  if (!advice.empty()) {
    html += "<details><summary>Static scales that clip</summary>" + advice + "</details>";
  }
  std::vector<std::string> recipes;
  for (const Json& r : json.at("layers").at(0).at("suites").at(0).at("recipes")) {
    recipes.push_back(r.at("name"));
  }
  html += "<h3>Output error over the layers, in their order</h3>" + recipe_key(recipes) +
          "<div class='pair'>";
  const Json& suites = json.at("layers").at(0).at("suites");
  for (std::size_t s = 0; s < suites.size(); ++s) {
    html += "<div><h3>" + escape_html(suites[s].at("name")) + "</h3>" +
            line_plot(fmt::format("layers {} to {}", all.front().layer, all.back().layer),
                      series_of(json, s), {.width = 490, .height = 190}) +
            "</div>";
  }
  return html + "</div></section>";
}

}  // namespace sluice::report
