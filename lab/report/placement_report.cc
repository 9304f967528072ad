#include "report/placement_report.h"

#include <fmt/core.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "report/accuracy_html.h"
#include "report/html_page.h"
#include "report/svg_plot.h"
#include "report/text_table.h"

namespace sluice::report {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kBefore = "#8fc1ff";
constexpr const char* kAfter = "#1668dc";
constexpr const char* kReplica = "#f2a93b";
constexpr std::size_t kMostPictures = 6;

double gain(const Json& layer) {
  return layer.at("before").at("max_over_mean").get<double>() -
         layer.at("after").at("max_over_mean").get<double>();
}

/// The layers with the most to gain, in order of gain.
std::vector<const Json*> most_changed(const Json& json) {
  std::vector<const Json*> layers;
  for (const Json& layer : json.at("layers")) layers.push_back(&layer);
  std::ranges::stable_sort(layers, std::greater{}, [](const Json* l) { return gain(*l); });
  if (layers.size() > kMostPictures) layers.resize(kMostPictures);
  return layers;
}

/// One block of a rank's column: an expert's rows there.
struct Block {
  double rows = 0;
  int expert = 0, num_replicas = 1;
};

/// Ranks as columns, in which every slot is a block as high as its rows.
class RankPicture {
 public:
  RankPicture(const Json& layer, const char* when, double highest)
      : state_(layer.at(when)), highest_(highest) {
    const auto experts = layer.at("rows_per_expert").get<std::vector<double>>();
    std::vector<int> replicas(experts.size());
    for (const Json& e : state_.at("slot_experts")) {
      if (e.is_number()) ++replicas[e.get<std::size_t>()];
    }
    const std::size_t num_ranks = state_.at("rows_per_rank").size();
    const std::size_t num_slots = state_.at("slot_experts").size();
    ranks_.resize(num_ranks);
    for (std::size_t s = 0; s < num_slots; ++s) {
      const Json& e = state_.at("slot_experts").at(s);
      if (!e.is_number()) continue;
      const auto expert = e.get<std::size_t>();
      ranks_[s / (num_slots / num_ranks)].push_back(
          {experts[expert] / replicas[expert], static_cast<int>(expert), replicas[expert]});
    }
    for (auto& blocks : ranks_) std::ranges::stable_sort(blocks, std::greater{}, &Block::rows);
  }

  [[nodiscard]] std::string svg() const {
    std::string out = fmt::format("<svg viewBox='0 0 {} {}' role='img'>", kWidth, kHeight);
    double sum = 0;
    const double step = (kWidth - kLeft) / static_cast<double>(ranks_.size());
    for (std::size_t r = 0; r < ranks_.size(); ++r) {
      const double x = kLeft + step * (static_cast<double>(r) + 0.1);
      double rows = 0;
      for (const Block& block : ranks_[r]) {
        const double top = y(rows + block.rows);
        out += fmt::format(
            "<rect x='{:.1f}' y='{:.1f}' width='{:.1f}' height='{:.1f}' fill='{}' stroke='#fff' "
            "stroke-width='0.4'><title>rank {}, expert {}: {:.0f} rows{}</title></rect>",
            x, top, step * 0.8, y(rows) - top, block.num_replicas > 1 ? kReplica : kAfter, r,
            block.expert, block.rows,
            block.num_replicas > 1 ? fmt::format(", one of {} replicas", block.num_replicas) : "");
        rows += block.rows;
      }
      sum += rows;
      if (ranks_.size() <= 32) {
        out += fmt::format("<text class='tick' x='{:.1f}' y='{}' text-anchor='middle'>{}</text>",
                           x + step * 0.4, kHeight - 6, r);
      }
    }
    const double mean = y(sum / static_cast<double>(ranks_.size()));
    return out + fmt::format(
                     "<line class='axis' x1='{}' y1='{:.1f}' x2='{}' y2='{:.1f}' "
                     "stroke-dasharray='5 4'/><text class='tick' x='{}' y='{:.1f}' "
                     "text-anchor='end'>mean</text></svg>",
                     kLeft, mean, kWidth, mean, kLeft - 4, mean + 4);
  }

 private:
  static constexpr double kWidth = 490, kHeight = 220, kLeft = 40, kTop = 8, kBottom = 22;

  [[nodiscard]] double y(double rows) const {
    return kHeight - kBottom - (kHeight - kBottom - kTop) * rows / highest_;
  }

