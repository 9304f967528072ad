#include "sluice/lab/workload.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/counter_rng.h"
#include "core/fail.h"
#include "sluice/lab/parallel.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

// Independent streams of one seed.
enum WorkloadStream : std::uint64_t { kGainStream = 1, kOrderStream = 2, kTokenStream = 1000 };

constexpr double kGainSigma = 0.5;           // Log-normal spread of channel gains.
constexpr double kOutlierChannels = 0.002;   // Share of channels with a large gain...
constexpr double kOutlierGain = 15.0;        // ...and how large.
constexpr std::size_t kNumOutliers = 8;      // InputKind::kOutliers: so many channels...
constexpr double kSuiteOutlierGain = 40.0;   // ...so much larger.
constexpr double kMassiveTokens = 1.0 / 64;  // Share of tokens with massive activations...
constexpr double kMassiveValue =
    50.0;                          // ...of about this size: inside what checkpoints calibrate for.
constexpr int kMassiveEvery = 16;  // InputKind::kMassive: one token in so many...
constexpr double kMassiveSuiteValue = 1000;  // ...has two channels of about this size.

std::vector<double> channel_gains(const WorkloadSpec& spec) {
  const CounterRng rng(spec.seed, kGainStream);
  std::vector<double> gains(static_cast<std::size_t>(spec.hidden), 1.0);
  if (spec.input == InputKind::kOutliers || spec.input == InputKind::kTokenSpread) {
    const auto places = static_cast<std::size_t>(spec.num_outlier_places);
    for (std::size_t i = 0; i < kNumOutliers; ++i) {
      const std::size_t channel = i % places * (gains.size() / places) + 3 + i / places;
      gains[channel % gains.size()] = kSuiteOutlierGain;
    }
  }
  for (std::size_t c = 0; c < gains.size(); ++c) {
    if (spec.input == InputKind::kRealistic) {
      gains[c] = std::exp(kGainSigma * rng.normal(2 * c));
      if (rng.uniform(2 * c + 1) < kOutlierChannels) gains[c] *= kOutlierGain;
    }
  }
  return gains;
}

/// Cumulative popularity of experts under the spec's routing; uniform for kUniform.
std::vector<double> popularity(const WorkloadSpec& spec) {
  const CounterRng rng(spec.seed, kOrderStream);
  std::vector<int> order(static_cast<std::size_t>(spec.num_experts));
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.bits(i) % i]);
  std::vector<double> weight(order.size(), 1.0);
  if (spec.routing == RoutingKind::kZipf) {
    for (std::size_t i = 0; i < order.size(); ++i) {
      weight[static_cast<std::size_t>(order[i])] = 1.0 / static_cast<double>(i + 1);
    }
  }
  if (spec.routing == RoutingKind::kDeadExpert) weight.back() = 0;
  return weight;
}

/// Student's t with 4 degrees of freedom over its deviation sqrt(2): a normal over the root of a
/// chi-square of 4 = -2 ln(u v).
double student_t(const CounterRng& rng, std::uint64_t hidden, std::uint64_t c) {
  const double u = 1 - rng.uniform(hidden + 2 * c), v = 1 - rng.uniform(hidden + 2 * c + 1);
  return rng.normal(c) * std::sqrt(4 / (-2 * std::log(u * v))) / std::sqrt(2.0);
}

void fill_token(const WorkloadSpec& spec, const std::vector<double>& gains, std::uint64_t token,
                std::uint16_t* x) {
  const std::uint64_t hidden = gains.size();
  const CounterRng rng(spec.seed, kTokenStream + 2 * token);
  const CounterRng extra(spec.seed, kTokenStream + 2 * token + 1);
  double scale = 1;
  if (spec.input == InputKind::kTokenSpread) {
    scale = std::min(std::exp(extra.normal(0)), spec.max_token_scale);
  }
  for (std::uint64_t c = 0; c < hidden; ++c) {
    const double base =
        spec.input == InputKind::kStudentT ? student_t(rng, hidden, c) : rng.normal(c);
    x[c] = bf16_from_float(static_cast<float>(base * gains[c] * scale));
  }
  if (spec.input == InputKind::kRealistic && extra.uniform(0) < kMassiveTokens) {
    const std::uint64_t channel = extra.bits(1) % hidden;
    x[channel] = bf16_from_float(static_cast<float>(kMassiveValue * (1 + 0.2 * extra.normal(2))));
  }
  if (spec.input == InputKind::kMassive && token % kMassiveEvery == 0) {
    for (const std::uint64_t channel : {hidden / 3, 2 * hidden / 3}) {
      x[channel] = bf16_from_float(
          static_cast<float>(kMassiveSuiteValue * (1 + 0.2 * extra.normal(channel))));
    }
  }
}

