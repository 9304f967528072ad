// The experts' stage from a measured table: rows to tiles, tiles to time, and the slowest rank.
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <utility>

#include "core/fail.h"
#include "network/model_parts.h"
#include "sluice/lab/network_model.h"

namespace sluice {
namespace {

/// Piecewise linear; beyond the last size in proportion to it.
double interpolate(std::span<const int> sizes, std::span<const double> us, double size) {
  if (size >= sizes.back()) return us.back() * size / sizes.back();
  const auto above = std::ranges::upper_bound(sizes, size);
  const auto i = static_cast<std::size_t>(above - sizes.begin());
  if (i == 0) return us.front();
  const double share = (size - sizes[i - 1]) / static_cast<double>(sizes[i] - sizes[i - 1]);
  return us[i - 1] + share * (us[i] - us[i - 1]);
}

/// Rows as the kernels compute them: tiles of 8, 16, 32 and 64 columns, then whole ones of 64
/// (src/backend/cuda/w4a8_config.cc). One row is measured by itself.
double rows_of_tiles(double rows) {
  if (rows <= 1) return rows;
  for (const double tile : {8.0, 16.0, 32.0, 64.0}) {
    if (rows <= tile) return tile;
  }
  return std::ceil(rows / 64) * 64;
}

/// One expert's part of a stage.
class ExpertTime {
 public:
  ExpertTime(const StageTable& table, const ModelGeometry& geometry)
      : table_(table),
        scale_(static_cast<double>(geometry.hidden) * geometry.intermediate /
               (static_cast<double>(table.hidden) * table.intermediate)),
        depth_(static_cast<double>(geometry.hidden + geometry.intermediate) /
               (table.hidden + table.intermediate)) {}

  [[nodiscard]] double operator()(double rows) const {
    if (rows <= 0) return 0;
    const double us = interpolate(table_.rows, table_.us, rows_of_tiles(rows));
    const double one = (us - table_.fixed_us) / table_.num_experts * scale_;
    return rows < 1 ? rows * one : one;
  }
  /// What a stage takes at least if one of its experts has so many rows: a tile's channels are one
  /// chain, and its length is that of an expert's two sums.
  [[nodiscard]] double alone(double rows) const {
    if (rows <= 0 || table_.one_expert_rows.empty()) return 0;
    return interpolate(table_.one_expert_rows, table_.one_expert_us, rows) * depth_;
  }

 private:
  const StageTable& table_;
  double scale_;  ///< Bytes of an expert, and its products, against the table's.
  double depth_;  ///< Channels that are summed.
};

struct Moments {
  double mean = 0, variance = 0;
};

/// Of f(N), N a Poisson number. From 200 on N is as good as normal; its distribution is cut into
/// steps of a sixteenth of its width, five widths to each side.
template <class F>
Moments poisson_moments(double mean_rows, const F& f) {
  double weights = 0, sum = 0, squares = 0;
  const auto add = [&](double n, double weight) {
    const double value = f(n);
    weights += weight, sum += weight * value, squares += weight * value * value;
  };
  if (mean_rows < 200) {
    double p = std::exp(-mean_rows);
    for (int n = 0; n < mean_rows + 10 * std::sqrt(mean_rows) + 10; p *= mean_rows / ++n) add(n, p);
  } else {
    const double width = std::sqrt(mean_rows);
    for (int i = -80; i <= 80; ++i) {
      const double z = i / 16.0;
      add(std::round(mean_rows + z * width), std::exp(-z * z / 2));
    }
  }
  const double mean = sum / weights;
  return {mean, std::max(0.0, squares / weights - mean * mean)};
}

/// Expected largest of n standard normal numbers, by Blom: the quantile at (n - 3/8) / (n + 1/4).
double expected_largest(double n) {
  if (n <= 1) return 0;
  const double want = (n - 0.375) / (n + 0.25);
  double low = 0, high = 10;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (0.5 * std::erfc(-middle / std::sqrt(2.0)) < want ? low : high) = middle;
  }
  return low;
}

struct SlowestRank {
  double us = 0, weights_us = 0;
};

SlowestRank slowest_rank(const MachineModel& machine, const ClusterLayer& layer,
                         const TokenSpread& spread) {
  const StageTable& table = find_stage(machine, layer);
  const ExpertTime time(table, layer.geometry);
  const auto group = static_cast<std::size_t>(layer.num_ranks / machine.ranks_per_device);
  const std::size_t slots = spread.slots.size() / group;
  const double tokens = static_cast<double>(layer.tokens_per_rank) * layer.num_ranks;
  const double z = expected_largest(static_cast<double>(group));
  std::map<double, std::pair<Moments, Moments>> known;  // By mean rows: time, and that of one row.
  SlowestRank slowest;
  for (std::size_t device = 0; device < group; ++device) {
    double mean = 0, variance = 0, weights = 0, most = 0;
    for (std::size_t s = device * slots; s < (device + 1) * slots; ++s) {
      const double rows = tokens * spread.slots[s];
      const auto [at, is_new] = known.try_emplace(rows);
      if (is_new) {
        at->second.first = poisson_moments(rows, time);
        at->second.second = poisson_moments(rows, [&](double n) { return time(std::min(n, 1.0)); });
      }
      mean += at->second.first.mean, variance += at->second.first.variance;
      weights += at->second.second.mean, most = std::max(most, rows);
    }
    const double us = std::max(table.fixed_us + mean + z * std::sqrt(variance), time.alone(most));
    if (us > slowest.us) slowest = {us, std::min(us, table.fixed_us + weights)};
  }
  return {slowest.us * machine.stage_factor, slowest.weights_us * machine.stage_factor};
}

}  // namespace

