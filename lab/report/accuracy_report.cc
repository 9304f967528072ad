#include "report/accuracy_report.h"

#include <fmt/core.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "report/accuracy_html.h"
#include "report/accuracy_layers.h"
#include "report/accuracy_scales.h"
#include "report/html_page.h"
#include "report/svg_plot.h"
#include "report/text_table.h"

namespace sluice::report {
namespace {

using Json = nlohmann::ordered_json;

/// Shades an error by how far it is above the smallest of its column.
const char* shade(const Json& value, double best) {
  if (!value.is_number() || !(best > 0)) return "";
  const double ratio = value.get<double>() / best;
  return ratio > 3 ? "w3" : ratio > 1.25 ? "w2" : ratio > 1.08 ? "w1" : "";
}

std::string number(const Json& value, const char* format) {
  return value.is_number() ? fmt::format(fmt::runtime(format), value.get<double>()) : "-";
}

/// How far a real run's output is from the certificate's.
std::string engine_of(const Json& recipe) {
  if (!recipe.contains("engine")) return "-";
  const Json& e = recipe.at("engine");
  return e.at("same_bytes").get<bool>() ? percent(e.at("distance")) : "OTHER BYTES";
}

/// Why a recipe could not be judged.
std::string refused_row(const Json& suite, const std::string& name) {
  for (const Json& r : suite.at("recipes")) {
    if (r.at("name") != name) continue;
    return fmt::format("<tr><td>{}</td><td class='text' colspan='10'>refused: {}</td></tr>",
                       escape_html(name), text_of(r.at("refused")));
  }
  return "";
}

class Report {
 public:
  explicit Report(const Json& json) : json_(json) {
    for (const Json& r : json.at("suites").at(0).at("recipes")) recipes_.push_back(r.at("name"));
    for (const Json& s : json.at("suites")) suites_.push_back(s.at("name"));
  }

  [[nodiscard]] std::string render() const {
    return heading() + overview() + plots() + numbers() + roundings() + channels() + tokens() +
           scales_section(json_) + definitions();
  }

 private:
  [[nodiscard]] std::string heading() const;
  [[nodiscard]] std::string overview() const;
  [[nodiscard]] std::string plots() const;
  [[nodiscard]] std::string numbers() const;
  [[nodiscard]] std::string roundings() const;
  [[nodiscard]] std::string channels() const;
  [[nodiscard]] std::string tokens() const;
  [[nodiscard]] std::string definitions() const;

  /// recipe x suite of recipe[what]["relative_l2"].
  [[nodiscard]] std::string error_table(const char* what) const;
  [[nodiscard]] std::string key() const { return recipe_key(recipes_); }
  /// One series per recipe; f(entry of the recipe in `suite`) gives its values.
  template <class Function>
  [[nodiscard]] std::vector<PlotSeries> series(const Function& f) const {
    std::vector<PlotSeries> all;
    for (const std::string& name : recipes_) all.push_back({name, color_of(name), f(name)});
    return all;
  }

