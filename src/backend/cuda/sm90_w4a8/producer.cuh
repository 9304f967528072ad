// producer.cuh - producer roles: claim tiles, stream weights, fetch activations. Their
// scales: scales.cuh.
#pragma once

#include "backend/cuda/ptx/copy.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/ptx/system.cuh"
#include "backend/cuda/sm90_w4a8/config.cuh"
#include "backend/cuda/sm90_w4a8/tickets.cuh"

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

/// Makes a tile known to the other roles.
template <class C>
__device__ __forceinline__ void publish(Shared<C>& s, Ring& slots, const TileInfo& t) {
  wait_bounded(&s.tile_empty[slots.stage], slots.parity ^ 1);
  s.tile[slots.stage] = t;
  ptx::mbarrier_arrive(&s.tile_full[slots.stage]);
  slots.advance<Shared<C>::kTileSlots>();
}

/// A stage to which this producer brings nothing.
template <class C>
__device__ __forceinline__ void pass_stage(Shared<C>& s, Ring& ring) {
  wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
  ptx::mbarrier_arrive(&s.full[ring.stage]);
  ring.advance<C::kStages>();
}

/// One thread: claims tickets, publishes tiles, streams weights. Never waits for another CTA, so a
/// second phase's weights are under way while the first phase ends.
template <class C>
__device__ __forceinline__ void stream_weights(Shared<C>& s, const Params& p, int ticket) {
  Ring ring, slots;
  const std::uint64_t evict_first = ptx::policy_evict_first();
  const std::uint64_t evict_normal = ptx::policy_evict_normal();
  for (;;) {
    TileInfo t = find_tile(s, p, ticket);
    if (t.phase < 0) return publish(s, slots, t);

    const Phase& phase = p.phase[t.phase];
    const int steps = phase.num_steps;
    const std::uint8_t* src =
        phase.weights + t.expert * phase.expert_bytes +
        static_cast<long long>(t.row_tile) * steps * (C::kPasses * C::kWeightBytes);
    const bool read_once = s.tile_prefix[t.expert + 1] - s.tile_prefix[t.expert] == 1;
    const std::uint64_t policy = read_once ? evict_first : evict_normal;
    // Claiming late keeps CTAs balanced; this early hides the atomic's latency behind the ring.
    const auto slabs_of = [&phase](int row_tile) {
      return row_tile == phase.num_row_tiles - 1 ? phase.tail_slabs : kSlabsPerTile;
    };
    bool is_published = false;
    int left = t.row_tiles, until_claim = max(0, left * steps - C::kStages);
    t.row_tiles = count_together<C>(phase, t);
    for (; left > 0; --left, ++t.row_tile) {
      if (!is_published || row_tiles_of<C>(t) == 1) {
        t.num_slabs = slabs_of(t.row_tile + row_tiles_of<C>(t) - 1);
        publish(s, slots, t);
        is_published = true;
      }
      const std::uint32_t bytes = slabs_of(t.row_tile) * C::kSlabBytes;
      if constexpr (C::kPasses > 1) {
        // The ticket is claimed in the last row tile's last pass.
        for (int passes = t.num_slabs / C::kSlabsPerPass; passes > 0; --passes) {
          for (int k = 0; k < steps; ++k) {
            if (left == 1 && passes == 1 && k == max(0, steps - C::kStages)) {
              ticket = atomicAdd(&p.sync[0], 1);
            }
            wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
            ptx::mbarrier_arrive_expect_tx(&s.full[ring.stage], C::kWeightBytes);
            ptx::bulk_copy(s.w[ring.stage], src, C::kWeightBytes, &s.full[ring.stage], policy);
            src += bytes;
            ring.advance<C::kStages>();
          }
          src += C::kWeightBytes - static_cast<int>(steps * bytes);  // back to the first step
          if (C::has_row_stage(t.phase)) pass_stage(s, ring);
        }
        src += (steps - 1) * bytes;
      } else {
        for (int k = 0; k < steps; ++k) {
          if (until_claim-- == 0) ticket = atomicAdd(&p.sync[0], 1);
          wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
          ptx::mbarrier_arrive_expect_tx(&s.full[ring.stage], bytes);
          ptx::bulk_copy(s.w[ring.stage], src, bytes, &s.full[ring.stage], policy);
          src += bytes;
          ring.advance<C::kStages>();
        }
        if (C::has_row_stage(t.phase)) pass_stage(s, ring);
      }
    }
  }
}

/// Waits until every tile of phase 0 that made this expert's rows is visible to the copy engine.
/// `ready` remembers the expert whose rows are: its other tiles need not ask memory again.
__device__ __forceinline__ void wait_for_rows(const Params& p, const TileInfo& t, int lane,
                                              int& ready) {
  if (t.phase == 0 || t.expert == ready) return;
  ready = t.expert;
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
  if (lane < kWarpArrivals) ptx::mbarrier_arrive(&s.tile_empty[slots.stage]);
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
  int ready = -1;
  const std::uint64_t policy = C::kIsDecode ? ptx::policy_evict_last() : ptx::policy_evict_normal();
  for (;;) {
    const TileInfo t = next_tile(s, slots, lane);
    if (t.phase < 0) return;
    wait_for_rows(p, t, lane, ready);
    if (lane != 0) continue;
    const int box = token_box(t.num_tokens);
    const std::uint32_t bytes = (8 << box) * kStepK;
    const CUtensorMap* map = &p.x_map[t.phase][box];
    const int num_steps = p.phase[t.phase].num_steps;
    for (int runs = runs_of<C>(t); runs > 0; --runs) {
      for (int k = 0; k < num_steps; ++k) {
        wait_bounded(&s.empty[ring.stage], ring.parity ^ 1);
        std::uint64_t* bar = &s.full[ring.stage];
        ptx::mbarrier_arrive_expect_tx(bar, bytes);
        ptx::tensor_copy_2d(s.x[ring.stage], map, k * kStepK, t.row0, bar, policy);
        ring.advance<C::kStages>();
      }
      if (C::kPasses > 1 && C::has_row_stage(t.phase)) pass_stage(s, ring);
    }
    if (C::kPasses == 1 && C::has_row_stage(t.phase)) pass_stage(s, ring);
  }
}

}  // namespace sluice::cuda