StageScales stage_scales(const Recipe& recipe) noexcept {
  if (has_static_scale(recipe.gemm2)) return StageScales::kStatic;
  return recipe.wire == WireFormat::kE4m3Token ? StageScales::kToken : StageScales::kGroup;
}

const StageTable& find_stage(const MachineModel& machine, const ClusterLayer& layer) {
  const StageScales scales = stage_scales(layer.recipe);
  for (const StageTable& table : machine.stages) {
    if (table.weight_format == layer.geometry.weight_format &&
        table.group_size == layer.geometry.group_size && table.scales == scales) {
      return table;
    }
  }
  fail(ErrorCode::kUnsupported,
       "machine {} has no measured experts' stage of {} weights in groups of {} for recipe {}",
       machine.name, to_string(layer.geometry.weight_format), layer.geometry.group_size,
       to_string(layer.recipe));
}

double stage_time(const StageTable& table, const ModelGeometry& geometry,
                  std::span<const double> rows) {
  check_argument(!table.rows.empty() && table.rows.size() == table.us.size() &&
                     table.one_expert_rows.size() == table.one_expert_us.size(),
                 "the table has {} sizes and {} times", table.rows.size(), table.us.size());
  const ExpertTime time(table, geometry);
  double sum = table.fixed_us, most = 0;
  for (const double n : rows) sum += time(n), most = std::max(most, n);
  return std::max(sum, time.alone(most));
}

StagePrediction predict_stage_parts(const MachineModel& machine, const ClusterLayer& layer,
                                    const TokenSpread& spread) {
  check_layer(machine, layer, spread);
  const SlowestRank slowest = slowest_rank(machine, layer, spread);
  StagePrediction stage{.weights_us = slowest.weights_us,
                        .products_us = slowest.us - slowest.weights_us};
  if (layer.recipe.gemm1 == Cast::kNone) return stage;
  // The receiver's cast reads rows as they came and writes them in e4m3.
  const double fullest = largest_sum(spread.slots, static_cast<std::size_t>(layer.num_ranks));
  const double rows = fullest * layer.tokens_per_rank * layer.num_ranks * machine.ranks_per_device;
  const auto bytes =
      static_cast<double>(wire_bytes_per_token(layer.recipe.wire, layer.geometry.hidden) +
                          wire_bytes_per_token(WireFormat::kE4m3Group, layer.geometry.hidden));
  stage.cast_us = kLaunchUs + rows * bytes / (1e3 * machine.memory_gbytes_per_s);
  return stage;
}

double predict_stage(const MachineModel& machine, const ClusterLayer& layer,
                     const TokenSpread& spread) {
  const StagePrediction stage = predict_stage_parts(machine, layer, spread);
  return stage.weights_us + stage.products_us + stage.cast_us;
}

}  // namespace sluice