void route_token(const WorkloadSpec& spec, const std::vector<double>& weight, const CounterRng& rng,
                 std::int32_t* idx, float* topk_weights) {
  std::fill_n(idx, spec.num_topk, -1);
  if (spec.routing == RoutingKind::kOneExpert) {
    idx[0] = 0;
  } else if (spec.routing == RoutingKind::kOneHot) {
    idx[0] = static_cast<std::int32_t>(rng.bits(0) % weight.size());
  } else {
    // Weighted sampling without replacement: the num_topk smallest exponential arrival times.
    std::vector<std::pair<double, int>> arrival(weight.size());
    for (std::size_t e = 0; e < weight.size(); ++e) {
      const double time = weight[e] > 0 ? -std::log1p(-rng.uniform(e)) / weight[e] : HUGE_VAL;
      arrival[e] = {time, static_cast<int>(e)};
    }
    const auto alive =
        static_cast<std::size_t>(std::ranges::count_if(weight, [](double w) { return w > 0; }));
    const auto count = std::min<std::size_t>(alive, static_cast<std::size_t>(spec.num_topk));
    std::partial_sort(arrival.begin(), arrival.begin() + static_cast<std::ptrdiff_t>(count),
                      arrival.end());
    for (std::size_t k = 0; k < count; ++k) idx[k] = arrival[k].second;
  }
  double sum = 0;
  std::vector<double> raw(static_cast<std::size_t>(spec.num_topk));
  for (std::size_t k = 0; k < raw.size(); ++k) {
    raw[k] = idx[k] < 0 ? 0.0 : 0.1 + rng.uniform(1'000'000 + k);
    sum += raw[k];
  }
  for (std::size_t k = 0; k < raw.size(); ++k) {
    topk_weights[k] = sum > 0 ? static_cast<float>(raw[k] / sum) : 0.0f;
  }
}

}  // namespace

RoutingKind parse_routing(std::string_view name) {
  if (name == "uniform") return RoutingKind::kUniform;
  if (name == "zipf") return RoutingKind::kZipf;
  if (name == "one-expert") return RoutingKind::kOneExpert;
  if (name == "dead-expert") return RoutingKind::kDeadExpert;
  if (name == "one-hot") return RoutingKind::kOneHot;
  fail(ErrorCode::kInvalidArgument,
       "routing '{}' is none of: uniform, zipf, one-expert, dead-expert, one-hot", name);
}

TensorView Workload::x_view() const {
  return {x.data(), DType::kBFloat16, Shape{num_tokens, hidden}};
}

Routing Workload::routing_view() const {
  const Shape shape{num_tokens, num_topk};
  return {.topk_idx = {topk_idx.data(), DType::kInt32, shape},
          .topk_weights = {topk_weights.data(), DType::kFloat32, shape}};
}

Workload make_workload(const WorkloadSpec& spec, std::int64_t first_token,
                       std::int64_t num_tokens) {
  check_argument(spec.num_experts > 0 && spec.num_topk > 0 && spec.hidden > 0,
                 "a workload of {} experts, top-{}, hidden {}: all must be positive",
                 spec.num_experts, spec.num_topk, spec.hidden);
  check_argument(spec.num_channels >= 0 && spec.num_channels <= spec.hidden,
                 "num_channels {} is not in [0, hidden {}]", spec.num_channels, spec.hidden);
  check_argument(num_tokens >= 0, "a workload of {} tokens", num_tokens);
  check_argument(spec.num_outlier_places >= 1 && spec.num_outlier_places <= 8,
                 "num_outlier_places {} is not in [1, 8]", spec.num_outlier_places);
  const std::vector<double> gains = channel_gains(spec);
  const std::vector<double> weight = popularity(spec);
  const auto tokens = static_cast<std::size_t>(num_tokens);
  const auto hidden = static_cast<std::size_t>(spec.hidden);
  const auto topk = static_cast<std::size_t>(spec.num_topk);

  Workload load{.x = std::vector<std::uint16_t>(tokens * hidden),
                .topk_idx = std::vector<std::int32_t>(tokens * topk),
                .topk_weights = std::vector<float>(tokens * topk),
                .num_tokens = num_tokens,
                .hidden = spec.hidden,
                .num_topk = spec.num_topk};
  const auto make = [&](std::size_t t) {
    const auto token = static_cast<std::uint64_t>(first_token) + t;
    fill_token(spec, gains, token, &load.x[t * hidden]);
    const CounterRng choice(spec.seed ^ 0x5bd1e995u, kTokenStream + token);
    if (spec.num_channels > 0) {
      std::fill(load.x.begin() + static_cast<std::ptrdiff_t>(t * hidden) + spec.num_channels,
                load.x.begin() + static_cast<std::ptrdiff_t>((t + 1) * hidden), std::uint16_t{0});
    }
    route_token(spec, weight, choice, &load.topk_idx[t * topk], &load.topk_weights[t * topk]);
  };
  constexpr std::size_t kTokensAtATime = 16;
  for_pieces_in_parallel(tokens, kTokensAtATime, [&](std::size_t first, std::size_t end) {
    for (std::size_t t = first; t < end; ++t) make(t);
  });
  return load;
}

}  // namespace sluice
