// send.cuh - the rows of a staged chunk, sent to the ranks that own their experts.
#pragma once

#include <cuda_runtime.h>

#include "exchange/cuda/route.cuh"
#include "exchange/cuda/stage.cuh"

namespace sluice::cuda {

/// One warp: which entries of a token go to `peer`, a bit each. `list`: the token's entries.
__device__ inline unsigned entries_to(const SlotParams& p, int peer, const ChunkEntry* list) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return __ballot_sync(kAllLanes, lane < p.num_topk && list[lane].peer == peer);
}

/// One warp: where the rows of these entries of token `source` lie at `peer`, for who copies them.
__device__ inline void send_list(const SlotParams& p, std::uint64_t epoch, int peer,
                                 unsigned entries, const ChunkEntry* list, const int* next,
                                 std::int64_t source) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if ((entries >> lane & 1) == 0) return;
  p.window.put_word(
      peer, p.copies, source * p.num_topk + lane,
      epoch << 32 | static_cast<std::uint32_t>(next[list[lane].expert] + list[lane].before));
}

/// The warps send the rows of one staged chunk; lane 0 of each owns its bulk copies. `is_first`:
/// the CTA has the tokens' first part, and with it what there is once for each row.
template <WireFormat Wire, Mode Layout>
__device__ void send_chunk(const SlotParams& p, const Staging& s, const TokenPart& part,
                           bool is_first, std::uint64_t epoch, int first, int num_entries,
                           const ChunkEntry* list, const int* next, const std::uint8_t* payload,
                           const float* scale, int* sent) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int j = warp; j < num_entries; j += kDispatchThreads / 32) {
    const ChunkEntry entry = list[j];
    const int entry_idx = first * p.num_topk + j, peer = entry.peer;
    if (peer < 0) {
      if (lane == 0 && is_first) p.slot_row[entry_idx] = -1;
      continue;
    }
    const std::int64_t row = next[entry.expert] + entry.before;
    // In normal mode a token crosses a link once, with its first entry there. Rows of this rank's
    // own experts, and all of low-latency mode, are written one by one.
    bool travels = true;
    if (Layout == Mode::kNormal && peer != p.window.rank) {
      const ChunkEntry* const of_token = list + entry.token * p.num_topk;
      const unsigned there = entries_to(p, peer, of_token);
      travels = (there & ((1u << (j - entry.token * p.num_topk)) - 1)) == 0;
      if (travels && is_first) {
        send_list(p, epoch, peer, there, of_token, next,
                  std::int64_t{p.window.rank} * p.max_tokens + first + entry.token);
      }
    }
    if (travels && lane == 0) {
      p.window.put_bulk(peer, p.x, row * s.payload_bytes + part.first_byte,
                        payload + entry.token * s.payload_bytes, part.bytes);
    }
    if constexpr (kScaled<Wire>) {
      for (int g = lane; travels && g < part.num_scales; g += 32) {
        p.window.put(peer, p.scale, row * s.num_groups + part.first_scale + g,
                     scale[entry.token * s.num_groups + g]);
      }
    }
    if (lane == 0 && is_first) {
      p.window.put(
          peer, p.origin, row,
          static_cast<std::uint64_t>(p.window.rank) << 32 | static_cast<std::uint32_t>(entry_idx));
      p.slot_row[entry_idx] = std::int64_t{peer} << 32 | row;
      atomicAdd(&sent[travels ? peer : kMaxDeviceRanks + peer], 1);
    }
  }
  if (lane == 0) p.window.close_puts();
}

}  // namespace sluice::cuda
