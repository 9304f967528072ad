#include "backend/cpu/expert_stage.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "backend/cpu/row_kernels.h"
#include "core/fail.h"
#include "core/threads.h"

namespace sluice::cpu {
namespace {

/// Rows whose digits are held at once: all of 32 experts with 64 rows, because some threads wait
/// for the last task at the end of each of a wave's three phases. At hidden 7168 and intermediate
/// 2048 that is 45 MB, or 83 if every group has low digits; what is not used takes no memory.
constexpr std::int64_t kWaveRows = 2048;
constexpr int kTaskBlocks = kGroup / kBlockN;  // 128 channels per task.
constexpr std::int64_t kSplitGroups = 8;       // Of x per task: a kilobyte of each row.

using Clock = std::chrono::steady_clock;

double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

/// acc [8][rows][16] -> the 128 channels of one row.
void gather_row(const float* acc, int rows, int row, float* out) {
  for (int b = 0; b < kTaskBlocks; ++b) {
    std::memcpy(out + b * kBlockN, acc + (b * rows + row) * kBlockN, kBlockN * sizeof(float));
  }
}

/// Of the 128 channels from 128 * `group` on, if the matrix has a bias.
void add_bias(const PreparedMatrix& m, std::int64_t group, float* values) {
  if (m.bias == nullptr) return;
  for (int i = 0; i < kGroup; ++i) values[i] += m.bias[group * kGroup + i];
}

}  // namespace

struct ExpertStage::Call {
  const PreparedCpuExperts& experts;
  const Fp8RowsView& in;
  const Fp8Rows& h;
  std::uint16_t* out;
};

void check_rows(const RowRanges& rows) {
  for (int e = 0; e < rows.num_experts; ++e) {
    const std::int64_t first = rows.first_row(e), count = rows.num_rows(e);
    check_argument(count >= 0 && first >= 0 && first + count <= rows.max_rows,
                   "expert {}: rows [{}, {}) are not in [0, max_rows {})", e, first, first + count,
                   rows.max_rows);
  }
}

void ExpertStage::Digits::reserve(std::int64_t rows, std::int64_t width) {
  num_groups = width / kGroup;
  const auto count = static_cast<std::size_t>(rows * num_groups);
  if (groups.bytes() >= count * sizeof(DigitGroup)) return;
  digits = PageBuffer(count * kMainDigitBytes, PageBuffer::Pages::kHuge);
  low = PageBuffer(count * kLowDigitBytes);
  groups = PageBuffer(count * sizeof(DigitGroup));
  lows = PageBuffer(count * sizeof(TileLows));
}

DigitRows ExpertStage::Digits::of(const Item& item) const {
  const std::int64_t first = item.wave_row * num_groups;
  return {.layout = digit_layout(item.rows),
          .digits = reinterpret_cast<std::uint8_t*>(digits.data()) + first * kMainDigitBytes,
          .low = reinterpret_cast<std::uint8_t*>(low.data()) + first * kLowDigitBytes,
          .groups = reinterpret_cast<DigitGroup*>(groups.data()) + first,
          .lows = reinterpret_cast<TileLows*>(lows.data()) + first,
          .rows = item.rows};
}

void ExpertStage::run(const PreparedCpuExperts& experts, const Fp8RowsView& in,
                      const RowRanges& rows, const Fp8Rows& h, std::uint16_t* out,
                      ExpertStageTimes* times) {
  check_argument(rows.num_experts == experts.num_experts(),
                 "rows of {} experts, but {} are prepared", rows.num_experts,
                 experts.num_experts());
  check_argument(in.width == experts.hidden(), "input width {} is not hidden {}", in.width,
                 experts.hidden());
  check_argument(h.width == experts.intermediate(), "h width {} is not intermediate {}", h.width,
                 experts.intermediate());
  check_rows(rows);
  if (threads_.empty()) threads_.resize(static_cast<std::size_t>(pool_.num_threads()));
  x_.reserve(kWaveRows, experts.hidden());
  h_.reserve(kWaveRows, experts.intermediate());

  const Call call{experts, in, h, out};
  ExpertStageTimes sum;
  wave_.clear();
  std::int64_t wave_rows = 0;
  for (int e = 0; e < rows.num_experts; ++e) {
    const std::int64_t count = rows.num_rows(e);
    const std::int64_t num_items = (count + kMaxTileRows - 1) / kMaxTileRows;
    for (std::int64_t i = 0; i < num_items; ++i) {
      const std::int64_t first = count * i / num_items, last = count * (i + 1) / num_items;
      const std::int64_t padded = RowTiles(static_cast<int>(last - first)).padded();
      if (wave_rows + padded > kWaveRows) {
        run_wave(call, sum);
        wave_.clear();
        wave_rows = 0;
      }
      wave_.push_back({.expert = e,
                       .first_row = rows.first_row(e) + first,
                       .rows = static_cast<int>(last - first),
                       .wave_row = wave_rows});
      wave_rows += padded;
    }
  }
  if (!wave_.empty()) run_wave(call, sum);
  if (times != nullptr) *times = sum;
}

/// All rows of a wave are read before any row of it is written: `in` may lie in the rows of `out`.
void ExpertStage::run_wave(const Call& call, ExpertStageTimes& times) {
  const auto num_items = static_cast<std::int64_t>(wave_.size());
  for (ThreadState& state : threads_) state.gemm1_us = state.activation_us = 0;
  const auto start = Clock::now();
  const std::int64_t splits = (call.in.width / kGroup + kSplitGroups - 1) / kSplitGroups;
  pool_.for_each_task(num_items * splits, [&](std::int64_t task, int) {
    split_input(call, wave_[static_cast<std::size_t>(task / splits)], task % splits * kSplitGroups);
  });
  const double split_us = us_since(start);

  const auto gemm1_start = Clock::now();
  nodes_.for_each_task(pool_, num_items, call.experts.intermediate() / kGroup,
                       [&](std::int64_t item, std::int64_t group, int thread) {
                         gemm1_task(call, wave_[static_cast<std::size_t>(item)], group,
                                    threads_[static_cast<std::size_t>(thread)]);
                       });
  const double fused_us = us_since(gemm1_start);
  double gemm1 = 0, activation = 0;
  for (const ThreadState& state : threads_) {
    gemm1 += state.gemm1_us;
    activation += state.activation_us;
  }
  const double share = activation / std::max(gemm1 + activation, 1e-9);
  times.gemm1_us += split_us + fused_us * (1 - share);
  times.activation_us += fused_us * share;

  const auto gemm2_start = Clock::now();
  nodes_.for_each_task(pool_, num_items, call.experts.hidden() / kGroup,
                       [&](std::int64_t item, std::int64_t group, int thread) {
                         gemm2_task(call, wave_[static_cast<std::size_t>(item)], group,
                                    threads_[static_cast<std::size_t>(thread)]);
                       });
  times.gemm2_us += us_since(gemm2_start);
}

void ExpertStage::split_input(const Call& call, const Item& item, std::int64_t first_group) const {
  const DigitRows digits = x_.of(item);
  const std::int64_t last_group = std::min(first_group + kSplitGroups, call.in.width / kGroup);
  for (int r = 0; r < item.rows; ++r) {
    const std::int64_t row = item.first_row + r;
    const std::uint8_t* codes = call.in.row(row);
    for (std::int64_t g = first_group; g < last_group; ++g) {
      digits.set(g, r, codes + g * kGroup, call.in.scale_of(row, g));
    }
  }
  for (std::int64_t g = first_group; g < last_group; ++g) digits.complete(g);
}

/// Accumulators of one task, made by the first task a thread runs.
void ExpertStage::reserve(ThreadState& state) {
  constexpr std::size_t kAccBytes = sizeof(float) * kTaskBlocks * kMaxTileRows * kBlockN;
  if (state.gate.bytes() > 0) return;
  state.gate = PageBuffer(kAccBytes);
  state.up = PageBuffer(kAccBytes);
}

void ExpertStage::gemm1_task(const Call& call, const Item& item, std::int64_t group,
                             ThreadState& state) const {
  reserve(state);
  const std::int64_t groups = call.h.width / kGroup;
  const PreparedExpert& expert = call.experts.expert(item.expert);
  auto* gate = reinterpret_cast<float*>(state.gate.data());
  auto* up = reinterpret_cast<float*>(state.up.data());

  const auto start = Clock::now();
  GemmTile tile{.weights = &expert.gate,
                .first_block = group * kTaskBlocks,
                .num_blocks = kTaskBlocks,
                .x = x_.of(item),
                .acc = gate};
  gemm_tile(tile);
  tile.weights = &expert.up;
  tile.acc = up;
  gemm_tile(tile);
  const auto activation_start = Clock::now();
  state.gemm1_us += std::chrono::duration<double, std::micro>(activation_start - start).count();

  const DigitRows digits = h_.of(item);
  alignas(64) float gate_row[kGroup], up_row[kGroup];
  for (int r = 0; r < item.rows; ++r) {
    gather_row(gate, item.rows, r, gate_row);
    gather_row(up, item.rows, r, up_row);
    add_bias(expert.gate, group, gate_row);
    add_bias(expert.up, group, up_row);
    const std::int64_t row = item.first_row + r;
    std::uint8_t* codes = call.h.row(row) + group * kGroup;
    const bool dynamic = call.h.scale != nullptr;
    const float scale = activate_quantize_group(call.experts.activation(), gate_row, up_row,
                                                dynamic ? 0.0f : call.h.static_scale, codes);
    if (dynamic) call.h.scale[row * groups + group] = scale;
    digits.set(group, r, codes, scale);
  }
  digits.complete(group);
  state.activation_us += us_since(activation_start);
}

void ExpertStage::gemm2_task(const Call& call, const Item& item, std::int64_t group,
                             ThreadState& state) const {
  const std::int64_t width = call.experts.hidden();
  reserve(state);  // This thread may have had no task of GEMM1.
  auto* acc = reinterpret_cast<float*>(state.gate.data());
  const PreparedMatrix& down = call.experts.expert(item.expert).down;
  gemm_tile({.weights = &down,
             .first_block = group * kTaskBlocks,
             .num_blocks = kTaskBlocks,
             .x = h_.of(item),
             .acc = acc});
  for (int r = 0; r < item.rows; ++r) {
    alignas(64) float values[kGroup];
    gather_row(acc, item.rows, r, values);
    add_bias(down, group, values);
    round_to_bf16(values, kGroup, call.out + (item.first_row + r) * width + group * kGroup);
  }
}

}  // namespace sluice::cpu
