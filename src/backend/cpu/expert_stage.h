// expert_stage.h - both GEMMs of all experts, in waves of rows that share one workspace.
//
//   wave: rows of one or more experts, at most kWaveRows, in items of up to 64 rows of one expert
//     1  digits of x                               one task per (item, kSplitGroups * 128 channels)
//     2  GEMM1, activation, quantize, digits of h  one task per (item, 128 channels of h)
//     3  GEMM2, bf16                               one task per (item, 128 channels of the output)
//
// Each weight is read once per item, in the order in which it lies in memory, by a thread of the
// node where it lies if there are several (memory_nodes.h). All threads go through the three kinds
// of tasks together and wait only for what a task needs: 2 for all digits of x of its item, 3 for
// all of h, and for x of the whole wave, because rows of x may lie in those of the output.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/cpu/gemm_tile.h"
#include "backend/cpu/memory_nodes.h"
#include "backend/cpu/page_buffer.h"
#include "backend/ops.h"

namespace sluice {
class ThreadPool;
}

namespace sluice::cpu {

/// Checks that every expert's rows lie in the buffers. Throws: kInvalidArgument naming the expert.
void check_rows(const RowRanges& rows);

class ExpertStage {
 public:
  /// Both outlive the stage.
  ExpertStage(ThreadPool& pool, const MemoryNodes& nodes) : pool_(pool), nodes_(nodes) {}

  void run(const PreparedCpuExperts& experts, const Fp8RowsView& in, const RowRanges& rows,
           const Fp8Rows& h, std::uint16_t* out, ExpertStageTimes* times);

 private:
  /// Up to kMaxTileRows rows of one expert.
  struct Item {
    int expert = 0;
    std::int64_t first_row = 0;
    int rows = 0;
    std::int64_t wave_row = 0;  ///< Rows of the wave before this item, filled up to tiles.
  };
  /// Digits of a wave's rows, one item after the other.
  struct Digits {
    PageBuffer digits, low, groups, lows;
    std::int64_t num_groups = 0;
    void reserve(std::int64_t rows, std::int64_t width);
    [[nodiscard]] DigitRows of(const Item& item) const;
  };
  struct alignas(64) ThreadState {
    PageBuffer gate, up;                                   ///< [8][kMaxTileRows][16] f32
    double gemm1_us = 0, activation_us = 0, gemm2_us = 0;  ///< Of one wave; gemm1 with digits of x.
  };
  struct Call;  ///< Arguments of run().
  struct Wave;  ///< What its tasks are, and how far they are.

  void run_wave(const Call& call, ExpertStageTimes& times);
  void work(const Call& call, Wave& wave, int thread);
  void split_input(const Call& call, const Item& item, std::int64_t first_group,
                   ThreadState& state) const;
  static void reserve(ThreadState& state);
  void gemm1_task(const Call& call, const Item& item, std::int64_t group, ThreadState& state) const;
  void gemm2_task(const Call& call, const Item& item, std::int64_t group, ThreadState& state) const;

  ThreadPool& pool_;
  const MemoryNodes& nodes_;
  std::vector<Item> wave_;
  Digits x_, h_;
  std::vector<ThreadState> threads_;
};

}  // namespace sluice::cpu
