// scales.cuh - producer role of the scale warp: activation scales from memory to the
// stages, one for each 128 of K in every stage, or those of the rows in a stage of their own.
#pragma once

#include "backend/cuda/sm90_w4a8/producer.cuh"

namespace sluice::cuda {

/// Where a stage has the scale of token `lane`; token lane + 32 i is 8 i further.
template <class C>
__device__ __forceinline__ int scale_place(int lane) {
  return lane / 2 % 4 * C::kScalePitch + lane / 8 * 2 + lane % 2;
}

/// Scales of a tile's first steps, as one lane of the scale warp holds them.
template <class C>
struct HeldScales {
  static constexpr int kRows = C::kMaxTokens / 32;
  static constexpr int kSteps = (C::kIsDecode ? 16 : 8) / kRows;  // NOTE: registers, of 64 or 40
  float value[kRows][kSteps];
  int phase = -1, row0 = 0;  // of the tile they belong to

  /// Whether they are all that tile `t` needs: then its row tiles share one read. Prefill, which
  /// takes longer for a tile than the read does, has no registers to know.
  __device__ __forceinline__ bool serve(const TileInfo& t, int num_steps) {
    if constexpr (!C::kIsDecode) return false;
    const bool is_held = num_steps <= kSteps && t.phase == phase && t.row0 == row0;
    phase = t.phase, row0 = t.row0;
    return is_held;
  }
};

/// The scale warp passes a stage on: what it wrote into it, if anything, is there.
template <class C>
__device__ __forceinline__ void hand_over_scales(Shared<C>& s, Ring& ring, int lane) {
  __syncwarp();
  if (lane < kWarpArrivals) ptx::mbarrier_arrive(&s.full[ring.stage]);
  ring.advance<C::kStages>();
}

/// One warp: activation scales. Lane i serves tokens i, i + 32, ...: it reads a few steps of its
/// rows at once (they share a sector) and hands them out step by step. Past the last valid token it
/// repeats it.
template <class C>
__device__ __forceinline__ void fetch_tile_scales(Shared<C>& s, const Phase& phase,
                                                  const TileInfo& t, Ring& ring,
                                                  HeldScales<C>& held) {
  const int lane = ptx::thread_index() % 32;  // read anew, as in carry_tile()
  constexpr int kRows = HeldScales<C>::kRows, kSteps = HeldScales<C>::kSteps;
  const int place = scale_place<C>(lane);
  const int num_steps = phase.num_steps;
  const float* rows = phase.x_scale + static_cast<long long>(t.row0) * num_steps;
  const bool is_held = held.serve(t, num_steps);
  for (int k0 = 0; k0 < num_steps; k0 += kSteps) {
    if (!is_held) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float* row = rows + min(lane + 32 * i, t.num_tokens - 1) * num_steps;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) held.value[i][j] = row[min(k0 + j, num_steps - 1)];
      }
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      if (k0 + j == num_steps) break;
      wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
#pragma unroll
      for (int i = 0; i < kRows; ++i) s.x_scale[ring.stage][place + 8 * i] = held.value[i][j];
      hand_over_scales(s, ring, lane);
    }
  }
}

/// The same in prefill, where a tile may run along K several times: as one run of so many times the
/// steps, since loops in a loop take registers that its producers do not have.
template <class C>
__device__ __forceinline__ void fetch_run_scales(Shared<C>& s, const Phase& phase, int row0,
                                                 int last_token, int runs, Ring& ring) {
  const int lane = ptx::thread_index() % 32;
  constexpr int kRows = HeldScales<C>::kRows, kSteps = HeldScales<C>::kSteps;
  const int num_steps = phase.num_steps;
  const float* const rows = phase.x_scale + static_cast<long long>(row0) * num_steps;
  int at = 0;
  for (int left = runs * num_steps; left > 0; left -= kSteps) {
    float value[kRows][kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        value[i][j] = rows[min(lane + 32 * i, last_token) * num_steps + at];
      }
      if (++at == num_steps) at = 0;
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      if (j == left) break;
      wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        s.x_scale[ring.stage][scale_place<C>(lane) + 8 * i] = value[i][j];
      }
      hand_over_scales(s, ring, lane);
    }
  }
}

/// The steps of a tile whose main loop needs no scales of x, then its row stage, if it has one.
template <class C>
__device__ __forceinline__ void pass_steps(Shared<C>& s, const Phase& phase, const TileInfo& t,
                                           Ring& ring, int lane) {
  for (int k = 0; k < phase.num_steps; ++k) {
    wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
    hand_over_scales(s, ring, lane);
  }
  if (!C::has_row_stage(t.phase)) return;
  // Read now and not before the steps: producers have few registers, and run ahead of the math.
  constexpr int kRows = C::kMaxTokens / 32;
  float value[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = t.row0 + min(lane + 32 * i, t.num_tokens - 1);
    value[i] = phase.x_scale != nullptr ? phase.x_scale[row] : phase.x_static;
  }
  wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    s.x_scale[ring.stage][scale_place<C>(lane) + 8 * i] = value[i];
  }
  hand_over_scales(s, ring, lane);
}

/// The warp that owns the stages' scales. Where the main loops need none, it only says so.
template <class C>
__device__ __forceinline__ void fetch_scales(Shared<C>& s, const Params& p, int lane) {
  Ring ring, slots;
  int ready = -1;
  HeldScales<C> held;
  for (;;) {
    const TileInfo t = next_tile(s, slots, lane);
    if (t.phase < 0) return;
    const Phase& phase = p.phase[t.phase];
    const bool has_none = C::kXScale == XScale::kPerRow || C::has_row_stage(t.phase);
    if (!has_none) wait_for_rows(p, t, lane, ready);
    if constexpr (C::kPasses > 1 || (C::kShortK && !C::kIsDecode)) {
      if (!has_none) {
        fetch_run_scales(s, phase, t.row0, t.num_tokens - 1, runs_of<C>(t), ring);
        continue;
      }
    }
    for (int runs = runs_of<C>(t); runs > 0; --runs) {
      if (has_none) {
        pass_steps(s, phase, t, ring, lane);
      } else {
        fetch_tile_scales(s, phase, t, ring, held);
      }
    }
  }
}

}  // namespace sluice::cuda
