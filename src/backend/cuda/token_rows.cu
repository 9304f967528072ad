// token_rows.cu - tokens to the rows of their experts, cast on the way.
//
// Maths     row(t, k) = begin(e) + #{(t', k') before (t, k) with the same expert e}, e here
//           x[row(t, k)] = cast(token t), the token cast once, by the formats of e4m3_group.cuh
// Operands  tokens [T, H] bf16, or e4m3 with scales; topk_idx [T, k]; channels fastest.
// Tile      a CTA owns a range of tokens and a part of their channels, whole groups. It
//           counts the entries of all tokens by itself, so no CTA waits for another and one launch
//           does everything. A thread casts 16 B of a token and stores the codes once per row.
// Shared    two counters per expert, rows of up to 1024 entries.
// Needs     H % 128 == 0, at most 1024 experts and 32 top-k entries.
// Bound     bytes: a token is read once and written once per row.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "backend/cuda/carveout.h"
#include "backend/cuda/e4m3_group.cuh"
#include "backend/cuda/launch.cuh"
#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/token_rows.h"

namespace sluice::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kCtasPerSm = 2;        // Of 64 registers a thread.
constexpr int kDepth = 4;            // Vectors of one thread in flight.
constexpr int kIdsInFlight = 8;      // Entries of one thread in flight.
constexpr int kChunkEntries = 1024;  // Whose rows are in shared memory at a time.
constexpr int kMaxTokenTopk = 32;
constexpr int kPartVectors = 128;  // Least share of a token's vectors that a CTA of its own takes.
constexpr unsigned kAllLanes = 0xffffffffu;

struct GatherParams {
  GatherTokens args;
  int part_vectors;  // Of a token, by one CTA; a multiple of 16.
};

/// The casts of a token: of bf16, a first and perhaps one to a static scale; of e4m3, none or that.
enum class TokenCast : std::uint8_t {
  kGroup,
  kPow2,
  kStatic,
  kToken,
  kGroupStatic,
  kPow2Static,
  kCopy,
  kRequantize
};
template <TokenCast C>
inline constexpr bool kIsCoded = C == TokenCast::kCopy || C == TokenCast::kRequantize;
template <TokenCast C>
inline constexpr int kVectorChannels = kIsCoded<C> ? 16 : 8;  // Of 16 B.

/// Local expert of an entry, or -1.
__device__ __forceinline__ int local_expert(const EntryRows& p, int entry) {
  const long long e = p.wide_idx ? static_cast<const long long*>(p.topk_idx)[entry]
                                 : static_cast<const int*>(p.topk_idx)[entry];
  const bool is_here =
      e >= p.first_expert && e < static_cast<long long>(p.first_expert) + p.num_experts;
  return is_here ? static_cast<int>(e - p.first_expert) : -1;
}

/// Counts the entries before `begin` into before[e], all others into rest[e].
__device__ void count_entries(const EntryRows& p, int num_entries, int begin, int* before,
                              int* rest) {
  for (int base = static_cast<int>(threadIdx.x); base < num_entries;
       base += kThreads * kIdsInFlight) {
    int expert[kIdsInFlight];
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i) {
      const int entry = base + i * kThreads;
      expert[i] = entry < num_entries ? local_expert(p, entry) : -1;
    }
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i) {
      if (expert[i] < 0) continue;
      atomicAdd((base + i * kThreads < begin ? before : rest) + expert[i], 1);
    }
  }
}

/// One warp: before[e] becomes the row of this CTA's first entry with expert e.
__device__ void begin_rows(const EntryRows& p, bool publishes, int* before, const int* rest) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int carry = 0;
  for (int base = 0; base < p.num_experts; base += 32) {
    const int e = base + lane;
    const bool exists = e < p.num_experts;
    const int count = exists ? before[e] + rest[e] : 0;
    int sum = count;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, d);
      if (lane >= d) sum += other;
    }
    const int first = carry + sum - count;
    if (exists) {
      before[e] += first;
      if (publishes) p.begin[e] = first, p.count[e] = count;
    }
    carry += __shfl_sync(kAllLanes, sum, 31);
  }
}

