// device_rows.h - the rows that a bench of the expert stage runs on, in buffers on the device.
//
//   arrange()  which expert has how many rows
//   quantize() x, bf16 -> codes and scales      run() codes -> y      check() y against float64
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "backend/ops.h"
#include "sluice/lab/experts_bench.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/workload.h"

namespace sluice {

/// Large enough for every case of a bench.
class DeviceRows {
 public:
  DeviceRows(BackendOps& backend, const ExpertsBenchConfig& config, std::int64_t max_rows,
             int max_experts);

  /// Expert after expert without gaps; `mean` rows are expected of each.
  void arrange(const std::vector<std::int32_t>& num_rows, int mean);

  /// Rows with the scales of `recipe`. Static ones are the largest that the rows of this case need,
  /// and are returned.
  std::optional<StaticScales> use_scales(const Recipe& recipe, const PreparedExperts& experts);

  void quantize() { backend_.quantize(x(), rows_, false, in_, stream_); }
  void requantize() {
    backend_.requantize(
        in_, rows_,
        {.codes = as<std::uint8_t>(requantized_), .static_scale = 0.02f, .width = in_.width},
        stream_);
  }
  void run(const PreparedExperts& experts, ExpertStageTimes* times) {
    backend_.expert_stage(experts, in_, rows_, h_, as<std::uint16_t>(y_), stream_, times);
  }
  [[nodiscard]] bool run_half(ExpertHalf half, const PreparedExperts& experts) {
    return backend_.expert_half(half, experts, in_, rows_, h_, as<std::uint16_t>(y_), stream_);
  }
  [[nodiscard]] std::int64_t total_rows() const { return total_; }
  [[nodiscard]] std::int64_t active_experts() const {
    return std::count_if(num_rows_.begin(), num_rows_.end(), [](auto n) { return n > 0; });
  }

  /// Compares a few rows, spread over all, with float64; the largest |error| / bound. Throws:
  /// kInternal if one is above its bound.
  [[nodiscard]] double check(const LayerReference& reference);

 private:
  template <class T>
  static T* as(const std::unique_ptr<DeviceBuffer>& buffer) {
    return reinterpret_cast<T*>(buffer->data());
  }
  StaticScales use_static(const PreparedExperts& experts);
  [[nodiscard]] std::uint16_t* x() const { return as<std::uint16_t>(x_); }

  BackendOps& backend_;
  Stream stream_;
  std::int64_t max_rows_, total_ = 0;
  std::vector<std::int32_t> num_rows_;
  std::vector<std::int64_t> row_begin_;
  Workload load_;
  std::unique_ptr<DeviceBuffer> x_, begin_, count_, codes_, scale_, requantized_, h_codes_,
      h_scale_, y_;
  RowRanges rows_;
  Fp8Rows in_, h_;
};

}  // namespace sluice
