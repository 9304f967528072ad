// dispatch.cu - every row to its final place in the memory of the rank that owns its expert.
//
// Maths     row(t, k) = begin(e) + sum over lower ranks r of count(r, e)
//                     + #{(t', k') before (t, k) on this rank with the same expert e}
//           x[row(t, k)] = quantize(x[t]), quantized once per token
// Operands  x [T, hidden] bf16; topk_idx [T, k]; the window of device_layout.h.
// Tile      each CTA owns a range of tokens, in chunks of a few tokens: loaded and quantized into
//           shared memory, then one bulk copy per row. Where there are more SMs than tokens,
//           several CTAs share a token, each with some of its groups of 128. Work does not depend
//           on the number of experts.
// Shared    two counters per expert, the chunk's rows, two chunks of payload and scales.
// Needs     hidden % 128 == 0; all CTAs of all ranks of a device resident at once.
// Bound     bytes: x is read once, each row written once.
//
// Order of events, per CTA:
//   1 histogram of all of this rank's slots, and of those before its own tokens
//   2 counts to every rank: one word each that carries its epoch, so no flag follows, and the layer
//   3 the first chunk is quantized while the counts travel
//   4 counts of every rank: where its rows begin, and whether a capacity is exceeded
//     (all ranks see the same counts and so refuse alike)
//   5 rows; when they are there, the CTA's share of this rank's flag, at every rank
//   6 the first CTA publishes num_rows, and waits for the flags of every rank
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
#include "exchange/cuda/send.cuh"
#include "exchange/cuda/stage.cuh"
#include "exchange/limits.h"

namespace sluice::cuda {
namespace {

constexpr int kThreads = kDispatchThreads;
constexpr int kWarps = kThreads / 32;

constexpr bool kSignsEarly = SLUICE_PLANTED_FAULT == 2 || SLUICE_PLANTED_FAULT == 4;
constexpr int kFirstEntries = 2;  // Of each thread, loaded at once.

/// Peers are spread over the CTAs.
__device__ void send_counts(const SlotParams& p, std::uint32_t stamp, const int* total,
                            const int* next) {
  const int begin = p.window.rank * p.placement.num_experts();
#pragma unroll 1
  for (int peer = static_cast<int>(blockIdx.x); peer < p.window.num_ranks;
       peer += static_cast<int>(gridDim.x)) {
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < p.placement.num_experts(); e += kThreads) {
      p.window.put_word(peer, p.counts, begin + e,
                        std::uint64_t{stamp} << 32 | static_cast<unsigned>(total[e] + next[e]));
    }
  }
}

__device__ void forget_rows(const SlotParams& p) {
  const int num_local = p.placement.num_local();
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < num_local; e += static_cast<int>(blockDim.x)) {
    p.num_rows[e] = 0;
  }
}

/// The first CTA: how many rows came, and then that the dispatch was. It waits for this rank's own
/// flag at least: by then no CTA needs the slot's last epoch.
__device__ void finish(const SlotParams& p, const DispatchParams& d, std::uint64_t epoch,
                       bool refused, const int* total) {
  const int num_local = p.placement.num_local();
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < num_local; e += kThreads) {
    const int rows = refused ? 0 : total[p.placement.expert_of(p.window.rank, e)];
    p.num_rows[e] = rows;
    if (d.row_totals != nullptr) d.row_totals[e] += rows;
  }
  const int first = d.receive ? 0 : p.window.rank;
  const int end = d.receive ? p.window.num_ranks : first + 1;
  if (!wait_for_ranks(p, p.dispatched, kDispatchRows, epoch, first, end)) return forget_rows(p);
  if (threadIdx.x == 0) p.slot->epoch = epoch, p.slot->refused = refused;
}

