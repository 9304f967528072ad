#include <algorithm>
#include <array>

#include "core/fail.h"
#include "sluice/lab/accuracy.h"
#include "sluice/lab/synthetic.h"

namespace sluice {
namespace {

struct SuiteDefinition {
  const char* name;
  InputKind input;
  RoutingKind routing;
};

constexpr std::array kDefinitions = {
    SuiteDefinition{"gaussian", InputKind::kGaussian, RoutingKind::kUniform},
    SuiteDefinition{"student-t", InputKind::kStudentT, RoutingKind::kUniform},
    SuiteDefinition{"outliers", InputKind::kOutliers, RoutingKind::kUniform},
    SuiteDefinition{"massive", InputKind::kMassive, RoutingKind::kUniform},
    SuiteDefinition{"token-spread", InputKind::kTokenSpread, RoutingKind::kUniform},
    SuiteDefinition{"dead-expert", InputKind::kGaussian, RoutingKind::kDeadExpert},
    SuiteDefinition{"one-hot", InputKind::kGaussian, RoutingKind::kOneHot},
};

/// Three, three and two neighbours: with each outlier in a group of its own, scales per group would
/// cost next to nothing.
constexpr int kNumOutlierPlaces = 3;
/// Far behind every token that is judged.
constexpr std::int64_t kFirstCalibrationToken = std::int64_t{1} << 32;
constexpr std::int64_t kNumCalibrationTokens = 64;
constexpr std::int64_t kZeroTokenEvery = 16, kFirstZeroToken = 5;

}  // namespace

const std::vector<std::string>& suite_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const SuiteDefinition& d : kDefinitions) list.emplace_back(d.name);
    return list;
  }();
  return names;
}

TokenSuite make_suite(std::string_view name, const ModelGeometry& geometry, std::int64_t num_tokens,
                      std::uint64_t seed) {
  std::string known;
  for (const SuiteDefinition& d : kDefinitions) {
    known += std::string(known.empty() ? "" : ", ") + d.name;
    if (name != d.name) continue;
    WorkloadSpec spec{.num_experts = geometry.num_experts,
                      .num_topk = geometry.num_topk,
                      .hidden = geometry.hidden,
                      .routing = d.routing,
                      .input = d.input,
                      .seed = seed,
                      .num_outlier_places = kNumOutlierPlaces,
                      .num_channels = geometry.token_width()};
    TokenSuite suite{
        .name = d.name, .tokens = make_workload(spec, 0, num_tokens), .calibration = {}};
    if (d.routing == RoutingKind::kDeadExpert) {  // Padding tokens: nothing but zeros.
      const auto hidden = static_cast<std::int64_t>(geometry.hidden);
      for (std::int64_t t = kFirstZeroToken; t < num_tokens; t += kZeroTokenEvery) {
        std::fill_n(suite.tokens.x.begin() + t * hidden, hidden, std::uint16_t{0});
      }
    }
    spec.max_token_scale = 1;  // Only kTokenSpread has one: its calibration misses the tail.
    suite.calibration = make_workload(spec, kFirstCalibrationToken, kNumCalibrationTokens);
    return suite;
  }
  fail(ErrorCode::kInvalidArgument, "suite '{}' is none of: {}", name, known);
}

}  // namespace sluice
