// The expert stage alone: rows of one rank's experts, no exchange.
#include <algorithm>
#include <chrono>
#include <numeric>
#include <thread>

#include "backend/ops.h"
#include "bench/arithmetic_rate.h"
#include "bench/random_experts.h"
#include "core/fail.h"
#include "sluice/bench.h"
#include "sluice/quant.h"
#include "sluice/reference.h"

namespace sluice {
namespace {

constexpr int kCheckedRows = 4;  // Rows of each case compared with float64.
constexpr int kQueuedLaunches =
    20;  // CUDA: calls per timing, so that launching hides behind running.

/// Rows per expert: `mean` * num_experts in all.
std::vector<std::int32_t> spread_rows(const ExpertsBenchConfig& config, int mean) {
  const int num_experts = config.geometry.num_experts;
  std::vector<std::int32_t> rows(static_cast<std::size_t>(num_experts), mean);
  const std::int64_t total = std::int64_t{mean} * num_experts;
  if (config.routing == RoutingKind::kOneExpert) {
    std::fill(rows.begin(), rows.end(), 0);
    rows[0] = static_cast<std::int32_t>(total);
  } else if (config.routing == RoutingKind::kZipf) {
    double harmonic = 0;
    for (int e = 1; e <= num_experts; ++e) harmonic += 1.0 / e;
    std::int64_t left = total;
    for (int e = num_experts; e >= 1; --e) {
      const auto share = static_cast<std::int64_t>(static_cast<double>(total) / (harmonic * e));
      rows[static_cast<std::size_t>(e - 1)] = static_cast<std::int32_t>(e == 1 ? left : share);
      left -= share;
    }
  }
  return rows;
}

/// One case's tensors on the device.
class ExpertCase {
 public:
  ExpertCase(BackendOps& backend, const ExpertsBenchConfig& config, int mean)
      : backend_(backend), num_rows_(spread_rows(config, mean)), stream_(backend.stream()) {
    row_begin_.resize(num_rows_.size());
    std::exclusive_scan(num_rows_.begin(), num_rows_.end(), row_begin_.begin(), std::int64_t{0});
    total_ = row_begin_.back() + num_rows_.back();
    const auto rows = static_cast<std::size_t>(total_);
    const auto hidden = static_cast<std::size_t>(config.geometry.hidden);
    const auto intermediate = static_cast<std::size_t>(config.geometry.intermediate);
    load_ = make_workload({.num_experts = config.geometry.num_experts,
                           .num_topk = 1,
                           .hidden = config.geometry.hidden,
                           .input = InputKind::kGaussian,
                           .seed = config.seed},
                          0, total_);
    x_ = upload(load_.x), begin_ = upload(row_begin_), count_ = upload(num_rows_);
    codes_ = backend_.allocate(rows * hidden);
    scale_ = backend_.allocate(rows * hidden / kActivationGroup * sizeof(float));
    requantized_ = backend_.allocate(rows * hidden);
    h_codes_ = backend_.allocate(rows * intermediate);
    h_scale_ = backend_.allocate(rows * intermediate / kActivationGroup * sizeof(float));
    y_ = backend_.allocate(rows * hidden * sizeof(std::uint16_t));
    rows_ = {.num_local_experts = config.geometry.num_experts,
             .row_begin = reinterpret_cast<const std::int64_t*>(begin_->data()),
             .num_rows = reinterpret_cast<const std::int32_t*>(count_->data()),
             .max_rows = total_,
             .max_rows_per_expert = total_,
             .expected_m = mean};
    in_ = {.codes = as_codes(codes_), .scale = as_scale(scale_), .width = config.geometry.hidden};
    h_ = {.codes = as_codes(h_codes_),
          .scale = as_scale(h_scale_),
          .width = config.geometry.intermediate};
  }

  void quantize() { backend_.quantize(x_bits(), rows_, false, in_, stream_); }
  void requantize() {
    backend_.requantize(
        in_, rows_, {.codes = as_codes(requantized_), .static_scale = 0.02f, .width = in_.width},
        stream_);
  }
  void run(const PreparedExperts& experts, ExpertStageTimes* times) {
    backend_.expert_stage(experts, in_, rows_, h_, reinterpret_cast<std::uint16_t*>(y_->data()),
                          stream_, times);
  }
  void wait() { backend_.synchronize(stream_); }
  [[nodiscard]] std::int64_t total_rows() const { return total_; }
  [[nodiscard]] std::int64_t active_experts() const {
    return std::count_if(num_rows_.begin(), num_rows_.end(), [](auto n) { return n > 0; });
  }

  /// Compares a few rows, spread over all, with float64; the largest |error| / bound.
  [[nodiscard]] double check(const LayerReference& reference) {
    const auto hidden = static_cast<std::size_t>(in_.width);
    std::vector<std::uint16_t> y(static_cast<std::size_t>(total_) * hidden);
    backend_.copy_to_host(y.data(), y_->data(), y.size() * sizeof(y[0]), stream_);
    VerifyReport report;
    for (std::int64_t i = 0; i < std::min<std::int64_t>(kCheckedRows, total_); ++i) {
      const std::int64_t row = i * total_ / std::min<std::int64_t>(kCheckedRows, total_);
      const auto next = std::upper_bound(row_begin_.begin(), row_begin_.end(), row);
      auto expert = static_cast<std::int32_t>(next - row_begin_.begin() - 1);
      while (num_rows_[static_cast<std::size_t>(expert)] == 0) --expert;
      const float weight = 1.0f;
      const auto at = static_cast<std::size_t>(row) * hidden;
      compare_row(reference.row(&load_.x[at], &expert, &weight, 1), &y[at], row, report);
    }
    if (!report.passed()) {
      fail(ErrorCode::kInternal,
           "row {}, element {}: {} where float64 has {} +- {}; nothing is timed",
           report.worst_token, report.worst_element, report.worst_actual, report.worst_expected,
           report.worst_bound);
    }
    return report.worst_ratio;
  }