/// One warp gives the entries [first, first + count) their rows, in order.
__device__ void assign_rows(const EntryRows& p, bool publishes, int first, int count, int* next,
                            int* place, std::uint8_t* has_row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = lane; i < count; i += 32) has_row[i] = 0;
  __syncwarp();
  for (int base = 0; base < count; base += 32) {
    const int i = base + lane;
    const int e = i < count ? local_expert(p, first + i) : -1;
    const unsigned same = __match_any_sync(kAllLanes, e);
    const int before = __popc(same & ((1u << lane) - 1));
    const int row = e >= 0 ? next[e] + before : -1;
    __syncwarp();
    if (e >= 0 && before == 0) next[e] += __popc(same);
    __syncwarp();
    if (i >= count) continue;
    place[i] = row;
    if (row >= 0) has_row[i / p.num_topk] = 1;
    if (publishes) p.row_of[first + i] = row;
  }
}

/// 16 B of a token, and the scale of their group where the token has some.
struct Item {
  uint4 data;
  float scale;
};

template <TokenCast C>
__device__ __forceinline__ Item load_item(const GatherTokens& p, int token, int vector) {
  const std::int64_t width = p.out.width;
  if constexpr (kIsCoded<C>) {
    const Fp8RowsView& in = p.tokens.coded;
    Item item{__ldcs(reinterpret_cast<const uint4*>(in.row(token)) + vector), 0};
    if (in.scale != nullptr) {
      item.scale = in.scale_per_row ? in.scale[token]
                                    : in.scale[token * (width / kActivationGroup) + vector / 8];
    }
    return item;
  } else {
    return {__ldcs(reinterpret_cast<const uint4*>(p.tokens.x + token * width) + vector), 0};
  }
}

/// Codes of one vector, in the first kVectorChannels bytes, and their group's scale.
struct Coded {
  uint4 codes;
  float scale;
};

/// All lanes of a warp call it; 16 neighbours hold one group of a bf16 token. `token_amax`: of the
/// whole token, for kToken.
template <TokenCast C>
__device__ __forceinline__ Coded cast_item(const Item& in, float static_inverse, float token_amax) {
  if constexpr (C == TokenCast::kCopy) {
    return {in.data, in.scale};
  } else if constexpr (C == TokenCast::kRequantize) {
    return {{requantize4(in.data.x, in.scale, static_inverse),
             requantize4(in.data.y, in.scale, static_inverse),
             requantize4(in.data.z, in.scale, static_inverse),
             requantize4(in.data.w, in.scale, static_inverse)},
            0};
  } else {
    float v[8];
    float amax = widen_vector(in.data, v);
    float scale = 0.0f, factor = static_inverse;
    if constexpr (C == TokenCast::kToken) {
      scale = group_scale(token_amax);
      factor = group_inverse(token_amax);
    } else if constexpr (C != TokenCast::kStatic) {
#pragma unroll
      for (int d = 1; d < 16; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, d));
      scale = group_scale(amax);
      factor = group_inverse(amax);
      if constexpr (C == TokenCast::kPow2 || C == TokenCast::kPow2Static) {
        scale = ceil_pow2(scale);
        factor = __fdiv_rn(1.0f, scale);
      }
    }
    unsigned low = quantize4(v, factor), high = quantize4(v + 4, factor);
    if constexpr (C == TokenCast::kGroupStatic || C == TokenCast::kPow2Static) {
      low = requantize4(low, scale, static_inverse);
      high = requantize4(high, scale, static_inverse);
    }
    return {{low, high, 0, 0}, scale};
  }
}