  const Json& json_;
  std::vector<std::string> recipes_, suites_;
};

std::string Report::heading() const {
  const Json& g = json_.at("geometry");
  std::string html = fmt::format(
      "<p>{}; {} experts, top-{}, hidden {}, intermediate {}, scale "
      "group {}. {} tokens a suite, seed {}. Original weights: {}.</p><div class='verdicts'>",
      text_of(json_.at("source")), g.at("num_experts").dump(), g.at("num_topk").dump(),
      g.at("hidden").dump(), g.at("intermediate").dump(), g.at("group_size").dump(),
      json_.at("tokens").dump(), json_.at("seed").dump(), text_of(json_.at("original_weights")));
  for (const Json& proof : json_.at("identity")) {
    const bool passed = proof.at("passed");
    html += fmt::format(
        "<div class='verdict {}'><b>Identity, {}: {}</b>FP8 dispatch, BF16 dispatch with the same "
        "quantization, and the scalar definition give GEMM1 {} over {} ranks: "
        "<code>{}</code></div>",
        passed ? "pass" : "fail", text_of(proof.at("mode")), passed ? "PASS" : "FAIL",
        passed ? "the same bytes" : "different bytes", proof.at("ranks").dump(),
        passed ? text_of(proof.at("direct"))
               : text_of(proof.at("direct")) + " / " + text_of(proof.at("direct_bf16")) + " / " +
                     text_of(proof.at("definition")));
  }
  if (json_.contains("engines")) {
    const Json& e = json_.at("engines");
    const bool passed = e.at("passed");
    html += fmt::format(
        "<div class='verdict {}'><b>Engines, {}: {}</b>{} runs of the layer over {} ranks, held "
        "against this certificate: bytes at GEMM1, and outputs at most {} away (limit {}).</div>",
        passed ? "pass" : "fail", text_of(e.at("backend")), passed ? "PASS" : "FAIL",
        e.at("runs").dump(), e.at("ranks").dump(), percent(e.at("farthest")),
        percent(e.at("limit")));
  }
  if (json_.contains("budget")) {
    const Json& b = json_.at("budget");
    const bool passed = b.at("passed");
    html += fmt::format(
        "<div class='verdict {}'><b>Budget: {}</b>FP8 dispatch ({}) adds {:.2f} % to the layer's "
        "total error (worst suite: {}{}); the budget is {:g} %.</div>",
        passed ? "pass" : "fail", passed ? "PASS" : "FAIL", text_of(b.at("recipe")),
        b.at("added_percent").is_number() ? b.at("added_percent").get<double>() : 0.0,
        text_of(b.at("worst_suite")), b.at("of_engine").get<bool>() ? ", as run" : "",
        b.at("budget_percent").get<double>());
  }
  return html + "</div>";
}

std::string Report::error_table(const char* what) const {
  std::string html = "<div class='scroll'><table><tr><th>recipe</th>";
  for (const std::string& suite : suites_) html += "<th>" + escape_html(suite) + "</th>";
  html += "</tr>";
  for (const std::string& name : recipes_) {
    html += "<tr><td>" + escape_html(name) + "</td>";
    for (const Json& suite : json_.at("suites")) {
      double best = 1e300;
      for (const std::string& other : recipes_) {
        const Json& r = recipe_of(suite, other);
        if (!r.is_null() && r.at(what).is_object() && r.at(what).at("relative_l2").is_number()) {
          best = std::min(best, r.at(what).at("relative_l2").get<double>());
        }
      }
      const Json& r = recipe_of(suite, name);
      const Json value =
          r.is_null() || !r.at(what).is_object() ? Json() : r.at(what).at("relative_l2");
      html += fmt::format("<td class='{}'>{}</td>", shade(value, best), percent(value));
    }
    html += "</tr>";
  }
  return html + "</table></div>";
}

std::string Report::overview() const {
  return "<section><h2>Error by recipe and suite</h2>"
         "<p>Relative L2 norms. Shaded: more than 1.08, 1.25 and 3 times the best of the "
         "column.</p><h3>Activation, as GEMM1 sees it</h3>" +
         error_table("activation1") +
         "<h3>Layer output, against exact arithmetic on the same INT4 weights</h3>" +
         error_table("output") +
         "<h3>Layer output, against the original weights (total error)</h3>" +
         error_table("total") + "</section>";
}

std::string Report::plots() const {
  std::string html =
      "<section><h2>The same, drawn</h2><p>Logarithmic. Hover over a bar for its "
      "value.</p>" +
      key();
  for (const auto& [what, title] : {std::pair{"activation1", "Activation into GEMM1"},
                                    std::pair{"output", "Layer output, same INT4 weights"}}) {
    html += fmt::format("<h3>{}</h3>", title);
    html += bar_plot(suites_, series([&, w = what](const std::string& name) {
                       std::vector<std::optional<double>> values;
                       for (const Json& suite : json_.at("suites")) {
                         const Json& r = recipe_of(suite, name);
                         const bool known = !r.is_null() && r.at(w).at("relative_l2").is_number();
                         values.push_back(known ? std::optional<double>(r.at(w).at("relative_l2"))
                                                : std::nullopt);
                       }
                       return values;
                     }),
                     {.width = 1000, .height = 260});
  }
  return html + "</section>";
}

std::string Report::numbers() const {
  std::string html =
      "<section><h2>Every number of the output</h2><p>Of the layer's output against exact "
      "arithmetic on the same INT4 weights. Saturated, underflowed: values that e4m3 clipped or "
      "made zero, GEMM1 + GEMM2 inputs. Adds: to the total error. Engine: how far the output of a "
      "real run is from this one.</p>";
  for (const Json& suite : json_.at("suites")) {
    html += fmt::format(
        "<details{}><summary>{}</summary><div class='scroll tight'><table><tr><th>recipe</th>"
        "<th>error</th><th>SQNR</th><th>worst token</th><th>p99 token</th><th>p99 channel</th>"
        "<th>saturated</th><th>underflowed</th><th>total</th><th>adds</th><th>engine</th>"
        "</tr>",
        &suite == &json_.at("suites").front() ? " open" : "", text_of(suite.at("name")));
    for (const std::string& name : recipes_) {
      const Json& r = recipe_of(suite, name);
      if (r.is_null()) {
        html += refused_row(suite, name);
        continue;
      }
      const Json &output = r.at("output"), &one = r.at("gemm1_casts"), &two = r.at("gemm2_casts");
      const auto both = [&](const char* what) {
        return fmt::format("<td>{} + {}</td>", one.at(what).dump(), two.at(what).dump());
      };
      html += fmt::format(
          "<tr><td>{}</td><td>{}</td><td>{}</td><td>{} <small>(#{})</small></td><td>{}</td>"
          "<td>{}</td>{}{}<td>{}</td><td>{}</td><td>{}</td></tr>",
          escape_html(name), percent(output.at("relative_l2")),
          number(output.at("sqnr_db"), "{:.1f} dB"), percent(output.at("worst_token_error")),
          output.at("worst_token").dump(), percent(output.at("p99_token_error")),
          percent(output.at("p99_channel_error")), both("saturated"), both("underflowed"),
          r.at("total").is_object() ? percent(r.at("total").at("relative_l2")) : "-",
          number(r.at("added_percent"), "{:+.2f} %"), engine_of(r));
    }
    html += "</table></div></details>";
  }
  return html + "</section>";
}

std::string Report::roundings() const {
  static const std::pair<const char*, const char*> kColumns[] = {
      {"weights", "weights"},
      {"activation1", "activation 1"},
      {"activation2", "activation 2"},
      {"accumulation", "accumulation"},
      {"combine", "combine"},
      {"together", "all but weights"},
      {"quadrature", "root sum squares"}};
  std::string html =
      "<section><h2>Each rounding alone, and all together</h2><p>Output error with one rounding "
      "switched on. Independent errors add in squares: all together over the root of the sum of "
      "squares is 1 as far as they are.</p>";
  bool first = true;
  for (const Json& suite : json_.at("suites")) {
    html += fmt::format(
        "<details{}><summary>{}</summary><div class='scroll'><table><tr>"
        "<th>recipe</th>",
        first ? " open" : "", text_of(suite.at("name")));
    first = false;
    for (const auto& [field, title] : kColumns) html += fmt::format("<th>{}</th>", title);
    html += "<th>ratio</th></tr>";
    for (const std::string& name : recipes_) {
      const Json& r = recipe_of(suite, name);
      if (r.is_null()) continue;
      html += "<tr><td>" + escape_html(name) + "</td>";
      for (const auto& [field, title] : kColumns) {
        html += "<td>" + percent(r.at("roundings").at(field)) + "</td>";
      }
      html += fmt::format("<td>{}</td></tr>",
                          number(r.at("roundings").at("together_over_quadrature"), "{:.3f}"));
    }
    html += "</table></div></details>";
  }
  return html + "</section>";
}

std::string Report::channels() const {
  std::string html =
      "<section><h2>Error by output channel</h2><p>Root mean square over neighbouring channels, in "
      "order of channel. direct and direct-bf16 coincide, as do bf16-static and static.</p>" +
      key() + "<div class='pair'>";
  for (const Json& suite : json_.at("suites")) {
    html += "<div><h3>" + text_of(suite.at("name")) + "</h3>" +
            line_plot("channel", series([&](const std::string& name) {
                        std::vector<std::optional<double>> values;
                        const Json& r = recipe_of(suite, name);
                        if (r.is_null()) return values;
                        for (const Json& v : r.at("channel_profile")) {
                          values.push_back(v.is_number() ? std::optional<double>(v) : std::nullopt);
                        }
                        return values;
                      }),
                      {.width = 490, .height = 190}) +
            "</div>";
  }
  return html + "</div></section>";
}

std::string Report::tokens() const {
  std::string html =
      "<section><h2>Worst tokens</h2><p>Output error of each token, worst first, and the worst "
      "token's number.</p>" +
      key() + "<div class='pair'>";
  for (const Json& suite : json_.at("suites")) {
    html += "<div><h3>" + text_of(suite.at("name")) + "</h3>" +
            line_plot("tokens, worst first", series([&](const std::string& name) {
                        std::vector<std::optional<double>> values;
                        const Json& r = recipe_of(suite, name);
                        if (r.is_null()) return values;
                        for (const Json& v : r.at("token_errors")) {
                          if (v.is_number() && v > 0) values.emplace_back(v.get<double>());
                        }
                        std::ranges::sort(values, std::greater{});
                        return values;
                      }),
                      {.width = 490, .height = 190}) +
            "</div>";
  }
  html += "</div><div class='scroll'><table><tr><th>recipe</th>";
  for (const std::string& suite : suites_) html += "<th>" + escape_html(suite) + "</th>";
  html += "</tr>";
  for (const std::string& name : recipes_) {
    html += "<tr><td>" + escape_html(name) + "</td>";
    for (const Json& suite : json_.at("suites")) {
      const Json& r = recipe_of(suite, name);
      html += r.is_null() ? "<td>-</td>"
                          : fmt::format("<td>{} <small>(#{})</small></td>",
                                        percent(r.at("output").at("worst_token_error")),
                                        r.at("output").at("worst_token").dump());
    }
    html += "</tr>";
  }
  return html + "</table></div></section>";
}

std::string Report::definitions() const {
  return "<section><h2>Definitions</h2><p>Error: ||y - reference|| / ||reference||. Exact: float64 "
         "arithmetic on the same INT4 weights with unquantized activations. Total: against the "
         "original weights. Adds to total: how much larger the total error is than with the same "
         "recipe if GEMM1 took its input unquantized. Identity: a hash of every row's bytes at "
         "GEMM1's input, summed over ranks.</p></section>";
}

}  // namespace

std::string accuracy_report(const Json& json) {
  std::string body;
  if (json.contains("layers")) {
    const bool passed = json.at("passed");
    body = fmt::format(
        "<div class='verdicts'><div class='verdict {}'><b>All {}: {}</b>The worst, layer "
        "{}, follows in full.</div></div>{}<h1 class='part'>Layer {}</h1>",
        passed ? "pass" : "fail", counted(json.at("layers").size(), "layer"),
        passed ? "PASS" : "FAIL", json.at("worst_layer").dump(), layers_section(json),
        json.at("worst_layer").dump());
  }
  body += Report(json.contains("layers") ? worst_layer(json) : json).render();
  return html_page("Sluice accuracy certificate", "Accuracy certificate", body,
                   text_of(json.at("version")));
}

}  // namespace sluice::report