 private:
  template <class T>
  std::unique_ptr<DeviceBuffer> upload(const std::vector<T>& host) {
    auto buffer = backend_.allocate(host.size() * sizeof(T));
    backend_.copy_from_host(buffer->data(), host.data(), host.size() * sizeof(T), stream_);
    return buffer;
  }
  [[nodiscard]] const std::uint16_t* x_bits() const {
    return reinterpret_cast<const std::uint16_t*>(x_->data());
  }
  static std::uint8_t* as_codes(const std::unique_ptr<DeviceBuffer>& buffer) {
    return reinterpret_cast<std::uint8_t*>(buffer->data());
  }
  static float* as_scale(const std::unique_ptr<DeviceBuffer>& buffer) {
    return reinterpret_cast<float*>(buffer->data());
  }

  BackendOps& backend_;
  std::vector<std::int32_t> num_rows_;
  std::vector<std::int64_t> row_begin_;
  Stream stream_;
  std::int64_t total_ = 0;
  Workload load_;
  std::unique_ptr<DeviceBuffer> x_, begin_, count_, codes_, scale_, requantized_, h_codes_,
      h_scale_, y_;
  ExpertRows rows_;
  QuantizedRows in_, h_;
};

/// Microseconds of one call, `repeats` times, sorted.
template <class Call>
std::vector<double> time_calls(ExpertCase& c, int repeats, int calls, const Call& call) {
  std::vector<double> us;
  for (int i = 0; i <= repeats; ++i) {
    c.wait();
    const auto start = std::chrono::steady_clock::now();
    for (int j = 0; j < calls; ++j) call();
    c.wait();
    const auto elapsed = std::chrono::steady_clock::now() - start;
    if (i > 0) us.push_back(std::chrono::duration<double, std::micro>(elapsed).count() / calls);
  }
  std::sort(us.begin(), us.end());
  return us;
}

ExpertsBenchCase run_case(const ExpertsBenchConfig& config, BackendOps& backend,
                          const PreparedExperts& experts, const LayerReference& reference,
                          int mean) {
  ExpertCase c(backend, config, mean);
  const bool queued = backend.device().kind == Device::Kind::kCuda;
  const int calls = queued ? kQueuedLaunches : 1;
  ExpertsBenchCase result{.rows_per_expert = mean, .total_rows = c.total_rows()};
  ExpertStageTimes times;
  c.quantize();
  c.run(experts, &times);
  result.worst_error_ratio = c.check(reference);

  const auto us = time_calls(c, config.repeats, calls, [&] { c.run(experts, &times); });
  result.median_us = us[us.size() / 2], result.min_us = us.front(), result.max_us = us.back();
  result.gemm1_us = times.gemm1_us, result.activation_us = times.activation_us;
  result.gemm2_us = times.gemm2_us;
  const auto quantize = time_calls(c, config.repeats, calls, [&] { c.quantize(); });
  const auto requantize = time_calls(c, config.repeats, calls, [&] { c.requantize(); });
  result.quantize_us = quantize[quantize.size() / 2];
  result.requantize_us = requantize[requantize.size() / 2];

  const ModelGeometry& g = config.geometry;
  const double rows = static_cast<double>(c.total_rows());
  const double weights = static_cast<double>(experts.bytes()) *
                         static_cast<double>(c.active_experts()) / g.num_experts;
  // In: a row and its scales; out: bf16; between: h written and read.
  const double row_bytes = g.hidden * (1 + 4.0 / kActivationGroup + 2) +
                           2 * g.intermediate * (1 + 4.0 / kActivationGroup);
  result.gbytes_per_s = (weights + rows * row_bytes) / result.median_us * 1e-3;
  result.tflops = rows * 6.0 * g.hidden * g.intermediate / result.median_us * 1e-6;
  return result;
}

}  // namespace

ExpertsBenchReport bench_experts(const ExpertsBenchConfig& config, Backend& backend_in) {
  BackendOps& backend = ops(backend_in);
  check_argument(config.repeats >= 1, "{} repeats; at least one", config.repeats);
  for (const int rows : config.rows_per_expert) {
    check_argument(rows >= 1, "{} rows per expert; at least one", rows);
  }
  ExpertsBenchReport report{.device = backend.description()};
  const ExpertWeights weights = random_experts(config.geometry, config.scale_dtype, config.seed);
  const auto experts = backend.prepare(weights);
  const Recipe recipe{.mode = Mode::kNormal};  // direct
  const LayerReference reference(weights, recipe, 1.0f, error_model(backend.device().kind));
  report.read_gbytes_per_s = backend.measure_read_bandwidth() * 1e-9;
  if (backend.device().kind == Device::Kind::kHost) {
    report.peak_tflops = measure_fma_flops(config.num_threads) * 1e-12;
  }
  for (const int rows : config.rows_per_expert) {
    report.cases.push_back(run_case(config, backend, *experts, reference, rows));
  }
  return report;
}

}  // namespace sluice
