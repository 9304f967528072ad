// The report of a placement: one file that needs nothing else, with a block for every filled slot.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "report/placement_report.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using Json = nlohmann::ordered_json;

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++n;
  return n;
}

/// Two ranks, three experts, of which the first has most rows.
Json layer(int number) {
  return {
      {"layer", number},
      {"rows", 100},
      {"rows_per_expert", {80, 10, 10}},
      {"before",
       {{"max_over_mean", 1.8},
        {"rows_per_rank", {90.0, 10.0}},
        {"slot_experts", {0, 1, 2, nullptr}}}},
      {"after",
       {{"max_over_mean", 1.0}, {"rows_per_rank", {50.0, 50.0}}, {"slot_experts", {0, 1, 2, 0}}}},
      {"steps", {{"before", {1.9, 1.7}}, {"after", {1.1, 1.0}}}},
      {"num_replicas", 1},
      {"num_empty", 0},
      {"num_moves", 1}};
}

Json example(int num_layers) {
  Json json = {{"version", "0.1.0"}, {"counts", "<counts>"}, {"previous", "none"},
               {"num_experts", 3},   {"num_ranks", 2},       {"num_slots", 4},
               {"num_hosts", 1},     {"window", 2}};
  for (int i = 0; i < num_layers; ++i) json["layers"].push_back(layer(i));
  return json;
}

TEST(PlacementReport, HasABlockForEveryFilledSlot) {
  const std::string html = report::placement_report(example(1));
  EXPECT_EQ(count(html, "<rect"), 7u);
  EXPECT_EQ(count(html, "one of 2 replicas"), 2u);
  EXPECT_THAT(html, HasSubstr("rank 0, expert 0: 80 rows</title>"));
  EXPECT_THAT(html, HasSubstr("rank 1, expert 0: 40 rows, one of 2 replicas</title>"));
  EXPECT_THAT(html, HasSubstr("before: the fullest rank has 1.800 x the mean"));
  EXPECT_THAT(html, HasSubstr("Layer 0 over time"));
}

TEST(PlacementReport, DrawsSixLayersAtMostAndListsAll) {
  Json json = example(9);
  json["layers"][8]["before"]["max_over_mean"] = 1.9;  // The one with the most to gain comes first.
  const std::string html = report::placement_report(json);
  EXPECT_EQ(count(html, "<rect"), 6 * 7u);
  EXPECT_EQ(count(html, "<tr><td>"), 9u);
  EXPECT_LT(html.find("<h3>Layer 8</h3>"), html.find("<h3>Layer 0</h3>"));
}

TEST(PlacementReport, IsOneFileThatPointsNowhere) {
  const std::string html = report::placement_report(example(2));
  for (const char* outside :
       {"http:", "https:", "//", "src=", "href=", "url(", "@import", "<script", "<link"}) {
    EXPECT_THAT(html, Not(HasSubstr(outside)));
  }
  EXPECT_THAT(html, Not(HasSubstr("<counts>")));
  EXPECT_THAT(html, HasSubstr("&lt;counts&gt;"));
  for (const char* tag : {"section", "table", "svg", "div", "p", "main", "html"}) {
    EXPECT_EQ(count(html, std::string("<") + tag + " ") + count(html, std::string("<") + tag + ">"),
              count(html, std::string("</") + tag + ">"))
        << tag;
  }
}

}  // namespace
}  // namespace sluice