template <WireFormat Wire, Mode Layout>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_kernel(const __grid_constant__ SlotParams p,
                    const __grid_constant__ DispatchParams d) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ ChunkEntry list[2][kMaxChunk * kMaxTopk];
  __shared__ int sent[2 * kMaxDeviceRanks];           // Rows, then repeats.
  __shared__ int first_expert[kMaxChunk * kMaxTopk];  // Of the first chunk's slots.
  __shared__ LostCounts lost;
  // All that the parameters alone decide, before earlier kernels have ended.
  read_ahead(p, d);
  Staging s = staging_of<Wire>(p.hidden);
  s.tokens = min(s.tokens, d.chunk_tokens);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int share = static_cast<int>(blockIdx.x) / d.parts;  // Of the tokens.
  const int num_shares = static_cast<int>(gridDim.x) / d.parts;
  const int part_idx = static_cast<int>(blockIdx.x) - share * d.parts;
  const TokenPart part = part_of<Wire>(s, p.hidden, d.parts, part_idx);
  const int begin = static_cast<int>(std::int64_t{d.num_tokens} * share / num_shares);
  const int end = static_cast<int>(std::int64_t{d.num_tokens} * (share + 1) / num_shares);
  int* const total = reinterpret_cast<int*>(shared);
  int* const next = total + p.placement.num_experts();
  std::uint8_t* const buffers = shared + s.counters_bytes(p.placement.num_experts());
  const auto payload_of = [&](int buffer) { return buffers + buffer * s.buffer_bytes(); };
  const auto scale_of = [&](int buffer) {
    return reinterpret_cast<float*>(payload_of(buffer) + s.tokens * s.payload_bytes);
  };
  const auto x_of = [&](int token) {
    return d.x + std::int64_t{token} * p.hidden + part.first_vector * 8;
  };
#pragma unroll 1
  for (int e = tid; e < 2 * p.placement.num_experts(); e += kThreads) total[e] = 0;
  if (tid < 2 * kMaxDeviceRanks) sent[tid] = 0;
  if (tid == 0) lost = {};

  // Loads in flight together: the first tokens, whether to run, as which epoch, the first experts,
  // and whether every rank has let go of the slot's last use (a relaxed load will do: stores do not
  // overtake what they depend on).
  const int first_count = min(s.tokens, end - begin);
  begin_in_order(p);
  Batch batch;
  load_batch(x_of(begin), first_count * part.row_vectors, tid, batch);
  const bool failed = has_failed(p);
  const std::uint64_t epoch = *static_cast<volatile std::uint64_t*>(&p.slot->epoch) + 1;
  bool reusable = true;
  if (tid < p.window.num_ranks) {
    reusable = p.window.word(p.returned, tid) >= wanted(kReuse, epoch);
  }
  const int num_entries = d.num_tokens * p.num_topk;
  int expert[kFirstEntries];
#pragma unroll
  for (int j = 0; j < kFirstEntries; ++j) {
    const int i = tid + j * kThreads;
    expert[j] = i < num_entries ? expert_of(p, d, i) : -1;
  }
  if (__syncthreads_or(failed) != 0) {
    forget_rows(p);
    return;
  }
  const int own = begin * p.num_topk, kept = first_count * p.num_topk;
