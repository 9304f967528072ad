#include "backend/cpu/expert_stage.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "backend/cpu/row_kernels.h"
#include "backend/cpu/task_queue.h"
#include "backend/cpu/wave_progress.h"
#include "core/fail.h"
#include "core/threads.h"

namespace sluice::cpu {
namespace {

/// Rows whose digits are held at once: all of 32 experts with 64 rows, because threads wait for the
/// last task at the end of each wave. At hidden 7168 and intermediate 2048 that is 45 MB, or 83 if
/// every group has low digits; what is not used takes no memory.
constexpr std::int64_t kWaveRows = 2048;
constexpr int kTaskBlocks = kGroup / kBlockN;  // 128 channels per task.
constexpr std::int64_t kSplitGroups = 8;       // Of x per task: a kilobyte of each row.

using Clock = std::chrono::steady_clock;

double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

/// Adds the time until it is gone.
class AddTime {
 public:
  explicit AddTime(double& us) : us_(us) {}
  AddTime(const AddTime&) = delete;
  AddTime& operator=(const AddTime&) = delete;
  ~AddTime() { us_ += us_since(start_); }

 private:
  double& us_;
  Clock::time_point start_ = Clock::now();
};

/// acc [8][acc_rows][16] -> the 128 channels of one row.
void gather_row(const float* acc, int acc_rows, int row, float* out) {
  for (int b = 0; b < kTaskBlocks; ++b) {
    std::memcpy(out + b * kBlockN, acc + (b * acc_rows + row) * kBlockN, kBlockN * sizeof(float));
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

struct ExpertStage::Wave {
  Wave(const MemoryNodes& nodes, std::int64_t num_items, const Call& call)
      : x(nodes, num_items, splits_of(call)),
        h(nodes, num_items, call.experts.intermediate() / kGroup),
        out(nodes, num_items, call.experts.hidden() / kGroup),
        progress(num_items, splits_of(call), call.experts.intermediate() / kGroup) {}
  static std::int64_t splits_of(const Call& call) {
    return (call.in.width / kGroup + kSplitGroups - 1) / kSplitGroups;
  }
  TaskQueue x, h, out;  ///< By what the tasks make.
  WaveProgress progress;
};

void ExpertStage::run_wave(const Call& call, ExpertStageTimes& times) {
  for (ThreadState& state : threads_) state.gemm1_us = state.activation_us = state.gemm2_us = 0;
  const auto start = Clock::now();
  Wave wave(nodes_, static_cast<std::int64_t>(wave_.size()), call);
  pool_.run([&](int thread) {
    try {
      work(call, wave, thread);
    } catch (...) {
      wave.progress.report_failure();
      throw;
    }
  });
  double gemm1 = 0, activation = 0, gemm2 = 0;
  for (const ThreadState& state : threads_) {
    gemm1 += state.gemm1_us;
    activation += state.activation_us;
    gemm2 += state.gemm2_us;
  }
  const double share = us_since(start) / std::max(gemm1 + activation + gemm2, 1e-9);
  times.gemm1_us += gemm1 * share;
  times.activation_us += activation * share;
  times.gemm2_us += gemm2 * share;
}

/// A thread that waits holds a task of one kind while others are at the kind before, of which no
/// task is left to take. Those of the first kind wait for nothing, so all come to an end.
void ExpertStage::work(const Call& call, Wave& wave, int thread) {
  ThreadState& state = threads_[static_cast<std::size_t>(thread)];
  reserve(state);
  const auto item_of = [&](const StageTask& task) -> const Item& {
    return wave_[static_cast<std::size_t>(task.item)];
  };
  while (const auto task = wave.x.take(thread)) {
    split_input(call, item_of(*task), task->slice * kSplitGroups, state);
    wave.progress.report_x(task->item);
  }
  while (const auto task = wave.h.take(thread)) {
    if (!wave.progress.wait_for_x(task->item)) return;
    gemm1_task(call, item_of(*task), task->slice, state);
    wave.progress.report_h(task->item);
  }
  if (!wave.progress.wait_for_all_x()) return;
  while (const auto task = wave.out.take(thread)) {
    if (!wave.progress.wait_for_h(task->item)) return;
    gemm2_task(call, item_of(*task), task->slice, state);
  }
}

void ExpertStage::split_input(const Call& call, const Item& item, std::int64_t first_group,
                              ThreadState& state) const {
  const AddTime add_time(state.gemm1_us);
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

/// Accumulators of one task, made when a thread works for the first time.
void ExpertStage::reserve(ThreadState& state) {
  constexpr std::size_t kAccBytes = sizeof(float) * kTaskBlocks * kMaxTileRows * kBlockN;
  if (state.gate.bytes() > 0) return;
  state.gate = PageBuffer(kAccBytes);
  state.up = PageBuffer(kAccBytes);
}

void ExpertStage::gemm1_task(const Call& call, const Item& item, std::int64_t group,
                             ThreadState& state) const {
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
  const int acc_rows = tile.x.acc_rows();
  alignas(64) float gate_row[kGroup], up_row[kGroup];
  for (int r = 0; r < item.rows; ++r) {
    gather_row(gate, acc_rows, r, gate_row);
    gather_row(up, acc_rows, r, up_row);
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
  const AddTime add_time(state.gemm2_us);
  const std::int64_t width = call.experts.hidden();
  auto* acc = reinterpret_cast<float*>(state.gate.data());
  const PreparedMatrix& down = call.experts.expert(item.expert).down;
  const DigitRows digits = h_.of(item);
  gemm_tile({.weights = &down,
             .first_block = group * kTaskBlocks,
             .num_blocks = kTaskBlocks,
             .x = digits,
             .acc = acc});
  for (int r = 0; r < item.rows; ++r) {
    alignas(64) float values[kGroup];
    gather_row(acc, digits.acc_rows(), r, values);
    add_bias(down, group, values);
    round_to_bf16(values, kGroup, call.out + (item.first_row + r) * width + group * kGroup);
  }
}

}  // namespace sluice::cpu
