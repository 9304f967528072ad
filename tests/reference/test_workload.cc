// Synthetic tokens: the same global tokens however they are spread, with the statistics promised.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <set>

#include "sluice/error.h"
#include "sluice/lab/workload.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

const WorkloadSpec kSpec{.num_experts = 32, .num_topk = 8, .hidden = 1024, .seed = 3};

TEST(Workload, ATokenDependsOnSeedAndIndexAlone) {
  const Workload all = make_workload(kSpec, 0, 20);
  const Workload part = make_workload(kSpec, 13, 5);
  EXPECT_TRUE(std::equal(part.x.begin(), part.x.end(), all.x.begin() + 13 * 1024));
  EXPECT_TRUE(
      std::equal(part.topk_idx.begin(), part.topk_idx.end(), all.topk_idx.begin() + 13 * 8));
  EXPECT_TRUE(std::equal(part.topk_weights.begin(), part.topk_weights.end(),
                         all.topk_weights.begin() + 13 * 8));
  WorkloadSpec other = kSpec;
  other.seed = 4;
  EXPECT_NE(make_workload(other, 0, 20).x, all.x);
}

TEST(Workload, ExpertsOfATokenAreDistinctAndWeightsSumToOne) {
  for (const RoutingKind routing : {RoutingKind::kUniform, RoutingKind::kZipf}) {
    WorkloadSpec spec = kSpec;
    spec.routing = routing;
    const Workload load = make_workload(spec, 0, 50);
    for (int t = 0; t < 50; ++t) {
      const std::set<int> experts(&load.topk_idx[t * 8], &load.topk_idx[t * 8] + 8);
      EXPECT_EQ(experts.size(), 8u);
      EXPECT_GE(*experts.begin(), 0);
      EXPECT_LT(*experts.rbegin(), 32);
      EXPECT_NEAR(std::accumulate(&load.topk_weights[t * 8], &load.topk_weights[t * 8] + 8, 0.0),
                  1.0, 1e-6);
    }
  }
}

std::vector<int> histogram(const Workload& load, int num_experts) {
  std::vector<int> rows(static_cast<std::size_t>(num_experts));
  for (const int e : load.topk_idx) {
    if (e >= 0) ++rows[static_cast<std::size_t>(e)];
  }
  return rows;
}

TEST(Workload, ZipfIsSkewedUniformIsNot) {
  WorkloadSpec spec = kSpec;
  spec.hidden = 128, spec.num_experts = 128, spec.num_topk = 2;
  const auto uniform = histogram(make_workload(spec, 0, 2000), 128);
  spec.routing = RoutingKind::kZipf;
  const auto zipf = histogram(make_workload(spec, 0, 2000), 128);
  const double mean = 2000.0 * 2 / 128;
  EXPECT_LT(*std::max_element(uniform.begin(), uniform.end()), 2 * mean);
  EXPECT_GT(*std::max_element(zipf.begin(), zipf.end()), 10 * mean);
}

TEST(Workload, OneExpertFillsSlotZeroOnly) {
  WorkloadSpec spec = kSpec;
  spec.routing = RoutingKind::kOneExpert;
  const Workload load = make_workload(spec, 0, 3);
  for (std::size_t i = 0; i < load.topk_idx.size(); ++i) {
    EXPECT_EQ(load.topk_idx[i], i % 8 == 0 ? 0 : -1);
    EXPECT_EQ(load.topk_weights[i], i % 8 == 0 ? 1.0f : 0.0f);
  }
}

TEST(Workload, InputsHaveTheirStatistics) {
  WorkloadSpec spec = kSpec;
  spec.input = InputKind::kGaussian;
  const Workload gaussian = make_workload(spec, 0, 100);
  double sum = 0, squares = 0;
  for (const auto bits : gaussian.x) {
    const double v = bf16_to_float(bits);
    sum += v, squares += v * v;
  }
  const double n = static_cast<double>(gaussian.x.size());
  EXPECT_NEAR(sum / n, 0.0, 0.01);
  EXPECT_NEAR(squares / n, 1.0, 0.02);

  spec.input = InputKind::kOutliers;
  const auto large_channels = [&] {
    const Workload outliers = make_workload(spec, 0, 100);
    std::vector<int> large;
    for (int c = 0; c < 1024; ++c) {
      double power = 0;
      for (int t = 0; t < 100; ++t)
        power += std::pow(bf16_to_float(outliers.x[t * 1024 + c]), 2) / 100;
      if (power > 400) large.push_back(c);
    }
    return large;
  };
  EXPECT_EQ(large_channels(), (std::vector<int>{3, 131, 259, 387, 515, 643, 771, 899}));
  spec.num_outlier_places = 3;
  EXPECT_EQ(large_channels(), (std::vector<int>{3, 4, 5, 344, 345, 346, 685, 686}));
}

TEST(Workload, NonsenseIsRefused) {
  EXPECT_THROW((void)make_workload({}, 0, 1), Error);
  EXPECT_THROW((void)make_workload(kSpec, 0, -1), Error);
  EXPECT_THROW((void)parse_routing("random"), Error);
  for (const int places : {0, 9}) {
    WorkloadSpec spec = kSpec;
    spec.num_outlier_places = places;
    EXPECT_THROW((void)make_workload(spec, 0, 1), Error);
  }
}

}  // namespace
}  // namespace sluice
