// dispatch.cu - every row to its final place in the memory of the rank that owns its expert.
//
// Maths     row(t, k) = begin(e) + sum over lower ranks r of count(r, e)
//                     + #{(t', k') before (t, k) on this rank with the same expert e}
//           x[row(t, k)] = quantize(x[t]), quantized once per token
// Operands  x [T, hidden] bf16; topk_idx [T, k]; the window of device_layout.h.
// Tile      each CTA owns a range of tokens, in chunks of a few tokens: loaded and quantized into
//           shared memory, then one bulk copy per row. Work does not depend on the number of
//           experts.
// Shared    two counters per expert, the chunk's rows, two chunks of payload and scales.
// Needs     hidden % 128 == 0; all CTAs of all ranks of a device resident at once.
// Bound     bytes: x is read once, each row written once.
//
// Order of events, per CTA:
//   1 histogram of all of this rank's slots, and of those before its own tokens
//   2 counts to every rank: one word each that carries its epoch, so no flag follows
//   3 the first chunk is quantized while the counts travel
//   4 counts of every rank: where its rows begin, and whether a capacity is exceeded
//     (all ranks see the same counts and so refuse alike)
//   5 rows; the last CTA to finish raises this rank's flag at every rank
//   6 that CTA waits for every rank's flag and publishes num_rows
// Reuse: counts are overwritten only after every rank returned the slot's last use (kReuse); rows
// only after that rank's new counts have arrived, so after its kernels that read the old ones.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "backend/cuda/carveout.h"
#include "backend/cuda/ptx/sync.cuh"
#include "exchange/cuda/launch_in_order.cuh"
#include "exchange/cuda/protocol.cuh"
#include "exchange/cuda/route.cuh"
#include "exchange/cuda/stage.cuh"
#include "exchange/limits.h"

namespace sluice::cuda {
namespace {

constexpr int kThreads = kDispatchThreads;
constexpr int kWarps = kThreads / 32;

/// Peers are spread over the CTAs, and a CTA's peers and their experts over its warps.
__device__ void send_counts(const SlotParams& p, std::uint64_t epoch, const int* total) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int num_ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
  const int peers = (p.window.num_ranks - cta + num_ctas - 1) / num_ctas;
  const int parts = max(1, kWarps / max(1, peers));
  for (int job = warp; job < peers * parts; job += kWarps) {
    const int turn = job / parts, part = job - turn * parts;
    const int peer = cta + turn * num_ctas, begin = p.window.rank * p.placement.num_experts();
#pragma unroll 4
    for (int e = part * 32 + lane; e < p.placement.num_experts(); e += parts * 32) {
      p.window.put_word(peer, p.counts, begin + e, epoch << 32 | static_cast<unsigned>(total[e]));
    }
  }
}

/// The warps send the rows of one staged chunk; lane 0 of each owns its bulk copies.
template <WireFormat Wire>
__device__ void send_chunk(const SlotParams& p, const Staging& s, std::uint64_t epoch, int first,
                           int count, const std::int64_t* place, const std::uint8_t* payload,
                           const float* scale, int* sent) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int j = warp; j < count * p.num_topk; j += kWarps) {
    const std::int64_t at = place[j];
    if (lane == 0) p.slot_row[std::int64_t{first} * p.num_topk + j] = at;
    if (at < 0) continue;
    const int token = j / p.num_topk, k = j % p.num_topk;
    const int peer = static_cast<int>(at >> 32);
    const std::int64_t row = at & 0xffffffff;
    if (lane == 0) {
      p.window.put(peer, p.origin, row,
                   static_cast<std::uint64_t>(p.window.rank) << 32 |
                       static_cast<std::uint32_t>(first * p.num_topk + j));
    }
    // To another rank a token crosses once, with a list of its rows there; here no link is saved.
    if (p.max_m == 0 && peer != p.window.rank) {
      const std::int64_t other = lane < p.num_topk ? place[token * p.num_topk + lane] : -1;
      const bool same = other >= 0 && (other >> 32) == peer;
      if ((__ballot_sync(kAllLanes, same) & ((1u << k) - 1)) != 0) {
        if (lane == 0) atomicAdd(&sent[kMaxDeviceRanks + peer], 1);
        continue;
      }
      if (same) {
        const std::int64_t source = std::int64_t{p.window.rank} * p.max_tokens + first + token;
        p.window.put_word(peer, p.copies, source * p.num_topk + lane,
                          epoch << 32 | static_cast<std::uint32_t>(other));
      }
    }
    if (lane == 0) {
      p.window.put_bulk(peer, p.x, row * s.payload_bytes, payload + token * s.payload_bytes,
                        static_cast<std::uint32_t>(s.payload_bytes));
      atomicAdd(&sent[peer], 1);
    }
    if constexpr (kScaled<Wire>) {
      for (int g = lane; g < s.num_groups; g += 32) {
        p.window.put(peer, p.scale, row * s.num_groups + g, scale[token * s.num_groups + g]);
      }
    }
  }
  if (lane == 0) p.window.close_puts();
}

