// The ceilings of `bench experts`: no kernel passes the arithmetic one, and a report in which one
// does is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "backend/ops.h"
#include "sluice/backend.h"
#include "sluice/error.h"
#include "sluice/lab/experts_bench.h"

namespace sluice::testing {
namespace {

ExpertsBenchReport report_of(double share) {
  ExpertsBenchReport report{.device = "a processor", .read_gbytes_per_s = 10, .peak_tflops = 0.5};
  report.cases.push_back({.num_experts = 8, .rows_per_expert = 64});
  report.cases.back().kernels = {{.name = "stage", .tflops = 0.2},
                                 {.name = "quantize"},
                                 {.name = "down", .tflops = 0.5 * share}};
  return report;
}

TEST(ExpertsBench, AShareOverAHundredPercentIsAnError) {
  for (const double fine : {0.0, 0.5, 1.0, 1.04}) EXPECT_NO_THROW(check_ceiling(report_of(fine)));
  for (const double wrong : {1.06, 88.82}) {
    try {
      check_ceiling(report_of(wrong));
      ADD_FAILURE() << "accepted " << wrong;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInternal);
      EXPECT_THAT(e.what(), ::testing::AllOf(::testing::HasSubstr("ceiling is wrong"),
                                             ::testing::HasSubstr("down of 8 experts with 64 rows"),
                                             ::testing::HasSubstr("of a processor")));
    }
  }
}

TEST(ExpertsBench, AnUnknownCeilingIsAnError) {
  ExpertsBenchReport report = report_of(0.5);
  report.peak_tflops = 0;
  EXPECT_THROW(check_ceiling(report), Error);
}

/// All cores together, of each kind of arithmetic, against one of them. Both are the best of ten
/// intervals in time that threads had a core for; cores that share units with others, or a clock
/// that falls when all work, take the tenth that is allowed.
TEST(ExpertsBench, AllThreadsReachWhatOneDoes) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "instrumented code has other limits than the processor's";
#endif
  const auto one = make_backend({.num_threads = 1});
  const auto all = make_backend({});
  const std::vector<ArithmeticRate> single = ops(*one).measure_arithmetic_rates();
  const std::vector<ArithmeticRate> whole = ops(*all).measure_arithmetic_rates();
  ASSERT_FALSE(single.empty());
  ASSERT_EQ(single.size(), whole.size());
  for (std::size_t i = 0; i < single.size(); ++i) {
    EXPECT_STREQ(single[i].kind, whole[i].kind);
    EXPECT_GT(single[i].operations_per_s, 1e9) << single[i].kind;  // A core of any speed.
    EXPECT_GE(whole[i].operations_per_s, 0.9 * single[i].operations_per_s) << single[i].kind;
  }
}

/// On weights that stay in the caches, which is as fast as the stage gets, with one thread and two.
TEST(ExpertsBench, NoKernelPassesTheArithmeticCeiling) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "instrumented code has other limits than the processor's";
#endif
  ExpertsBenchConfig config{.geometry = preset_geometry("tiny"),
                            .num_experts = {2},
                            .rows_per_expert = {1, 64},
                            .repeats = 3};
  for (const int threads : {1, 2}) {
    const auto backend = make_backend({.num_threads = threads});
    const ExpertsBenchReport report = bench_experts(config, *backend);
    ASSERT_GT(report.peak_tflops, 0);
    EXPECT_NO_THROW(check_ceiling(report)) << threads << " threads";
    const ExpertsBenchKernel& stage = report.cases.back().kernels.front();
    RecordProperty("stage_percent_of_dots_" + std::to_string(threads),
                   std::to_string(100 * stage.tflops / report.peak_tflops));
  }
}

}  // namespace
}  // namespace sluice::testing
