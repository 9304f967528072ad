// The model against every figure that was measured. docs/clusters-checked.md shows the same tables;
// they are compared here, so that neither can change without the other.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <utility>

#include "network/measured.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

using testing::Cell;
using testing::Quantity;
using testing::Series;

TokenSpread spread_of(const Cell& c) {
  const int slots = std::max(c.layer.num_ranks, c.rule.num_experts);
  return even_spread(c.rule, Placement::even(c.rule.num_experts, c.layer.num_ranks, slots),
                     c.layer.num_hosts);
}

double predict(const Series& series, const Cell& c) {
  const TokenSpread spread = spread_of(c);
  const MachineModel& m = series.machine;
  switch (series.quantity) {
    case Quantity::kDispatch:
      return predict_dispatch(m, c.layer, spread).total_us;
    case Quantity::kCombine:
      return predict_combine(m, c.layer, spread).total_us;
    case Quantity::kStage:
      return predict_stage(m, c.layer, spread);
    case Quantity::kLayer:
      return predict_layer(m, c.layer, spread).layer_us;
    case Quantity::kLayerApart:
      return predict_dispatch(m, c.layer, spread).total_us + predict_stage(m, c.layer, spread) +
             predict_combine(m, c.layer, spread).total_us;
  }
  return 0;
}

/// Where a source gives a rate: of every copy of a token to a host, or on one host to a rank.
double measured(const Series& series, const Cell& c) {
  if (c.published_gbytes_per_s == 0) return c.measured_us;
  const TokenSpread spread = spread_of(c);
  const double copies = c.layer.num_hosts > 1 ? spread.hosts_per_token() : spread.ranks_per_token();
  const bool out = series.quantity == Quantity::kDispatch;
  const double bytes =
      out ? static_cast<double>(wire_bytes_per_token(WireFormat::kE4m3Group, 7168)) : 2.0 * 7168;
  return c.layer.tokens_per_rank * copies * bytes / c.published_gbytes_per_s * 1e-3;
}

std::string us(double value) {
  return value < 100 ? fmt::format("{:.1f}", value) : fmt::format("{:.0f}", value);
}

/// "+3 %", and "0 %" for what rounds to it.
std::string percent(double error) {
  const double rounded = std::round(100 * error);
  return rounded == 0 ? "0 %" : fmt::format("{:+.0f} %", rounded);
}

/// Kinds of figures, for the first lines of the page.
class Summary {
 public:
  void add(const std::string& kind, double error) {
    auto& [number, worst] = kinds_[kind];
    ++number, worst = std::max(worst, std::fabs(error));
  }
  [[nodiscard]] std::string line(const std::string& kind) const {
    const auto& [number, worst] = kinds_.at(kind);
    return fmt::format("| {} | {} | {:.0f} % |\n", kind, number, 100 * worst);
  }

 private:
  std::map<std::string, std::pair<int, double>> kinds_;
};

constexpr const char* kOverHosts = "other engines over several hosts, EP16 to EP256";
constexpr const char* kOneHost = "other engines on one host";
constexpr const char* kFewExperts = "the same with few experts, which the model does not know";
constexpr const char* kOwnExchange = "dispatch and combine of this project, one host";
constexpr const char* kOwnLayers = "stages and layers of this project, one host";
constexpr const char* kOwnStages = "its stages of other numbers, sizes and distributions";

const char* kind_of(const Series& series, const Cell& c, bool is_own) {
  if (c.layer.num_hosts > 1) return kOverHosts;
  if (!is_own)
    return series.where.find("few experts") == std::string::npos ? kOneHost : kFewExperts;
  const bool is_exchange =
      series.quantity == Quantity::kDispatch || series.quantity == Quantity::kCombine;
  return is_exchange ? kOwnExchange : kOwnLayers;
}

struct Checked {
  std::string text;  ///< The tables, in Markdown.
  double worst = 0;
  int num_figures = 0;
};