/// True for all threads of the CTA that finishes last; then everything the others did is visible.
__device__ bool arrive_last(const SlotParams& p) {
  __shared__ bool last;
  __syncthreads();
  if (gridDim.x == 1) return true;
  if (threadIdx.x == 0) {
    __threadfence_system();
    last = atomicAdd(&p.slot->arrived, 1) == static_cast<int>(gridDim.x) - 1;
    if (last) {
      p.slot->arrived = 0;
      __threadfence();
    }
  }
  __syncthreads();
  return last;
}

__device__ void forget_rows(const SlotParams& p) {
  const int num_local = p.placement.num_local();
  for (int e = static_cast<int>(threadIdx.x); e < num_local; e += static_cast<int>(blockDim.x)) {
    p.num_rows[e] = 0;
  }
}

template <WireFormat Wire>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_kernel(const __grid_constant__ SlotParams p,
                    const __grid_constant__ DispatchParams d) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ std::int64_t place[kMaxChunk * kMaxTopk];
  __shared__ int sent[2 * kMaxDeviceRanks];           // Rows, then repeats.
  __shared__ int first_expert[kMaxChunk * kMaxTopk];  // Of the first chunk's slots.
  Staging s = staging_of<Wire>(p.hidden);
  s.tokens = min(s.tokens, d.chunk_tokens);
  int* const total = reinterpret_cast<int*>(shared);
  int* const next = total + p.placement.num_experts();
  std::uint8_t* const buffers = shared + s.counters_bytes(p.placement.num_experts());
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int num_ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
  const int begin = static_cast<int>(std::int64_t{d.num_tokens} * cta / num_ctas);
  const int end = static_cast<int>(std::int64_t{d.num_tokens} * (cta + 1) / num_ctas);
  const auto payload_of = [&](int buffer) { return buffers + buffer * s.buffer_bytes(); };
  const auto scale_of = [&](int buffer) {
    return reinterpret_cast<float*>(payload_of(buffer) + s.tokens * s.payload_bytes);
  };

  // Loads in flight together: the first tokens, whether to run, as which epoch, the first experts,
  // and whether every rank has let go of the slot's last use (a relaxed load will do: stores do not
  // overtake what they depend on).
  const int first_count = min(s.tokens, end - begin);
  begin_in_order(p);
  Batch batch;
  load_batch(p, d, begin, first_count * (p.hidden / 8), tid, batch);
  const bool failed = has_failed(p);
  const std::uint64_t epoch = *static_cast<volatile std::uint64_t*>(&p.slot->epoch) + 1;
  bool reusable = true;
  if (tid < p.window.num_ranks) {
    reusable = p.window.word(p.returned, tid) >= wanted(kReuse, epoch);
  }
  const int num_slots = d.num_tokens * p.num_topk;
  int expert = tid < num_slots ? expert_of(p, d, tid) : -1;
  for (int e = tid; e < 2 * p.placement.num_experts(); e += kThreads) total[e] = 0;
  if (tid < 2 * kMaxDeviceRanks) sent[tid] = 0;
  if (__syncthreads_or(failed) != 0) {
    forget_rows(p);
    return;
  }
  for (int i = tid; i < num_slots;) {
    const int mine = i - begin * p.num_topk;
    if (mine >= 0 && mine < first_count * p.num_topk) first_expert[mine] = expert;
    if (expert >= 0) {
      atomicAdd(&total[expert], 1);
      if (mine < 0) atomicAdd(&next[expert], 1);
    }
    i += kThreads;
    if (i < num_slots) expert = expert_of(p, d, i);
  }
  bool ok = __syncthreads_and(reusable) != 0 || wait_for_all(p, p.returned, kReuse, epoch);
  if (ok) send_counts(p, epoch, total);
  int clipped = stage_chunk<Wire>(p, d, begin, first_count, batch, payload_of(0), scale_of(0));
  __syncthreads();  // total[] is about to become the sum over ranks.
  const RouteResult routed = ok ? place_experts(p, epoch, total, next) : RouteResult::kMissing;
  ok = routed != RouteResult::kMissing;
  const bool refused = routed == RouteResult::kRefused;

  if (SLUICE_PLANTED_FAULT == 2 && ok && cta == 0) signal_all(p, p.dispatched, epoch);
  int buffer = 0;
  for (int t = begin; ok && t < end; t += s.tokens, buffer ^= 1) {
    const int count = min(s.tokens, end - t);
    if (refused) {
      for (int i = tid; i < count * p.num_topk; i += kThreads) {
        p.slot_row[std::int64_t{t} * p.num_topk + i] = -1;
      }
      continue;
    }
    if (tid < 32) {
      assign_rows(p, d, t * p.num_topk, count * p.num_topk, t == begin ? first_expert : nullptr,
                  next, place);
    }
    ptx::fence_proxy_async_shared();  // The copy engine reads what ordinary stores wrote.
    __syncthreads();
    send_chunk<Wire>(p, s, epoch, t, count, place, payload_of(buffer), scale_of(buffer), sent);
    if (t + s.tokens < end) {
      const int next_count = min(s.tokens, end - t - s.tokens);
      load_batch(p, d, t + s.tokens, next_count * (p.hidden / 8), tid, batch);
      if (lane == 0) p.window.wait_sources<1>();  // The other buffer's copies have read it.
      __syncthreads();
      clipped += stage_chunk<Wire>(p, d, t + s.tokens, next_count, batch, payload_of(buffer ^ 1),
                                   scale_of(buffer ^ 1));
    }
  }
  // Makes the copies visible to this thread, which signals.
  if (lane == 0 && SLUICE_PLANTED_FAULT != 1) p.window.wait_puts();
  if (clipped > 0) atomicAdd(&p.state->stats.saturated, static_cast<unsigned long long>(clipped));
  const bool last = arrive_last(p);
  // Other CTAs may have failed; this one alone would know.
  const bool stopped = __syncthreads_or(!ok || (num_ctas > 1 && has_failed(p))) != 0;
  if (!stopped && last && SLUICE_PLANTED_FAULT != 2) signal_all(p, p.dispatched, epoch);
  if (lane == 0 && SLUICE_PLANTED_FAULT == 1) p.window.wait_puts();
  if (tid < p.window.num_ranks && sent[tid] > 0) {
    atomicAdd(&p.state->stats.rows[tid], static_cast<unsigned long long>(sent[tid]));
    atomicAdd(&p.state->stats.repeats[tid],
              static_cast<unsigned long long>(sent[kMaxDeviceRanks + tid]));
  }
  if (stopped) forget_rows(p);
  if (stopped || !last) return;

  if (tid == 0) p.slot->epoch = epoch, p.slot->refused = refused;
  const int num_local = p.placement.num_local();
  for (int e = tid; e < num_local; e += kThreads) {
    const int rows = refused ? 0 : total[p.placement.expert_of(p.window.rank, e)];
    p.num_rows[e] = rows;
    if (d.row_totals != nullptr) d.row_totals[e] += rows;
  }
  if (d.receive && !wait_for_all(p, p.dispatched, kDispatchRows, epoch)) forget_rows(p);
}

