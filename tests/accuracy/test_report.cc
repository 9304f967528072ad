// The JSON has its schema; the report is one file that needs nothing else.
#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "report/accuracy_html.h"
#include "report/accuracy_report.h"
#include "report_example.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using Json = nlohmann::ordered_json;

TEST(AccuracyJson, Schema) {
  const Json json = report_example();
  ASSERT_EQ(json["suites"].size(), 2u);
  for (const Json& suite : json["suites"]) {
    EXPECT_EQ(suite["num_tokens"], 9);
    EXPECT_EQ(suite["static_scales"]["experts"].size(), 6u);
    ASSERT_EQ(suite["recipes"].size(), named_recipes().size());
    for (const Json& r : suite["recipes"]) {
      for (const char* what : {"activation1", "output", "total", "total_bf16_input"}) {
        for (const char* field : {"relative_l2", "sqnr_db", "worst_token", "worst_token_error",
                                  "p99_token_error", "p99_channel_error"}) {
          EXPECT_TRUE(r.at(what).at(field).is_number()) << what << '.' << field;
        }
      }
      for (const char* field : {"weights", "activation1", "activation2", "accumulation", "combine",
                                "together", "quadrature", "together_over_quadrature"}) {
        EXPECT_TRUE(r.at("roundings").at(field).is_number()) << field;
      }
      for (const char* casts : {"gemm1_casts", "gemm2_casts"}) {
        for (const char* field : {"values", "saturated", "underflowed"}) {
          EXPECT_TRUE(r.at(casts).at(field).is_number_unsigned());
        }
      }
      EXPECT_TRUE(r.at("added_percent").is_number());
      EXPECT_EQ(r.at("token_errors").size(), 9u);
      EXPECT_EQ(r.at("channel_profile").size(), 128u);
    }
  }
  for (const Json& expert : json["suites"][1]["static_scales"]["experts"]) {
    for (const char* field : {"rows", "amax1", "amax2", "clip_rate1", "clip_rate2", "scale1",
                              "scale2", "own_headroom1", "own_headroom2"}) {
      EXPECT_TRUE(expert.at(field).is_number()) << field;
    }
  }
  EXPECT_EQ(json["identity"][0]["direct"], "0000000000abcdef");
  EXPECT_TRUE(json["identity"][0]["passed"]);
  EXPECT_EQ(json["budget"]["recipe"], "direct");
}

TEST(AccuracyReport, IsOneFileThatPointsNowhere) {
  const std::string html = report::accuracy_report(report_example());
  for (const char* outside : {"http:", "https:", "//", "src=", "href=", "url(", "@import",
                              "<script", "<link", "<iframe"}) {
    EXPECT_THAT(html, Not(HasSubstr(outside)));
  }
  EXPECT_THAT(html, HasSubstr("<svg"));
  EXPECT_THAT(html, HasSubstr("preset &lt;test&gt; &amp; more"));
  EXPECT_THAT(html, HasSubstr("requant-static"));
  EXPECT_THAT(html, HasSubstr("Identity, low-latency: PASS"));
}

/// Every number of a certificate is in the page, as the JSON has it.
TEST(AccuracyReport, ShowsEveryNumberOfEveryRecipe) {
  const Json json = report_example();
  const std::string html = report::accuracy_report(json);
  for (const char* column : {"SQNR", "worst token", "p99 token", "p99 channel", "saturated",
                             "underflowed", "adds", "ratio"}) {
    EXPECT_THAT(html, HasSubstr(fmt::format("<th>{}</th>", column)));
  }
  for (const Json& suite : json["suites"]) {
    for (const Json& r : suite["recipes"]) {
      EXPECT_THAT(html, HasSubstr(fmt::format("{:.1f} dB", r["output"]["sqnr_db"].get<double>())));
      EXPECT_THAT(html, HasSubstr(report::percent(r["output"]["p99_channel_error"])));
      EXPECT_THAT(html,
                  HasSubstr(fmt::format(
                      "<td>{} + {}</td><td>{} + {}</td>", r["gemm1_casts"]["saturated"].dump(),
                      r["gemm2_casts"]["saturated"].dump(), r["gemm1_casts"]["underflowed"].dump(),
                      r["gemm2_casts"]["underflowed"].dump())));
      EXPECT_THAT(html,
                  HasSubstr(fmt::format("<td>{:.3f}</td></tr>",
                                        r["roundings"]["together_over_quadrature"].get<double>())));
    }
  }
}

