#include "bench/local_calls.h"

#include <algorithm>
#include <array>
#include <chrono>

#include "core/fail.h"
#include "sluice/lab/parallel.h"

namespace sluice {
namespace {

constexpr std::int64_t kDistinctTokens = 512;  // Further ones repeat them.
constexpr int kHostCalls = 32;                 // Fewer than a device queues before it blocks.

LocalGroupConfig config_of(const ModelGeometry& geometry, std::int64_t max_tokens) {
  return {.hidden = geometry.hidden,
          .intermediate = geometry.intermediate,
          .max_entries = max_tokens * geometry.num_topk};
}

}  // namespace

LocalCalls::LocalCalls(Backend& backend, const ModelGeometry& geometry, std::int64_t max_rows,
                       std::uint64_t seed)
    : backend_(backend),
      stream_(backend.stream()),
      num_topk_(geometry.num_topk),
      hidden_(geometry.hidden),
      max_tokens_((max_rows + geometry.num_topk - 1) / geometry.num_topk),
      group_(LocalGroup::create(config_of(geometry, max_tokens_), backend)) {
  load_ = make_workload({.num_experts = geometry.num_topk,
                         .num_topk = geometry.num_topk,
                         .hidden = geometry.hidden,
                         .input = InputKind::kGaussian,
                         .seed = seed},
                        0, std::min(kDistinctTokens, max_tokens_));
  const auto tokens = static_cast<std::size_t>(max_tokens_);
  const auto entries = tokens * static_cast<std::size_t>(num_topk_);
  const std::size_t row_bytes = static_cast<std::size_t>(hidden_) * sizeof(std::uint16_t);
  x_ = backend.allocate(tokens * row_bytes);
  y_ = backend.allocate(tokens * row_bytes);
  topk_idx_ = backend.allocate(entries * sizeof(std::int32_t));
  topk_weights_ = backend.allocate(entries * sizeof(float));
  for (std::int64_t t = 0; t < max_tokens_; t += load_.num_tokens) {
    const auto count = static_cast<std::size_t>(std::min(load_.num_tokens, max_tokens_ - t));
    backend.copy_from_host(x_->data() + static_cast<std::size_t>(t) * row_bytes, load_.x.data(),
                           count * row_bytes, stream_);
  }
  const std::vector<float> weights(entries, 1.0f / static_cast<float>(num_topk_));
  backend.copy_from_host(topk_weights_->data(), weights.data(), entries * sizeof(float), stream_);
}

void LocalCalls::use(const ExpertWeights& weights, std::size_t num_copies) {
  layers_.clear();
  while (layers_.size() < num_copies) layers_.push_back(group_.add_layer(weights));
}

void LocalCalls::arrange(const std::vector<std::int32_t>& num_rows) {
  std::vector<std::int32_t> expert_of_row;
  for (std::size_t e = 0; e < num_rows.size(); ++e) {
    expert_of_row.insert(expert_of_row.end(), static_cast<std::size_t>(num_rows[e]),
                         static_cast<std::int32_t>(e));
  }
  const auto topk = static_cast<std::size_t>(num_topk_);
  const std::size_t tokens = (expert_of_row.size() + topk - 1) / topk;
  expert_of_row.resize(tokens * topk, -1);
  num_tokens_ = static_cast<std::int64_t>(tokens);
  idx_.resize(tokens * topk);
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t k = 0; k < topk; ++k) idx_[t * topk + k] = expert_of_row[k * tokens + t];
  }
  backend_.copy_from_host(topk_idx_->data(), idx_.data(), idx_.size() * sizeof(std::int32_t),
                          stream_);
}

void LocalCalls::forward(std::size_t copy) {
  const Device device = backend_.device();
  const Shape rows{num_tokens_, hidden_}, entries{num_tokens_, num_topk_};
  MutableTensorView y;
  y.data = y_->data(), y.dtype = DType::kBFloat16, y.shape = rows, y.device = device;
  layers_[copy].forward({x_->data(), DType::kBFloat16, rows, device},
                        {.topk_idx = {topk_idx_->data(), DType::kInt32, entries, device},
                         .topk_weights = {topk_weights_->data(), DType::kFloat32, entries, device}},
                        y, stream_);
}

double LocalCalls::check(const LayerReference& reference) {
  forward(0);
  const auto topk = static_cast<std::size_t>(num_topk_), hidden = static_cast<std::size_t>(hidden_);
  const std::vector<float> weights(topk, 1.0f / static_cast<float>(num_topk_));
  const std::array<std::int64_t, 2> tokens{0, num_tokens_ - 1};
  std::array<ReferenceRow, 2> expected;
  for_each_in_parallel(tokens.size(), [&](std::size_t i) {
    const auto x = static_cast<std::size_t>(tokens[i] % load_.num_tokens) * hidden;
    const auto entries = static_cast<std::size_t>(tokens[i]) * topk;
    expected[i] = reference.row(&load_.x[x], &idx_[entries], weights.data(), num_topk_);
  });
  std::vector<std::uint16_t> y(hidden);
  const std::size_t row_bytes = hidden * sizeof(std::uint16_t);
  VerifyReport report;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    backend_.copy_to_host(y.data(), y_->data() + static_cast<std::size_t>(tokens[i]) * row_bytes,
                          row_bytes, stream_);
    compare_row(expected[i], y.data(), tokens[i], report);
  }
  if (!report.passed()) {
    fail(ErrorCode::kInternal,
         "local call, token {}, element {}: {} where float64 has {} +- {}; nothing is timed",
         report.worst_token, report.worst_element, report.worst_actual, report.worst_expected,
         report.worst_bound);
  }
  return report.worst_ratio;
}

double LocalCalls::host_us() {
  using Clock = std::chrono::steady_clock;
  backend_.synchronize(stream_);
  const Clock::time_point start = Clock::now();
  for (int i = 0; i < kHostCalls; ++i) forward(0);
  const double us = std::chrono::duration<double, std::micro>(Clock::now() - start).count();
  backend_.synchronize(stream_);
  return us / kHostCalls;
}

}  // namespace sluice
