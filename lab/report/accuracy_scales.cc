#include "report/accuracy_scales.h"

#include <fmt/core.h>

#include <algorithm>
#include <vector>

#include "report/accuracy_html.h"
#include "report/svg_plot.h"
#include "sluice/quant.h"

namespace sluice::report {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kColors[] = {"#1668dc", "#f2a93b"};  // GEMM1 input, GEMM2 input.
/// Experts in a table: those with the least room.
constexpr std::size_t kMaxExperts = 8;
/// e4m3 has no value between 448 and 480, so that what is below this is rounded to 448.
constexpr double kRoundsToMax = 464;

/// "scale1" for "scale", 0.
const Json& of_gemm(const Json& owner, const char* what, int gemm) {
  return owner.at(std::string(what) + (gemm == 0 ? "1" : "2"));
}

std::string layer_table(const Json& suites) {
  std::string html =
      "<div class='scroll'><table><tr><th>suite</th><th>s1</th><th>headroom</th><th>clipped</th>"
      "<th>s2</th><th>headroom</th><th>clipped</th><th class='text'>recommendation</th></tr>";
  for (const Json& suite : suites) {
    const Json& s = suite.at("static_scales");
    html += fmt::format("<tr><td>{}</td>", text_of(suite.at("name")));
    for (int gemm = 0; gemm < 2; ++gemm) {
      if (s.at("origin") == "none") {
        html += "<td>-</td><td>-</td><td>-</td>";
        continue;
      }
      html += fmt::format(
          "<td>{:.4g}</td><td class='{}'>{:.3g}x</td><td>{}</td>",
          of_gemm(s, "s", gemm).get<double>(), of_gemm(s, "clip_rate", gemm) > 0 ? "w3" : "",
          of_gemm(s, "headroom", gemm).get<double>(), percent(of_gemm(s, "clip_rate", gemm)));
    }
    html += "<td class='text'>" + text_of(s.at("recommendation")) + "</td></tr>";
  }
  return html + "</table></div>";
}

/// Headroom of the layer's scale over what one expert met; 0 if it met nothing.
double headroom(const Json& scales, const Json& expert, int gemm) {
  const double amax = of_gemm(expert, "amax", gemm);
  return amax > 0 ? kE4m3Max * of_gemm(scales, "s", gemm).get<double>() / amax : 0;
}

/// The least of an expert's two headrooms; experts without rows come last.
double least_headroom(const Json& scales, const Json& expert) {
  double least = 1e300;
  for (int gemm = 0; gemm < 2; ++gemm) {
    if (const double room = headroom(scales, expert, gemm); room > 0) least = std::min(least, room);
  }
  return least;
}

std::string expert_row(const Json& scales, std::size_t index, bool has_own) {
  const Json& expert = scales.at("experts").at(index);
  std::string html = fmt::format("<tr><td>{}</td><td>{}</td>", index, expert.at("rows").dump());
  for (int gemm = 0; gemm < 2; ++gemm) {
    const double scale = of_gemm(expert, "scale", gemm),
                 own = of_gemm(expert, "own_headroom", gemm);
    const bool clips = of_gemm(expert, "clip_rate", gemm) > 0;
    html +=
        fmt::format("<td>{:.4g}</td><td class='{}'>{:.3g}x</td><td>{}</td>",
                    of_gemm(expert, "amax", gemm).get<double>(), clips ? "w3" : "",
                    headroom(scales, expert, gemm), percent(of_gemm(expert, "clip_rate", gemm)));
    if (!has_own) continue;
    html += fmt::format("<td>{:.4g}</td><td class='{}'>{:.3g}x</td>", scale,
                        own > 0 && own * kRoundsToMax < kE4m3Max ? "w2" : "", own);
  }
  return html + "</tr>";
}

/// The experts of one suite with the least room under the layer's scales.
std::string expert_table(const Json& suite) {
  const Json& scales = suite.at("static_scales");
  const Json& experts = scales.at("experts");
  std::vector<std::size_t> order(experts.size());
  for (std::size_t e = 0; e < order.size(); ++e) order[e] = e;
  std::ranges::stable_sort(order, {},
                           [&](std::size_t e) { return least_headroom(scales, experts.at(e)); });
  order.resize(std::min(order.size(), kMaxExperts));
  const bool has_own = std::ranges::any_of(
      experts, [](const Json& e) { return e.at("scale1") > 0 || e.at("scale2") > 0; });
  std::string html = fmt::format(
      "<details><summary>{0}</summary><div class='scroll tight'><table><tr><th></th><th></th>"
      "<th colspan='{1}'>GEMM1 input</th><th colspan='{1}'>GEMM2 input</th></tr>"
      "<tr><th>expert</th><th>rows</th>",
      text_of(suite.at("name")), has_own ? 5 : 3);
  for (int gemm = 0; gemm < 2; ++gemm) {
    html += "<th>amax</th><th>headroom</th><th>clipped</th>";
    if (has_own) html += "<th>own scale</th><th>own headroom</th>";
  }
  html += "</tr>";
  for (const std::size_t e : order) html += expert_row(scales, e, has_own);
  return html + "</table></div></details>";
}

std::string histogram(const Json& suite) {
  const Json& s = suite.at("static_scales");
  std::vector<PlotSeries> both = {{"GEMM1 input", kColors[0], {}}, {"GEMM2 input", kColors[1], {}}};
  for (const Json& e : s.at("experts")) {
    for (int gemm = 0; gemm < 2; ++gemm) {
      const double room = headroom(s, e, gemm);
      both[static_cast<std::size_t>(gemm)].values.push_back(room > 0 ? std::optional(room)
                                                                     : std::nullopt);
    }
  }
  return fmt::format("<div><h3>{}</h3>{}</div>", text_of(suite.at("name")),
                     headroom_plot(both, {.width = 490, .height = 160}));
}

}  // namespace

std::string scales_section(const Json& json) {
  const Json& suites = json.at("suites");
  std::string html =
      "<section><h2>Static scales against what the tokens contain</h2><p>Headroom is 448 * scale / "
      "largest value; below 0.97 values are clipped (464 still rounds to 448).</p>" +
      layer_table(suites);
  std::string plots, tables;
  for (const Json& suite : suites) {
    if (suite.at("static_scales").at("origin") == "none") continue;
    plots += histogram(suite);
    tables += expert_table(suite);
  }
  if (!plots.empty()) {
    html += fmt::format(
        "<h3>Headroom of the layer's scales, expert by expert (how many experts)</h3>"
        "<div class='key'><span><i style='background:{}'></i>GEMM1 input</span><span><i "
        "style='background:{}'></i>GEMM2 input</span></div><div class='pair'>{}</div>"
        "<h3>Experts with the least headroom</h3><p>Own scale: a checkpoint's input_scale of "
        "this very expert. Engines use the largest of the layer; an own headroom below 0.97 says "
        "that "
        "calibration did not see what the expert met here.</p>{}",
        kColors[0], kColors[1], plots, tables);
  }
  return html + "</section>";
}

}  // namespace sluice::report
