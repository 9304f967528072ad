#include "bench/device_rows.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/fail.h"
#include "sluice/lab/parallel.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr std::int64_t kCheckedRows = 4;     // Of each case, compared with float64.
constexpr std::int64_t kDistinctRows = 512;  // Of the input; further rows repeat them.

}  // namespace

DeviceRows::DeviceRows(BackendOps& backend, const ExpertsBenchConfig& config, std::int64_t max_rows,
                       int max_experts)
    : backend_(backend), stream_(backend.stream()), max_rows_(max_rows) {
  const ModelGeometry& g = config.geometry;
  const auto rows = static_cast<std::size_t>(max_rows);
  const auto hidden = static_cast<std::size_t>(g.hidden);
  const auto intermediate = static_cast<std::size_t>(g.intermediate);
  load_ = make_workload({.num_experts = max_experts,
                         .num_topk = 1,
                         .hidden = g.hidden,
                         .input = InputKind::kGaussian,
                         .seed = config.seed},
                        0, std::min(kDistinctRows, max_rows));
  x_ = backend.allocate(rows * hidden * sizeof(std::uint16_t));
  for (std::int64_t row = 0; row < max_rows; row += load_.num_tokens) {
    const auto count = static_cast<std::size_t>(std::min(load_.num_tokens, max_rows - row));
    backend.copy_from_host(x() + static_cast<std::size_t>(row) * hidden, load_.x.data(),
                           count * hidden * sizeof(std::uint16_t), stream_);
  }
  begin_ = backend.allocate(static_cast<std::size_t>(max_experts) * sizeof(std::int64_t));
  count_ = backend.allocate(static_cast<std::size_t>(max_experts) * sizeof(std::int32_t));
  codes_ = backend.allocate(rows * hidden);
  scale_ = backend.allocate(rows * hidden / kActivationGroup * sizeof(float));
  requantized_ = backend.allocate(rows * hidden);
  h_codes_ = backend.allocate(rows * intermediate);
  h_scale_ = backend.allocate(rows * intermediate / kActivationGroup * sizeof(float));
  y_ = backend.allocate(rows * hidden * sizeof(std::uint16_t));
  in_ = {.codes = as<std::uint8_t>(codes_), .scale = as<float>(scale_), .width = g.hidden};
  h_ = {.codes = as<std::uint8_t>(h_codes_), .scale = as<float>(h_scale_), .width = g.intermediate};
}

void DeviceRows::arrange(const std::vector<std::int32_t>& num_rows, int mean) {
  num_rows_ = num_rows;
  row_begin_.resize(num_rows.size());
  std::exclusive_scan(num_rows.begin(), num_rows.end(), row_begin_.begin(), std::int64_t{0});
  total_ = row_begin_.back() + num_rows.back();
  backend_.copy_from_host(begin_->data(), row_begin_.data(),
                          row_begin_.size() * sizeof(std::int64_t), stream_);
  backend_.copy_from_host(count_->data(), num_rows_.data(), num_rows_.size() * sizeof(std::int32_t),
                          stream_);
  rows_ = {.num_experts = static_cast<int>(num_rows.size()),
           .begin = as<std::int64_t>(begin_),
           .count = as<std::int32_t>(count_),
           .max_rows = max_rows_,
           .max_rows_per_expert = max_rows_,
           .expected_m = mean};
}

std::optional<StaticScales> DeviceRows::use_scales(const Recipe& recipe,
                                                   const PreparedExperts& experts) {
  in_.scale = as<float>(scale_), h_.scale = as<float>(h_scale_);
  const std::vector<Cast> casts = gemm1_casts(recipe);
  in_.scale_per_row = casts.back() == Cast::kToken;
  if (!has_static_scale(recipe.gemm2)) return std::nullopt;
  return use_static(experts);
}

StaticScales DeviceRows::use_static(const PreparedExperts& experts) {
  quantize();
  run(experts, nullptr);
  backend_.synchronize(stream_);
  float amax = 0;
  for (const std::uint16_t v : load_.x) amax = std::max(amax, std::fabs(bf16_to_float(v)));
  std::vector<float> h_scale(static_cast<std::size_t>(total_ * (h_.width / kActivationGroup)));
  backend_.copy_to_host(h_scale.data(), h_.scale, h_scale.size() * sizeof(float), stream_);
  const StaticScales scales{amax / kE4m3Max, *std::ranges::max_element(h_scale)};
  in_.scale = nullptr, in_.static_scale = scales.s1;
  h_.scale = nullptr, h_.static_scale = scales.s2;
  return scales;
}

double DeviceRows::check(const LayerReference& reference) {
  const auto hidden = static_cast<std::size_t>(in_.width);
  const std::int64_t count = std::min(kCheckedRows, total_);
  std::vector<ReferenceRow> expected(static_cast<std::size_t>(count));
  for_each_in_parallel(expected.size(), [&](std::size_t i) {
    const std::int64_t row = static_cast<std::int64_t>(i) * total_ / count;
    const auto next = std::upper_bound(row_begin_.begin(), row_begin_.end(), row);
    auto expert = static_cast<std::int32_t>(next - row_begin_.begin() - 1);
    while (num_rows_[static_cast<std::size_t>(expert)] == 0) --expert;
    const float weight = 1.0f;
    const auto at = static_cast<std::size_t>(row % load_.num_tokens) * hidden;
    expected[i] = reference.row(&load_.x[at], &expert, &weight, 1);
  });
  VerifyReport report;
  std::vector<std::uint16_t> y(hidden);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = i * total_ / count;
    backend_.copy_to_host(y.data(), as<std::uint16_t>(y_) + static_cast<std::size_t>(row) * hidden,
                          hidden * sizeof(std::uint16_t), stream_);
    compare_row(expected[static_cast<std::size_t>(i)], y.data(), row, report);
  }
  if (!report.passed()) {
    fail(ErrorCode::kInternal,
         "row {}, element {}: {} where float64 has {} +- {}; nothing is timed", report.worst_token,
         report.worst_element, report.worst_actual, report.worst_expected, report.worst_bound);
  }
  return report.worst_ratio;
}

}  // namespace sluice