  const Json& state_;
  double highest_;
  std::vector<std::vector<Block>> ranks_;
};

std::string picture(const Json& layer) {
  double highest = 1;
  for (const char* when : {"before", "after"}) {
    for (const Json& rows : layer.at(when).at("rows_per_rank")) {
      highest = std::max(highest, rows.get<double>());
    }
  }
  std::string html = fmt::format("<h3>Layer {}</h3><div class='pair'>", layer.at("layer").dump());
  for (const char* when : {"before", "after"}) {
    html += fmt::format("<div>{}: the fullest rank has {:.3f} x the mean{}</div>", when,
                        layer.at(when).at("max_over_mean").get<double>(),
                        RankPicture(layer, when, highest).svg());
  }
  return html + "</div>";
}

std::string pictures(const Json& json) {
  std::string html = fmt::format(
      "<section><h2>Rows of each rank</h2><p>A column is a rank, a block the rows of one expert "
      "slot. The dashed line is the mean. Of the layers that change most, {} at most.</p>"
      "<div class='key'><span><i style='background:{}'></i>an expert's only slot</span>"
      "<span><i style='background:{}'></i>a replica</span></div>",
      kMostPictures, kAfter, kReplica);
  for (const Json* layer : most_changed(json)) html += picture(*layer);
  return html + "</section>";
}

/// Of all layers, or of one layer over time.
std::string comparison(const std::string& title, const std::string& text, const std::string& x,
                       std::vector<std::optional<double>> before,
                       std::vector<std::optional<double>> after) {
  return fmt::format(
             "<section><h2>{}</h2><p>{}</p><div class='key'><span><i style='background:{}'></i>"
             "before</span><span><i style='background:{}'></i>after</span></div>",
             title, text, kBefore, kAfter) +
         line_plot(x, {{"after", kAfter, std::move(after)}, {"before", kBefore, std::move(before)}},
                   {.width = 1000, .height = 240}) +
         "</section>";
}

std::string over_layers(const Json& json) {
  if (json.at("layers").size() < 2) return {};
  std::vector<std::optional<double>> before, after;
  for (const Json& layer : json.at("layers")) {
    before.emplace_back(layer.at("before").at("max_over_mean").get<double>());
    after.emplace_back(layer.at("after").at("max_over_mean").get<double>());
  }
  return comparison("Layers", "Rows of the fullest rank, as per cent of the mean rank's.",
                    "layers, in the order of the file", std::move(before), std::move(after));
}

std::string over_time(const Json& json) {
  const Json& layer = *most_changed(json).front();
  const Json& steps = layer.at("steps");
  if (steps.at("before").size() < 2) return {};
  const auto values = [&](const char* when) {
    std::vector<std::optional<double>> all;
    for (const Json& v : steps.at(when)) all.emplace_back(v.get<double>());
    return all;
  };
  return comparison(
      fmt::format("Layer {} over time", layer.at("layer").dump()),
      fmt::format("Rows of the fullest rank in each step of the file, as per cent of the mean "
                  "rank's. The placement was made from the last {} of {} steps.",
                  json.at("window").dump(), steps.at("before").size()),
      "step", values("before"), values("after"));
}

std::string table(const Json& json) {
  std::string html =
      "<section><h2>Numbers</h2><div class='scroll'><table><tr><th>layer</th><th>rows</th>"
      "<th>fullest over mean, before</th><th>after</th><th>replicas</th><th>empty slots</th>"
      "<th>experts that travel</th></tr>";
  for (const Json& layer : json.at("layers")) {
    html += fmt::format(
        "<tr><td>{}</td><td>{}</td><td>{:.3f}</td><td>{:.3f}</td><td>{}</td><td>{}</td>"
        "<td>{}</td></tr>",
        layer.at("layer").dump(), layer.at("rows").dump(),
        layer.at("before").at("max_over_mean").get<double>(),
        layer.at("after").at("max_over_mean").get<double>(), layer.at("num_replicas").dump(),
        layer.at("num_empty").dump(), layer.at("num_moves").dump());
  }
  return html + "</table></div></section>";
}

}  // namespace

std::string placement_report(const Json& json) {
  const std::string heading =
      fmt::format("<p>{}: {} of {} experts, over {} slots of {} on {}. Before: {}.</p>",
                  text_of(json.at("counts")), counted(json.at("layers").size(), "layer"),
                  json.at("num_experts").dump(), json.at("num_slots").dump(),
                  counted(json.at("num_ranks").get<int>(), "rank"),
                  counted(json.at("num_hosts").get<int>(), "host"), text_of(json.at("previous")));
  return html_page("Sluice placement", "Placement",
                   heading + over_layers(json) + pictures(json) + over_time(json) + table(json),
                   text_of(json.at("version")));
}

}  // namespace sluice::report
