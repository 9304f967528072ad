// The suites have the statistics they promise.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "sluice/error.h"
#include "sluice/lab/accuracy.h"
#include "sluice/quant.h"

namespace sluice::testing {
namespace {

ModelGeometry geometry() {
  return {.name = "stat", .num_experts = 16, .num_topk = 4, .hidden = 1024, .intermediate = 128};
}

std::vector<double> values(const Workload& load, std::int64_t token) {
  std::vector<double> row;
  for (int c = 0; c < load.hidden; ++c) {
    row.push_back(bf16_to_float(load.x[static_cast<std::size_t>(token * load.hidden + c)]));
  }
  return row;
}

double root_mean_square(const std::vector<double>& row) {
  double sum = 0;
  for (const double v : row) sum += v * v;
  return std::sqrt(sum / static_cast<double>(row.size()));
}

TEST(Suites, EveryNameMakesOneAndNoOtherDoes) {
  EXPECT_EQ(suite_names().size(), 7u);
  for (const std::string& name : suite_names()) {
    const TokenSuite suite = make_suite(name, geometry(), 5, 1);
    EXPECT_EQ(suite.name, name);
    EXPECT_EQ(suite.tokens.num_tokens, 5);
    EXPECT_GT(suite.calibration.num_tokens, 0);
    EXPECT_NE(suite.tokens.x[0], suite.calibration.x[0]);
  }
  EXPECT_THROW((void)make_suite("normal", geometry(), 5, 1), Error);
}

TEST(Suites, StudentTHasHeavyTailsAndVarianceOne) {
  const Workload load = make_suite("student-t", geometry(), 64, 1).tokens;
  double squares = 0;
  std::int64_t beyond = 0;
  for (std::int64_t t = 0; t < 64; ++t) {
    for (const double v : values(load, t)) squares += v * v, beyond += std::fabs(v) > 4 ? 1 : 0;
  }
  const double count = 64.0 * 1024;
  EXPECT_NEAR(squares / count, 1, 0.15);
  // P(|t4| > 4 sqrt 2) = 0.0048; a normal variable has 0.00006.
  EXPECT_NEAR(static_cast<double>(beyond) / count, 0.0048, 0.0012);
}

TEST(Suites, MassiveTokensHaveTwoHugeChannels) {
  const Workload load = make_suite("massive", geometry(), 33, 1).tokens;
  for (std::int64_t t = 0; t < 33; ++t) {
    const auto row = values(load, t);
    EXPECT_EQ(std::ranges::count_if(row, [](double v) { return std::fabs(v) > 100; }),
              t % 16 == 0 ? 2 : 0)
        << t;
  }
}

TEST(Suites, TokenSpreadCalibrationMissesTheTail) {
  const TokenSuite suite = make_suite("token-spread", geometry(), 64, 1);
  const auto largest = [](const Workload& load) {
    double most = 0;
    for (std::int64_t t = 0; t < load.num_tokens; ++t) {
      most = std::max(most, root_mean_square(values(load, t)));
    }
    return most;
  };
  EXPECT_GT(largest(suite.tokens), 3 * largest(suite.calibration));
}

TEST(Suites, TheLastExpertIsDeadAndPaddingIsZero) {
  const Workload load = make_suite("dead-expert", geometry(), 40, 1).tokens;
  const std::set<std::int32_t> seen(load.topk_idx.begin(), load.topk_idx.end());
  EXPECT_EQ(seen.size(), 15u);
  EXPECT_FALSE(seen.contains(15));
  EXPECT_EQ(root_mean_square(values(load, 5)), 0);
  EXPECT_EQ(root_mean_square(values(load, 21)), 0);
  EXPECT_GT(root_mean_square(values(load, 6)), 0.5);
}

TEST(Suites, OneHotTokensGoToOneExpertEach) {
  const Workload load = make_suite("one-hot", geometry(), 200, 1).tokens;
  std::set<std::int32_t> seen;
  for (std::size_t t = 0; t < 200; ++t) {
    seen.insert(load.topk_idx[t * 4]);
    EXPECT_EQ(load.topk_weights[t * 4], 1.0f);
    for (std::size_t k = 1; k < 4; ++k) {
      EXPECT_EQ(load.topk_idx[t * 4 + k], -1);
      EXPECT_EQ(load.topk_weights[t * 4 + k], 0.0f);
    }
  }
  EXPECT_EQ(seen.size(), 16u);
}

}  // namespace
}  // namespace sluice::testing