/// A table for each series of sizes; three lines for each series.
Checked check(const std::vector<Series>& all, const std::string& title, bool is_own,
              Summary& summary) {
  Checked checked;
  std::string heads;
  for (const Series& series : all) {
    std::string head = fmt::format("| {} | ", series.where), line = "|---|---|";
    std::string measured_line = fmt::format("| {} | measured |", series.what);
    std::string predicted_line = "| | predicted |", error_line = "| | error |";
    head += "us |";
    for (const Cell& c : series.cells) {
      const double is = measured(series, c), said = predict(series, c), error = said / is - 1;
      EXPECT_LE(std::fabs(error), series.bound)
          << series.where << ", " << series.what << ", " << c.label << ": predicted " << said
          << " us, measured " << is;
      checked.worst = std::max(checked.worst, std::fabs(error));
      summary.add(kind_of(series, c, is_own), error);
      ++checked.num_figures;
      head += fmt::format(" {} |", c.label), line += "---|";
      measured_line += fmt::format(" {} |", us(is));
      predicted_line += fmt::format(" {} |", us(said));
      error_line += fmt::format(" {} |", percent(error));
    }
    if (head != heads) checked.text += "\n" + head + "\n" + line + "\n";
    heads = head;
    checked.text += measured_line + "\n" + predicted_line + "\n" + error_line + "\n";
  }
  checked.text = fmt::format("{}: {} figures, worst error {:.0f} %.\n", title, checked.num_figures,
                             100 * checked.worst) +
                 checked.text;
  return checked;
}

std::string read_page(const std::string& page) {
  std::ifstream file(SLUICE_DOCS_FOLDER + page);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void expect_in_page(const std::string& page, const std::string& name, const std::string& text) {
  const std::string begin = "<!-- " + name + " -->\n", end = "<!-- end -->";
  const std::string all = read_page(page);
  const std::size_t from = all.find(begin);
  ASSERT_NE(from, std::string::npos) << "docs/" << page << " has no " << begin;
  const std::size_t first = from + begin.size();
  const std::string there = all.substr(first, all.find(end, first) - first);
  if (there == text) return;
  const std::string path = ::testing::TempDir() + name + ".md";
  std::ofstream(path) << text;
  ADD_FAILURE() << "docs/" << page << " does not show what the model says; that is in " << path;
}

/// The kernels of commit 83f6209, of which all distributions were measured
/// (docs/performance-kernels.md, "Fewer experts, uneven rows"): the table of 32 experts predicts
/// what 16 and 8 take, and uneven rows.
StageTable table_of_83f6209() {
  return {.num_experts = 32,
          .hidden = 7168,
          .intermediate = 2048,
          .fixed_us = 10,
          .rows = {1, 8, 16, 32, 64, 128, 256, 512, 1024},
          .us = {164.1, 167.7, 172.8, 184.9, 231.7, 403.2, 774.9, 1532, 3104},
          .one_expert_rows = {8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096},
          .one_expert_us = {30.1, 34.0, 39.8, 51.6, 52.0, 63.6, 65.6, 108.2, 212.6, 400.2}};
}

/// As `sluice bench experts --routing zipf` spreads them.
std::vector<double> zipf_rows(int num_experts, int mean) {
  double harmonic = 0;
  for (int e = 1; e <= num_experts; ++e) harmonic += 1.0 / e;
  const double total = mean * num_experts;
  std::vector<double> rows(static_cast<std::size_t>(num_experts));
  double left = total;
  for (int e = num_experts; e >= 1; --e) {
    const double share = e == 1 ? left : std::floor(total / (harmonic * e));
    rows[static_cast<std::size_t>(e - 1)] = share, left -= share;
  }
  return rows;
}

struct StageRow {
  std::string what;
  double bound;
  std::vector<double> us;
  std::function<double(int rows)> predict;
};

std::string check_stages(const std::vector<int>& sizes, const std::vector<StageRow>& all,
                         Summary& summary) {
  std::string text = "| rows per expert | us |", line = "|---|---|";
  for (const int size : sizes) text += fmt::format(" {} |", size), line += "---|";
  text += "\n" + line + "\n";
  double worst = 0;
  int num_figures = 0;
  for (const StageRow& row : all) {
    std::string is = fmt::format("| {} | measured |", row.what), said = "| | predicted |",
                errors = "| | error |";
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      if (row.us[i] == 0) {
        is += " |", said += " |", errors += " |";
        continue;
      }
      const double value = row.predict(sizes[i]), error = value / row.us[i] - 1;
      EXPECT_LE(std::fabs(error), row.bound) << row.what << ", " << sizes[i] << " rows: predicted "
                                             << value << ", measured " << row.us[i];
      worst = std::max(worst, std::fabs(error)), ++num_figures;
      summary.add(kOwnStages, error);
      is += fmt::format(" {} |", us(row.us[i])), said += fmt::format(" {} |", us(value));
      errors += fmt::format(" {} |", percent(error));
    }
    text += is + "\n" + said + "\n" + errors + "\n";
  }
  return fmt::format("Stages: {} figures, worst error {:.0f} %.\n\n", num_figures, 100 * worst) +
         text;
}

