// sm90_w4a8_producer.cuh - producer roles: claim tiles, stream weights, fetch activations and
// scales.
#pragma once

#include "backend/cuda/ptx/copy.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/ptx/system.cuh"
#include "backend/cuda/sm90_w4a8_config.cuh"

namespace sluice::cuda {

/// A wait inside the kernel lasts microseconds; one that lasts this long hangs.
constexpr std::uint64_t kMaxWaitNs = 20'000'000'000;

/// Ends the launch with an error, instead of hanging, if a wait that began at `begin` lasts too
/// long.
__device__ __forceinline__ void check_wait(std::uint64_t begin) {
  if (ptx::global_timer() - begin < kMaxWaitNs) return;
  __trap();
}

/// Waits for a phase of a barrier, for a bounded time. Suspended meanwhile: polling would take
/// issue slots from the math warps.
__device__ __forceinline__ void wait_bounded(std::uint64_t* bar, std::uint32_t parity) {
  constexpr std::uint32_t kSuspendNs = 1'000'000;
  if (ptx::mbarrier_try_wait_for(bar, parity, kSuspendNs)) return;
  const std::uint64_t begin = ptx::global_timer();
  while (!ptx::mbarrier_try_wait_for(bar, parity, kSuspendNs)) check_wait(begin);
}

/// For math warps, whose registers are full: even a count here spills. The producers they wait for
/// run into full rings behind a math warp that is stuck, and their waits are bounded.
__device__ __forceinline__ void wait(std::uint64_t* bar, std::uint32_t parity) {
  while (!ptx::mbarrier_try_wait(bar, parity)) {
  }
}

/// Token tiles before each expert, by one warp. Counts are read from global memory once per CTA.
template <class C>
__device__ __forceinline__ void scan_token_tiles(Shared<C>& s, const Params& p, int lane) {
  int total = 0;
  for (int first = 0; first < p.num_experts; first += 32) {
    const int e = first + lane;
    const int rows = e < p.num_experts ? p.num_rows[e] : 0;
    int sum = rows > 0 ? (rows + C::kMaxTokens - 1) / C::kMaxTokens : 0;
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += below;
    }
    if (e < p.num_experts) {
      s.tile_prefix[e + 1] = total + sum;
      s.num_rows[e] = rows;
    }
    total += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) s.tile_prefix[0] = 0;
}

/// Tickets run through phase 0, then phase 1; in a phase by expert, row tile, token tile, so that
/// CTAs which share weights run side by side and a tile only ever waits for smaller tickets.
template <class C>
__device__ __forceinline__ TileInfo find_tile(const Shared<C>& s, const Params& p, int ticket) {
  const int num_token_tiles = s.tile_prefix[p.num_experts];
  TileInfo t{};
  t.phase = -1;
  int phase = 0;
  int row_tiles = p.phase[0].num_row_tiles;
  const int phase0_tiles = num_token_tiles * row_tiles;
  if (ticket >= phase0_tiles) {
    if (p.num_phases == 1) return t;
    ticket -= phase0_tiles;
    phase = 1;
    row_tiles = p.phase[1].num_row_tiles;
    if (ticket >= num_token_tiles * row_tiles) return t;
  }
  const int key = ticket / row_tiles;
  int lo = 0, hi = p.num_experts;  // tile_prefix[lo] <= key < tile_prefix[hi]
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (s.tile_prefix[mid] <= key) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  const int token_tiles = s.tile_prefix[lo + 1] - s.tile_prefix[lo];
  const int local = ticket - s.tile_prefix[lo] * row_tiles;
  const int row_tile = local / token_tiles;
  const int token0 = (local % token_tiles) * C::kMaxTokens;
  const int base = p.row_offset != nullptr ? static_cast<int>(p.row_offset[lo]) : lo * p.max_m;
  t.phase = phase;
  t.expert = lo;
  t.row_tile = row_tile;
  t.row0 = base + token0;
  t.num_tokens = min(s.num_rows[lo] - token0, C::kMaxTokens);
  t.num_slabs = row_tile == row_tiles - 1 ? p.phase[phase].tail_slabs : kSlabsPerTile;
  t.ready_count = phase == 1 ? p.phase[0].num_row_tiles * token_tiles : 0;
  return t;
}

/// One thread: claims tickets, publishes tiles, streams weights. Never waits for another CTA, so a
/// second phase's weights are under way while the first phase ends.
template <class C>
__device__ __forceinline__ void stream_weights(Shared<C>& s, const Params& p, int ticket) {
  Ring ring, slots;
  const std::uint64_t evict_first = ptx::policy_evict_first();
  const std::uint64_t evict_normal = ptx::policy_evict_normal();
  for (;;) {
    const TileInfo t = find_tile(s, p, ticket);
    wait_bounded(&s.tile_empty[slots.stage], slots.parity ^ 1);
    s.tile[slots.stage] = t;
    ptx::mbarrier_arrive(&s.tile_full[slots.stage]);
    slots.advance<Shared<C>::kTileSlots>();
    if (t.phase < 0) return;

    const Phase& phase = p.phase[t.phase];
    const int steps = phase.num_steps;
    const std::uint32_t bytes = t.num_slabs * C::kSlabBytes;
    const std::uint8_t* src = phase.weights + t.expert * phase.expert_bytes +
                              static_cast<long long>(t.row_tile) * steps * C::kWeightBytes;
    const bool read_once = s.tile_prefix[t.expert + 1] - s.tile_prefix[t.expert] == 1;
    const std::uint64_t policy = read_once ? evict_first : evict_normal;
    // Claiming late keeps CTAs balanced; this early hides the atomic's latency behind the ring.
    const int claim_step = max(0, steps - C::kStages);
    for (int k = 0; k < steps; ++k) {
      if (k == claim_step) ticket = atomicAdd(&p.sync[0], 1);
      wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(&s.full[ring.stage], bytes);
      ptx::bulk_copy(s.w[ring.stage], src, bytes, &s.full[ring.stage], policy);
      src += bytes;
      ring.advance<C::kStages>();
    }
  }
}