/// The vector to each row of its token.
template <TokenCast C>
__device__ __forceinline__ void store_rows(const GatherTokens& p, const Coded& coded,
                                           const int* place, int vector) {
  constexpr int kPerGroup = kActivationGroup / kVectorChannels<C>;
  const std::int64_t scales = p.out.num_scales();
  const int scale_idx = p.out.scale_per_row ? 0 : vector / kPerGroup;
  const bool has_scale = p.out.scale != nullptr && vector == scale_idx * kPerGroup;
#pragma unroll 8
  for (int k = 0; k < p.entries.num_topk; ++k) {
    const std::int64_t row = place[k];
    if (row < 0) continue;
    if constexpr (kIsCoded<C>) {
      reinterpret_cast<uint4*>(p.out.row(row))[vector] = coded.codes;
    } else {
      reinterpret_cast<uint2*>(p.out.row(row))[vector] = {coded.codes.x, coded.codes.y};
    }
    if (has_scale) p.out.scale[row * scales + scale_idx] = coded.scale;
  }
}

/// The largest magnitude of each token of a chunk that has a row, a warp at a time. Vectors are
/// read again when they are cast, mostly from the L2.
__device__ void find_token_amax(const GatherTokens& p, int first, int count,
                                const std::uint8_t* has_row, float* token_amax) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int vectors = static_cast<int>(p.out.width) / 8;
  for (int token = static_cast<int>(threadIdx.x) / 32; token < count; token += kThreads / 32) {
    if (!has_row[token]) continue;
    const uint4* const in =
        reinterpret_cast<const uint4*>(p.tokens.x + std::int64_t{first + token} * p.out.width);
    float amax = 0.0f;
#pragma unroll 4
    for (int v = lane; v < vectors; v += 32) amax = fmaxf(amax, vector_amax(in[v]));
#pragma unroll
    for (int d = 1; d < 32; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, d));
    if (lane == 0) token_amax[token] = amax;
  }
}

template <TokenCast C>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    gather_kernel(const __grid_constant__ GatherParams params) {
  extern __shared__ int counters[];
  __shared__ int place[kChunkEntries];
  __shared__ std::uint8_t has_row[kChunkEntries];
  __shared__ float token_amax[C == TokenCast::kToken ? kChunkEntries : 1];
  const GatherTokens& p = params.args;
  const EntryRows& entries = p.entries;
  const int tid = static_cast<int>(threadIdx.x), topk = entries.num_topk;
  int* const next = counters;
  int* const rest = counters + entries.num_experts;
  for (int e = tid; e < 2 * entries.num_experts; e += kThreads) counters[e] = 0;
  const int num_tokens = static_cast<int>(entries.num_tokens);
  const int begin = static_cast<int>(std::int64_t{num_tokens} * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(std::int64_t{num_tokens} * (blockIdx.x + 1) / gridDim.x);
  const int row_vectors = static_cast<int>(p.out.width) / kVectorChannels<C>;
  const int part_begin = static_cast<int>(blockIdx.y) * params.part_vectors;
  const int part = min(params.part_vectors, row_vectors - part_begin);
  const float inverse = p.out.scale == nullptr ? __fdiv_rn(1.0f, p.out.static_scale) : 0.0f;
  const bool publishes = blockIdx.y == 0;
  const int chunk_tokens = kChunkEntries / topk;
  follow_predecessor();

  // The first vectors are on their way while entries are counted.
  Item item[kDepth];
  const auto load = [&](int first, int count, int base, bool is_known) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int v = base + i * kThreads + tid, token = v / part;
      item[i] = {};
      if (v >= count * part || (is_known && !has_row[token])) continue;
      item[i] = load_item<C>(p, first + token, part_begin + v - token * part);
    }
  };
  load(begin, min(chunk_tokens, end - begin), 0, false);
  __syncthreads();
  count_entries(entries, num_tokens * topk, begin * topk, next, rest);
  __syncthreads();
  if (tid < 32) begin_rows(entries, publishes && blockIdx.x == 0, next, rest);

  for (int first = begin; first < end; first += chunk_tokens) {
    const int count = min(chunk_tokens, end - first);
    if (tid < 32) {
      assign_rows(entries, publishes, first * topk, count * topk, next, place, has_row);
    }
    __syncthreads();
    if constexpr (C == TokenCast::kToken) {
      find_token_amax(p, first, count, has_row, token_amax);
      __syncthreads();
    }
    for (int base = 0; base < count * part; base += kThreads * kDepth) {
      if (first != begin || base != 0) load(first, count, base, true);
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        if (base + i * kThreads >= count * part) break;
        const int v = base + i * kThreads + tid, token = v / part;
        float amax = 0.0f;
        if constexpr (C == TokenCast::kToken) amax = v < count * part ? token_amax[token] : 0.0f;
        const Coded coded = cast_item<C>(item[i], inverse, amax);
        if (v >= count * part || !has_row[token]) continue;
        store_rows<C>(p, coded, place + token * topk, part_begin + v - token * part);
      }
    }
    __syncthreads();
  }
}

