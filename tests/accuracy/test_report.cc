// The JSON has its schema; the report is one file that needs nothing else and that a browser draws.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "accuracy_fixture.h"
#include "accuracy_json.h"
#include "accuracy_report.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using Json = nlohmann::ordered_json;

/// What `sluice accuracy --json` writes, for two suites.
Json example() {
  const auto source = make_synthetic_source(accuracy_geometry(), 1);
  Json json = {{"command", "accuracy"},
               {"version", "test"},
               {"source", "preset <test> & more"},
               {"original_weights", source->original_kind()},
               {"geometry",
                {{"num_experts", 6},
                 {"num_topk", 3},
                 {"hidden", 384},
                 {"intermediate", 256},
                 {"group_size", 128}}},
               {"tokens", 9},
               {"seed", 1},
               {"suites", Json::array()}};
  std::vector<SuiteCertificate> suites;
  for (const char* name : {"gaussian", "token-spread"}) {
    suites.push_back(certify(*source, make_suite(name, accuracy_geometry(), 9, 1), {}));
    json["suites"].push_back(cli::to_json(suites.back()));
  }
  IdentityProof proof;
  proof.direct = proof.direct_bf16 = proof.definition = 0xabcdef;
  json["identity"] = {cli::to_json(proof)};
  json["budget"] = cli::to_json(judge_budget(suites, RecipeName::kDirect, 0.0));
  return json;
}

TEST(AccuracyJson, Schema) {
  const Json json = example();
  ASSERT_EQ(json["suites"].size(), 2u);
  for (const Json& suite : json["suites"]) {
    EXPECT_EQ(suite["num_tokens"], 9);
    EXPECT_EQ(suite["static_scales"]["experts"].size(), 6u);
    ASSERT_EQ(suite["recipes"].size(), all_recipes().size());
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
  EXPECT_EQ(json["identity"][0]["direct"], "0000000000abcdef");
  EXPECT_TRUE(json["identity"][0]["passed"]);
  EXPECT_EQ(json["budget"]["recipe"], "direct");
}

TEST(AccuracyReport, IsOneFileThatPointsNowhere) {
  const std::string html = cli::accuracy_report(example());
  for (const char* outside : {"http:", "https:", "//", "src=", "href=", "url(", "@import",
                              "<script", "<link", "<iframe"}) {
    EXPECT_THAT(html, Not(HasSubstr(outside)));
  }
  EXPECT_THAT(html, HasSubstr("<svg"));
  EXPECT_THAT(html, HasSubstr("preset &lt;test&gt; &amp; more"));
  EXPECT_THAT(html, HasSubstr("requant-static"));
  EXPECT_THAT(html, HasSubstr("Identity, low-latency: PASS"));
}

TEST(AccuracyReport, SurvivesWhatWasRefusedOrInfinite) {
  Json json = example();
  json.erase("budget");
  json["suites"][0]["recipes"][3] = {{"name", "requant-static"}, {"refused", "no scales"}};
  json["suites"][1]["recipes"][0]["output"]["relative_l2"] = nullptr;
  json["suites"][1]["recipes"][0]["total"] = nullptr;
  json["suites"][1]["recipes"][0]["added_percent"] = nullptr;
  json["suites"][1]["recipes"][0]["token_errors"][2] = nullptr;
  EXPECT_THAT(cli::accuracy_report(json), HasSubstr("</html>"));
}

TEST(AccuracyReport, IsDrawnByABrowser) {
  if (std::system("command -v chromium > /dev/null 2>&1") != 0) {
    GTEST_SKIP() << "chromium is not installed";
  }
  const auto dir =
      std::filesystem::temp_directory_path() / ("sluice-report-" + std::to_string(::getpid()));
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "report.html") << cli::accuracy_report(example());
  const std::string command =
      "timeout 90 chromium --headless --no-sandbox --disable-gpu --user-data-dir=" +
      (dir / "profile").string() +
      " --window-size=1200,2000 --screenshot=" + (dir / "report.png").string() + " file://" +
      (dir / "report.html").string() + " > /dev/null 2>&1";
  EXPECT_EQ(std::system(command.c_str()), 0);
  // An empty page of this size compresses to about 10 kB.
  EXPECT_GT(std::filesystem::file_size(dir / "report.png"), 60'000u);
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace sluice::testing