#pragma unroll
  for (int j = 0; j < kFirstEntries; ++j) {
    const int i = tid + j * kThreads;
    if (i < num_entries) count_entry(i, expert[j], own, kept, total, next, first_expert);
  }
  if (num_entries > kFirstEntries * kThreads) [[unlikely]] {
    constexpr int kFrom = kFirstEntries * kThreads;
    if (d.wide_idx) {
      count_rest<std::int64_t>(p, d, kFrom, own, kept, total, next, first_expert);
    } else {
      count_rest<std::int32_t>(p, d, kFrom, own, kept, total, next, first_expert);
    }
  }
  bool ok = true;
  if (__syncthreads_and(reusable) == 0) [[unlikely]] {
    ok = wait_for_all(p, p.returned, kReuse, epoch);
  }
  if (ok) send_counts(p, count_stamp(epoch, d.layer), total, next);
  // While they travel: all that does not depend on them. One warp looks after the list of entries.
  const bool lists = tid / 32 == kWarps - 1;
  if (Layout == Mode::kLowLatency) begin_masked(p, next);
  if (lists) list_entries(p, d, 0, first_count * p.num_topk, first_expert, list[0]);
  int clipped = stage_chunk<Wire>(x_of(begin), first_count, part.row_vectors, d.static_inverse,
                                  batch, payload_of(0), scale_of(0));
  // The next chunk's tokens are on their way while this one is sent.
  const auto ask_for = [&](int token) {
    load_batch(x_of(token), min(s.tokens, end - token) * part.row_vectors, tid, batch);
  };
  ask_for(begin + s.tokens);
  ptx::fence_proxy_async_shared();  // The copy engine reads what ordinary stores wrote.
  const RouteResult routed =
      ok ? place_experts<Layout>(p, epoch, d.layer, total, next, lost) : RouteResult::kMissing;
  ok = routed != RouteResult::kMissing;
  const bool refused = routed == RouteResult::kRefused;

  if (kSignsEarly && ok) signal_share(p);
  for (int i = begin * p.num_topk + tid; refused && i < end * p.num_topk; i += kThreads) {
    p.slot_row[i] = -1;
  }
  int buffer = 0;
  for (int t = begin; ok && !refused && t < end; buffer ^= 1) {
    const int count = min(s.tokens, end - t) * p.num_topk;
    send_chunk<Wire, Layout>(p, s, part, part_idx == 0, epoch, t, count, list[buffer], next,
                             payload_of(buffer), scale_of(buffer), sent);
    t += s.tokens;
    if (t >= end) break;
    const int next_count = min(s.tokens, end - t);
    if (lane == 0) p.window.wait_sources<1>();  // The other buffer's copies have read it.
    __syncthreads();
    clipped += stage_chunk<Wire>(x_of(t), next_count, part.row_vectors, d.static_inverse, batch,
                                 payload_of(buffer ^ 1), scale_of(buffer ^ 1));
    if (lists) {
      advance(count, list[buffer], next);
      list_entries(p, d, t * p.num_topk, next_count * p.num_topk, nullptr, list[buffer ^ 1]);
    }
    ask_for(t + s.tokens);
    ptx::fence_proxy_async_shared();
    __syncthreads();
  }
  // Makes the copies visible to this thread, and the barrier to those that signal.
  if (lane == 0 && SLUICE_PLANTED_FAULT != 1) p.window.wait_puts();
  __syncthreads();
  if (ok && !kSignsEarly) signal_share(p);
  if (lane == 0 && SLUICE_PLANTED_FAULT == 1) p.window.wait_puts();
  if (clipped > 0) atomicAdd(&p.state->stats.saturated, static_cast<unsigned long long>(clipped));
  if (tid < p.window.num_ranks && sent[tid] > 0) {
    atomicAdd(&p.state->stats.rows[tid], static_cast<unsigned long long>(sent[tid]));
    atomicAdd(&p.state->stats.repeats[tid],
              static_cast<unsigned long long>(sent[kMaxDeviceRanks + tid]));
  }
  if (!ok) return forget_rows(p);
  if (blockIdx.x == 0) finish(p, d, epoch, refused, total);
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
  const auto kernel = slot.max_m > 0 ? dispatch_kernel<Wire, Mode::kLowLatency>
                                     : dispatch_kernel<Wire, Mode::kNormal>;
  launch_in_order(kernel, num_ctas, kThreads, bytes, stream, slot, dispatch);
}

template <WireFormat Wire>
void prepare_dispatch() {
  constexpr int kMostShared = 216 * 1024;  // Beside what the kernel names.
  const auto prepare = [](auto kernel) {
    SLUICE_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared));
    prefer_shared_memory(kernel);
  };
  prepare(dispatch_kernel<Wire, Mode::kLowLatency>);
  prepare(dispatch_kernel<Wire, Mode::kNormal>);
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