void require(bool ok, const char* what, long long value, const char* limit) {
  if (ok) return;
  throw Error(ErrorCode::kUnsupported,
              std::string(what) + " " + std::to_string(value) + ": " + limit);
}

template <TokenCast C>
void launch_gather(const GatherTokens& args, int num_sms, cudaStream_t stream) {
  const auto tokens = static_cast<int>(args.entries.num_tokens);
  const int vectors = static_cast<int>(args.out.width) / kVectorChannels<C>;
  // Few tokens: several CTAs for each, so that the stores spread over the SMs.
  const int most_parts = (vectors + kPartVectors - 1) / kPartVectors;
  const int parts = std::clamp(num_sms / tokens, 1, most_parts);
  const int part_vectors = ((vectors + parts - 1) / parts + 15) / 16 * 16;
  launch_early(gather_kernel<C>,
               {.blocks = std::min(tokens, kCtasPerSm * num_sms),
                .threads = kThreads,
                .shared_bytes = 2 * static_cast<int>(sizeof(int)) * args.entries.num_experts,
                .blocks_y = (vectors + part_vectors - 1) / part_vectors},
               GatherParams{args, part_vectors}, stream);
}

using Launch = void (*)(const GatherTokens&, int, cudaStream_t);

Launch launch_of(const TokenRows& tokens) {
  const bool moves = tokens.second != Cast::kNone;
  switch (tokens.first) {
    case Cast::kNone:
      return moves ? launch_gather<TokenCast::kRequantize> : launch_gather<TokenCast::kCopy>;
    case Cast::kGroup:
      return moves ? launch_gather<TokenCast::kGroupStatic> : launch_gather<TokenCast::kGroup>;
    case Cast::kGroupPow2:
      return moves ? launch_gather<TokenCast::kPow2Static> : launch_gather<TokenCast::kPow2>;
    case Cast::kStatic:
    case Cast::kStaticPow2:
      return launch_gather<TokenCast::kStatic>;
    case Cast::kToken:
      return launch_gather<TokenCast::kToken>;
  }
  throw Error(ErrorCode::kInternal,
              "cast " + std::to_string(static_cast<int>(tokens.first)) + " has no gather kernel");
}

}  // namespace

void launch_gather_tokens(const GatherTokens& args, int num_sms, StreamHandle stream) {
  if (args.entries.num_tokens == 0) return;
  require(args.entries.num_experts <= kMaxTokenExperts, "num_experts", args.entries.num_experts,
          "at most 1024 on one device");
  require(args.entries.num_topk <= kMaxTokenTopk, "num_topk", args.entries.num_topk, "at most 32");
  launch_of(args.tokens)(args, num_sms, static_cast<cudaStream_t>(stream));
}

void prepare_gather_kernels() {
  prefer_shared_memory(gather_kernel<TokenCast::kGroup>);
  prefer_shared_memory(gather_kernel<TokenCast::kPow2>);
  prefer_shared_memory(gather_kernel<TokenCast::kStatic>);
  prefer_shared_memory(gather_kernel<TokenCast::kToken>);
  prefer_shared_memory(gather_kernel<TokenCast::kGroupStatic>);
  prefer_shared_memory(gather_kernel<TokenCast::kPow2Static>);
  prefer_shared_memory(gather_kernel<TokenCast::kCopy>);
  prefer_shared_memory(gather_kernel<TokenCast::kRequantize>);
}

}  // namespace sluice::cuda