/// Waits until every tile of phase 0 that made this expert's rows is visible to the copy engine.
__device__ __forceinline__ void wait_for_rows(const Params& p, const TileInfo& t, int lane) {
  if (lane == 0) {
    const int* const finished = &p.sync[kSyncHeader + t.expert];
    const std::uint64_t begin = ptx::global_timer();
    while (ptx::load_acquire_gpu(finished) < t.ready_count) {
      __nanosleep(20);
      check_wait(begin);
    }
    ptx::fence_proxy_async();
  }
  __syncwarp();
}

/// The next claimed tile, for a producer warp; every lane gets it.
template <class C>
__device__ __forceinline__ TileInfo next_tile(Shared<C>& s, Ring& slots, int lane) {
  wait_bounded(&s.tile_full[slots.stage], slots.parity);
  const TileInfo t = s.tile[slots.stage];
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(&s.tile_empty[slots.stage]);
  slots.advance<Shared<C>::kTileSlots>();
  return t;
}

/// Index of the smallest box that holds num_tokens.
__device__ __forceinline__ int token_box(int num_tokens) {
  int box = 0;
  while ((8 << box) < num_tokens) ++box;
  return box;
}

/// One warp, of which one thread works: activation tiles by tensor copy.
template <class C>
__device__ __forceinline__ void fetch_activations(Shared<C>& s, const Params& p, int lane) {
  Ring ring, slots;
  const std::uint64_t policy = C::kIsDecode ? ptx::policy_evict_last() : ptx::policy_evict_normal();
  for (;;) {
    const TileInfo t = next_tile(s, slots, lane);
    if (t.phase < 0) return;
    if (t.phase == 1) wait_for_rows(p, t, lane);
    if (lane != 0) continue;
    const int box = token_box(t.num_tokens);
    const std::uint32_t bytes = (8 << box) * kStepK;
    const CUtensorMap* map = &p.x_map[t.phase][box];
    const int num_steps = p.phase[t.phase].num_steps;
    for (int k = 0; k < num_steps; ++k) {
      wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
      std::uint64_t* bar = &s.full[ring.stage];
      ptx::mbarrier_arrive_expect_tx(bar, bytes);
      ptx::tensor_copy_2d(s.x[ring.stage], map, k * kStepK, t.row0, bar, policy);
      ring.advance<C::kStages>();
    }
  }
}

/// One warp: activation scales. Lane i serves tokens i, i + 32, ...: it reads a few steps of its
/// rows at once (they share a sector) and hands them out step by step. Past the last valid token it
/// repeats it.
template <class C>
__device__ __forceinline__ void fetch_tile_scales(Shared<C>& s, const Phase& phase,
                                                  const TileInfo& t, Ring& ring, int lane) {
  constexpr int kRows = C::kMaxTokens / 32;
  constexpr int kChunk = (C::kIsDecode ? 16 : 8) / kRows;  // NOTE: registers, of 64 or 40
  const int place = lane / 2 % 4 * C::kScalePitch + lane / 8 * 2 + lane % 2;  // of token `lane`
  const int num_steps = phase.num_steps;
  const float* rows = phase.x_scale + static_cast<long long>(t.row0) * num_steps;
  for (int k0 = 0; k0 < num_steps; k0 += kChunk) {
    float scale[kRows][kChunk];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float* row = rows + min(lane + 32 * i, t.num_tokens - 1) * num_steps;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) scale[i][j] = row[min(k0 + j, num_steps - 1)];
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (k0 + j == num_steps) break;
      wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
#pragma unroll
      for (int i = 0; i < kRows; ++i) s.x_scale[ring.stage][place + 8 * i] = scale[i][j];
      __syncwarp();
      if (lane < kWarpArrivals) ptx::mbarrier_arrive(&s.full[ring.stage]);
      ring.advance<C::kStages>();
    }
  }
}

/// The warp that owns the stages' scales. Where the main loops need none, it only says so.
template <class C>
__device__ __forceinline__ void fetch_scales(Shared<C>& s, const Params& p, int lane) {
  Ring ring, slots;
  for (;;) {
    const TileInfo t = next_tile(s, slots, lane);
    if (t.phase < 0) return;
    const Phase& phase = p.phase[t.phase];
    if constexpr (C::kXScale == XScale::kPerGroup) {
      if (t.phase == 1) wait_for_rows(p, t, lane);
      fetch_tile_scales(s, phase, t, ring, lane);
    } else {
      for (int k = 0; k < phase.num_steps; ++k) {
        wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
        __syncwarp();
        if (lane < kWarpArrivals) ptx::mbarrier_arrive(&s.full[ring.stage]);
        ring.advance<C::kStages>();
      }
    }
  }
}

}  // namespace sluice::cuda