std::string stages_of_other_numbers_and_distributions(Summary& summary) {
  const StageTable then = table_of_83f6209();
  const std::vector<StageTable> now = machine_preset("h200-nvlink").stages;
  const ModelGeometry r1 = testing::sizes(7168, 8, 256);
  const auto even = [](const StageTable& table, const ModelGeometry& geometry, int experts) {
    return [=](int rows) {
      return stage_time(table, geometry,
                        std::vector<double>(static_cast<std::size_t>(experts), rows));
    };
  };
  const auto zipf = [&](int experts) {
    return [=](int rows) { return stage_time(then, r1, zipf_rows(experts, rows)); };
  };
  const auto one = [&](int experts) {
    return
        [=](int rows) { return stage_time(then, r1, std::vector<double>{1.0 * rows * experts}); };
  };
  // Tables of h200_stages(): 0 is INT4 in groups of 128, 3 in groups of 32, 6 MXFP4, all `direct`.
  return check_stages(
      {1, 8, 16, 32, 64, 128, 256, 512, 1024},
      {{"16 experts",
        0.05,
        {86.3, 87.8, 90.6, 95.9, 120.1, 214.0, 397.7, 772.2, 1526},
        even(then, r1, 16)},
       {"8 experts",
        0.05,
        {48.1, 49.2, 51.1, 53.9, 67.0, 108.8, 211.0, 396.0, 769.7},
        even(then, r1, 8)},
       {"32 experts by Zipf",
        0.65,
        {52.2, 170.7, 181.9, 212.9, 294.9, 477.2, 868.8, 1614, 3397},
        zipf(32)},
       {"16 by Zipf", 0.30, {43.4, 86.6, 93.7, 109.1, 149.2, 245.5, 445.7, 821.2, 1570}, zipf(16)},
       {"8 by Zipf", 0.25, {31.6, 52.1, 65.1, 62.7, 79.3, 122.2, 220.2, 410.0, 791.4}, zipf(8)},
       {"all rows to one of 32",
        0.15,
        {39.8, 63.7, 64.6, 123.8, 213.6, 400.8, 794.4, 1601, 3294},
        one(32)},
       {"256 experts of 256",
        0.30,
        {179.7, 0, 208.7, 0, 307.2, 0, 0, 0, 0},
        even(now[0], testing::sizes(7168, 8, 256, 256), 256)},
       {"128 experts of 512",
        0.10,
        {168, 0, 191, 0, 0, 0, 0, 0, 0},
        even(now[0], testing::sizes(7168, 8, 128, 512), 128)},
       {"Kimi-K2, groups of 32, 48 experts",
        0.05,
        {0, 273.1, 0, 322.3, 0, 881, 0, 0, 0},
        even(now[3], r1, 48)},
       {"V4-Flash, MXFP4, 32 of 4096 x 2048",
        0.20,
        {102.9, 0, 107.8, 0, 154.7, 247.5, 0, 0, 1807},
        even(now[6], testing::sizes(4096, 6, 256), 32)},
       {"Kimi-K3, MXFP4, 56 of 3584 x 3072",
        0.16,
        {229.3, 0, 241.6, 0, 362.6, 601.4, 0, 0, 4639},
        even(now[6], testing::sizes(3584, 16, 896, 3072), 56)}},
      summary);
}

TEST(NetworkMeasured, EveryFigureIsWithinItsBoundAndInThePage) {
  Summary summary;
  expect_in_page("clusters-checked.md", "measured-here",
                 check(testing::sluice_series(), "Figures of this project", true, summary).text);
  expect_in_page("clusters-checked.md", "stages",
                 stages_of_other_numbers_and_distributions(summary));
  expect_in_page("clusters-checked.md", "published",
                 check(testing::public_series(), "Published figures", false, summary).text);
  std::string lines = "| figures of | number | worst error |\n|---|---|---|\n";
  for (const char* kind :
       {kOverHosts, kOneHost, kFewExperts, kOwnExchange, kOwnLayers, kOwnStages}) {
    lines += summary.line(kind);
  }
  expect_in_page("clusters.md", "worst", lines);
}

}  // namespace
}  // namespace sluice
