// traces.h - synthetic rows per expert over time, for comparing balancers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "core/counter_rng.h"

namespace sluice::traces {

using Trace = std::vector<std::vector<std::int64_t>>;  ///< [num_steps][num_experts]

/// Experts in a seeded order.
inline std::vector<std::size_t> shuffled(std::size_t num_experts, std::uint64_t seed) {
  std::vector<std::size_t> order(num_experts);
  std::iota(order.begin(), order.end(), std::size_t{0});
  const CounterRng rng(seed, 1);
  for (std::size_t i = num_experts; i > 1; --i) std::swap(order[i - 1], order[rng.bits(i) % i]);
  return order;
}

/// `rows` rows in all, shared out by `weights`, each within the noise of counting.
inline std::vector<std::int64_t> sample(const std::vector<double>& weights, double rows,
                                        std::uint64_t seed, std::uint64_t step) {
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  const CounterRng rng(seed, 100 + step);
  std::vector<std::int64_t> counts;
  for (std::size_t e = 0; e < weights.size(); ++e) {
    const double mean = rows * weights[e] / sum;
    counts.push_back(
        std::max<std::int64_t>(0, std::llround(mean + std::sqrt(mean) * rng.normal(e))));
  }
  return counts;
}

/// The i-th expert of a seeded order has a share of 1 / (i + 1)^exponent.
inline Trace zipf(std::size_t num_experts, std::size_t num_steps, double exponent,
                  std::uint64_t seed) {
  const std::vector<std::size_t> order = shuffled(num_experts, seed);
  std::vector<double> weights(num_experts);
  for (std::size_t i = 0; i < num_experts; ++i) {
    weights[order[i]] = std::pow(static_cast<double>(i + 1), -exponent);
  }
  Trace trace;
  for (std::size_t t = 0; t < num_steps; ++t) trace.push_back(sample(weights, 65536, seed, t));
  return trace;
}

/// Zipf, whose order turns: every step the most popular expert is another one, step by step.
inline Trace drifting(std::size_t num_experts, std::size_t num_steps, std::uint64_t seed) {
  const std::vector<std::size_t> order = shuffled(num_experts, seed);
  Trace trace;
  for (std::size_t t = 0; t < num_steps; ++t) {
    std::vector<double> weights(num_experts);
    for (std::size_t i = 0; i < num_experts; ++i) {
      weights[order[(i + t) % num_experts]] = std::pow(static_cast<double>(i + 1), -0.8);
    }
    trace.push_back(sample(weights, 65536, seed, t));
  }
  return trace;
}

/// Even, but for four experts that get thirty times their share during eight steps.
inline Trace bursty(std::size_t num_experts, std::size_t num_steps, std::uint64_t seed) {
  Trace trace;
  for (std::size_t t = 0; t < num_steps; ++t) {
    std::vector<double> weights(num_experts, 1.0);
    const CounterRng rng(seed, 50 + t / 8);
    for (std::uint64_t i = 0; i < 4; ++i) weights[rng.bits(i) % num_experts] = 30;
    trace.push_back(sample(weights, 65536, seed, t));
  }
  return trace;
}

/// Rows of steps [first, first + count) together.
inline std::vector<std::int64_t> window(const Trace& trace, std::size_t first, std::size_t count) {
  std::vector<std::int64_t> sum(trace.front().size());
  for (std::size_t t = first; t < first + count; ++t) {
    for (std::size_t e = 0; e < sum.size(); ++e) sum[e] += trace[t][e];
  }
  return sum;
}

}  // namespace sluice::traces