TEST(AccuracyReport, SaysWhyARecipeWasRefused) {
  Json json = report_example();
  json["suites"][0]["recipes"][3] = {{"name", "requant-static"}, {"refused", "there are <none>"}};
  EXPECT_THAT(report::accuracy_report(json), HasSubstr("refused: there are &lt;none&gt;"));
}

/// Scales of a calibration belong to the layer; a checkpoint's to each expert.
TEST(AccuracyReport, ShowsExpertsOwnScalesWhereThereAreAny) {
  Json json = report_example();
  EXPECT_THAT(report::accuracy_report(json), Not(HasSubstr("<th>own headroom</th>")));
  for (Json& expert : json["suites"][0]["static_scales"]["experts"]) {
    expert["scale1"] = 0.125, expert["own_headroom1"] = 0.5;
  }
  EXPECT_THAT(report::accuracy_report(json), HasSubstr("<td>0.125</td><td class='w2'>0.5x</td>"));
}

/// Kimi's kind: no static scales at all, so nothing is drawn of them.
TEST(AccuracyReport, WithoutStaticScalesThereIsNoHeadroom) {
  Json json = report_example();
  for (Json& suite : json["suites"]) {
    suite["static_scales"]["origin"] = "none";
    suite["static_scales"]["recommendation"] = "no static scales: use direct";
  }
  const std::string html = report::accuracy_report(json);
  EXPECT_THAT(html, HasSubstr("no static scales: use direct"));
  EXPECT_THAT(html, Not(HasSubstr("Experts with the least headroom")));
}

TEST(AccuracyReport, SurvivesWhatWasRefusedOrInfinite) {
  Json json = report_example();
  json.erase("budget");
  json["suites"][0]["recipes"][3] = {{"name", "requant-static"}, {"refused", "no scales"}};
  json["suites"][1]["recipes"][0]["output"]["relative_l2"] = nullptr;
  json["suites"][1]["recipes"][0]["total"] = nullptr;
  json["suites"][1]["recipes"][0]["added_percent"] = nullptr;
  json["suites"][1]["recipes"][0]["token_errors"][2] = nullptr;
  EXPECT_THAT(report::accuracy_report(json), HasSubstr("</html>"));
}

TEST(AccuracyLayers, TheWorstIsNamedAndShownInFull) {
  const Json json = layers_example();
  EXPECT_EQ(json["layers"].size(), 3u);
  EXPECT_EQ(json["worst_layer"], 4);
  EXPECT_EQ(json["passed"], false);
  EXPECT_EQ(json["budget"], json["layers"][1]["budget"]);
  const std::string html = report::accuracy_report(json);
  EXPECT_THAT(html, HasSubstr("All 3 layers: FAIL"));
  EXPECT_THAT(html, HasSubstr("Layer 4</h1>"));
  EXPECT_THAT(html, HasSubstr("layers 3 to 9"));
  const std::string printed = report::layers_text(json);
  EXPECT_THAT(printed, HasSubstr("FAIL: 4\n"));
  // token-spread clips in every layer: the row shows its headroom, not that of the tame suite.
  const Json& spread = json["layers"][0]["suites"][1]["static_scales"];
  EXPECT_THAT(printed, HasSubstr(fmt::format("{:.3g}x", spread["headroom1"].get<double>())));
  EXPECT_THAT(printed,
              HasSubstr("layer 9, token-spread: " + spread["recommendation"].get<std::string>()));
}

TEST(AccuracyLayers, AFailedLayerIsWorseThanALargerError) {
  std::vector<Json> layers = {report_example(), report_example()};
  layers[0]["passed"] = true;
  layers[1]["layer"] = 5;
  layers[1]["suites"][0]["recipes"][0]["added_percent"] = 0.1;
  layers[1]["suites"][1]["recipes"][0]["added_percent"] = 0.1;
  EXPECT_EQ(report::join_layers(layers)["worst_layer"], 5);
  layers[1]["passed"] = true;
  EXPECT_EQ(report::join_layers(layers)["worst_layer"], 3);
  EXPECT_EQ(report::join_layers(layers)["passed"], true);
}

}  // namespace
}  // namespace sluice::testing