/// Copies tokens of other ranks that crossed once for several experts of this rank: a warp reads
/// the row that came once and writes it to the rows of the other experts.
__device__ void copy_tokens(const SlotParams& p, std::uint64_t epoch, int payload_bytes,
                            int num_groups) {
  constexpr int kBatch = 7;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint8_t* const x = p.window.own<std::uint8_t>(p.x);
  float* const scale = p.window.own<float>(p.scale);
  const int vectors = payload_bytes / 16;
  const std::int64_t num_sources = std::int64_t{p.window.num_ranks} * p.max_tokens;
  for (std::int64_t source = blockIdx.x * kWarps + threadIdx.x / 32; source < num_sources;
       source += std::int64_t{gridDim.x} * kWarps) {
    // Lane k has the token's row for its k-th expert, if that is here and of this epoch.
    const std::uint64_t word =
        lane < p.num_topk ? p.window.word(p.copies, source * p.num_topk + lane) : 0;
    const auto row = static_cast<std::uint32_t>(word);
    const unsigned here = __ballot_sync(
        kAllLanes, static_cast<std::uint32_t>(word >> 32) == static_cast<std::uint32_t>(epoch));
    const unsigned others = here & (here - 1);
    if (others == 0) continue;
    const std::int64_t from = __shfl_sync(kAllLanes, row, __ffs(here) - 1);
    const uint4* const in = reinterpret_cast<const uint4*>(x + from * payload_bytes) + lane;
    for (int base = 0; base < vectors; base += 32 * kBatch) {
      uint4 loaded[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (base + lane + 32 * i < vectors) loaded[i] = in[base + 32 * i];
      }
      for (unsigned left = others; left != 0; left &= left - 1) {
        const std::int64_t to = __shfl_sync(kAllLanes, row, __ffs(left) - 1);
        uint4* const out = reinterpret_cast<uint4*>(x + to * payload_bytes) + lane;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (base + lane + 32 * i < vectors) out[base + 32 * i] = loaded[i];
        }
      }
    }
    for (int base = 0; base < num_groups; base += 32) {
      const bool valid = base + lane < num_groups;
      const float s = valid ? scale[from * num_groups + base + lane] : 0.0f;
      for (unsigned left = others; left != 0; left &= left - 1) {
        const std::int64_t to = __shfl_sync(kAllLanes, row, __ffs(left) - 1);
        if (valid) scale[to * num_groups + base + lane] = s;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    receive_kernel(const __grid_constant__ SlotParams p, int payload_bytes, int num_groups) {
  begin_in_order(p);
  if (__syncthreads_or(has_failed(p)) != 0 ||
      !wait_for_all(p, p.dispatched, kDispatchRows, p.slot->epoch)) {
    forget_rows(p);
    return;
  }
  if (p.max_m == 0) copy_tokens(p, p.slot->epoch, payload_bytes, num_groups);
}

template <WireFormat Wire>
void launch(const SlotParams& slot, const DispatchParams& dispatch, int num_ctas,
            cudaStream_t stream) {
  const int bytes = staging_of<Wire>(slot.hidden).total_bytes(slot.placement.num_experts());
  launch_in_order(dispatch_kernel<Wire>, num_ctas, kThreads, bytes, stream, slot, dispatch);
}

template <WireFormat Wire>
void prepare_dispatch() {
  constexpr int kMostShared = 220 * 1024;
  SLUICE_CUDA_CHECK(cudaFuncSetAttribute(dispatch_kernel<Wire>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared));
  prefer_shared_memory(dispatch_kernel<Wire>);
}

}  // namespace

void prepare_combine_kernels();

void prepare_exchange_kernels() {
  prepare_dispatch<WireFormat::kBf16>();
  prepare_dispatch<WireFormat::kE4m3Group>();
  prepare_dispatch<WireFormat::kE4m3Pow2>();
  prepare_dispatch<WireFormat::kE4m3Static>();
  prepare_dispatch<WireFormat::kE4m3Token>();
  prefer_shared_memory(receive_kernel);
  prepare_combine_kernels();
}

void launch_dispatch(const SlotParams& slot, const DispatchParams& dispatch, WireFormat wire,
                     int num_ctas, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (wire) {
    case WireFormat::kBf16:
      return launch<WireFormat::kBf16>(slot, dispatch, num_ctas, queue);
    case WireFormat::kE4m3Group:
      return launch<WireFormat::kE4m3Group>(slot, dispatch, num_ctas, queue);
    case WireFormat::kE4m3Pow2:
      return launch<WireFormat::kE4m3Pow2>(slot, dispatch, num_ctas, queue);
    case WireFormat::kE4m3Static:
      return launch<WireFormat::kE4m3Static>(slot, dispatch, num_ctas, queue);
    case WireFormat::kE4m3Token:
      return launch<WireFormat::kE4m3Token>(slot, dispatch, num_ctas, queue);
  }
  throw Error(ErrorCode::kInternal, std::string("the exchange has no kernel for wire format ") +
                                        std::to_string(static_cast<int>(wire)));
}

void launch_receive(const SlotParams& slot, WireFormat wire, int num_ctas, void* stream) {
  const auto payload_bytes = static_cast<int>(wire_payload_bytes(wire, slot.hidden));
  const auto num_groups = static_cast<int>(wire_scale_bytes(wire, slot.hidden) / sizeof(float));
  launch_in_order(receive_kernel, slot.max_m == 0 ? num_ctas : 1, kThreads, 0, stream, slot,
                  payload_bytes, num_groups);
}

}  // namespace sluice::cuda
