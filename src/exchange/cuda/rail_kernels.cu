// rail_kernels.cu - the kernels of the exchange over hosts: the steps of rail_route.cuh,
// rail_place.cuh, rail_spread.cuh and rail_combine.cuh, each taken by the threads of a CTA.
//
// Operands  pieces and home rows of rail_layout.h in own memory, rows in the mates' windows.
// Tile      route, sizes, give: one CTA. place: a CTA for each host; they wait for the mates'
//           counts. pack, spread, relay, sum: CTAs stride over tokens or records. The CTA of spread
//           that is last raises the flags and waits for the mates'; all CTAs of relay wait.
// Shared    pack: one token, as stage.cuh has it; place: counts of each chunk of records; relay,
//           sum: where one token's rows are, and 48 B for each thread and level of the sum's tree.
// Needs     hidden % 128 == 0; all CTAs of all ranks of a device that wait resident at once.
// Bound     bytes: a token is read once and written once for each host, then once for each row of
//           this host; each row of an expert is read once by its relay.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "backend/cuda/check.h"
#include "exchange/cuda/rail_combine.cuh"
#include "exchange/cuda/rail_kernels.h"
#include "exchange/cuda/rail_place.cuh"
#include "exchange/cuda/rail_route.cuh"
#include "exchange/cuda/rail_spread.cuh"
#include "exchange/cuda/stage.cuh"

namespace sluice::cuda {
namespace {

constexpr int kOneCta = 1024;
constexpr int kHostCta = 512;
constexpr int kRowCta = 256;
constexpr int kSpreadCta = 448;

__device__ Team this_team() {
  return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), blockIdx.x == 0};
}

__global__ void __launch_bounds__(kOneCta, 1)
    route_kernel(const __grid_constant__ RailSlot p, const __grid_constant__ RailTokens d) {
  route_step(this_team(), p, d);
}

template <WireFormat Wire>
__global__ void __launch_bounds__(kDispatchThreads, 1)
    pack_kernel(const __grid_constant__ RailSlot p, const __grid_constant__ RailTokens d) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Team team = this_team();
  if (team.any(is_stopped(p))) return;
  const Staging s = staging_of<Wire>(p.hidden);
  std::uint8_t* const payload = shared;
  float* const scale = reinterpret_cast<float*>(shared + s.payload_bytes);
  const int vectors = p.hidden / 8;
  int clipped = 0;
  for (int t = static_cast<int>(blockIdx.x); t < d.num_tokens; t += static_cast<int>(gridDim.x)) {
    Batch batch;
    const std::uint16_t* const x = d.x + std::int64_t{t} * p.hidden;
    load_batch(x, vectors, team.index, batch);
    team.sync();  // The token before has left.
    clipped += stage_chunk<Wire>(x, 1, vectors, d.static_inverse, batch, payload, scale);
    team.sync();
    pack_step(team, p, d, t, reinterpret_cast<const std::byte*>(payload), scale);
  }
  if (clipped > 0) add_to(&p.state->stats.saturated, static_cast<unsigned long long>(clipped));
}

__global__ void sizes_kernel(const __grid_constant__ RailSlot p) {
  sizes_step(this_team(), p);
}

__global__ void __launch_bounds__(kHostCta, 1)
    place_kernel(const __grid_constant__ RailSlot p, const __grid_constant__ RailTokens d) {
  extern __shared__ __align__(128) std::int32_t words[];
  const Team team = this_team();
  const int h = static_cast<int>(blockIdx.x);
  const PlaceSpace space = place_space(p, words);
  count_step(team, p, h, space);
  team.sync();
  place_step(team, p, d, h, space);
}

/// True for all threads of the CTA that finishes last; then all that the others did is visible.
__device__ bool arrive_last(const RailSlot& p) {
  __shared__ bool last;
  __syncthreads();
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

__global__ void __launch_bounds__(kSpreadCta, 1) spread_kernel(const __grid_constant__ RailSlot p) {
  const Team team = this_team();
  const bool is_idle = team.any(is_stopped(p) || p.slot->refused != 0);
  const int all = is_idle ? 0 : p.num_hosts * p.max_tokens;
  for (int j = static_cast<int>(blockIdx.x); j < all; j += static_cast<int>(gridDim.x)) {
    const int i = j / p.num_hosts;  // All hosts' first records, then the second ones.
    spread_step(team, p, j - i * p.num_hosts, i);
  }
  if (arrive_last(p)) finish_step(team, p);
}

__global__ void give_kernel(const __grid_constant__ RailSlot p, bool dropped) {
  give_step(this_team(), p, dropped);
}

__device__ SumSpace shared_space() {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ RowsOfToken rows;
  return {&rows, reinterpret_cast<Level*>(shared)};
}

__global__ void __launch_bounds__(kRowCta)
    relay_kernel(const __grid_constant__ RailSlot p, bool sends) {
  const Team team = this_team();
  const SumSpace space = shared_space();
  if (team.is_first && team.index == 0) begin_operation(p);
  if (team.is_first && sends) give_step(team, p, false);
  await_step(team, p);
  const int all = p.num_hosts * p.max_tokens;
  for (int j = static_cast<int>(blockIdx.x); j < all; j += static_cast<int>(gridDim.x)) {
    const int i = j / p.num_hosts;
    relay_step(team, p, j - i * p.num_hosts, i, space);
  }
}

__global__ void __launch_bounds__(kRowCta)
    sum_kernel(const __grid_constant__ RailSlot p, const __grid_constant__ RailTokens d) {
  const Team team = this_team();
  const SumSpace space = shared_space();
  check_home_step(team, p);
  for (int t = static_cast<int>(blockIdx.x); t < d.num_tokens; t += static_cast<int>(gridDim.x)) {
    sum_step(team, p, d, t, space);
  }
  if (arrive_last(p) && team.index == 0) end_operation(p);
}

__global__ void __launch_bounds__(kRowCta)
    keep_rows_kernel(const __grid_constant__ RailSlot p, const Vector* expert_y) {
  for (int l = 0; l < p.placement.num_local(); ++l) {
    keep_rows_step(this_team(), p, expert_y, l, static_cast<int>(blockIdx.x),
                   static_cast<int>(gridDim.x));
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int num_ctas, int threads, int shared_bytes,
            void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_ctas));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  SLUICE_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

template <WireFormat Wire>
int shared_bytes_of_pack(int hidden) {
  const Staging s = staging_of<Wire>(hidden);
  return s.payload_bytes + s.scale_bytes();
}

template <WireFormat Wire>
void launch_pack(const RailSlot& p, const RailTokens& d, int num_ctas, void* stream) {
  launch(pack_kernel<Wire>, num_ctas, kDispatchThreads, shared_bytes_of_pack<Wire>(p.hidden),
         stream, p, d);
}

template <class Kernel>
void allow_shared(Kernel* kernel) {
  constexpr int kMostShared = 220 * 1024;
  SLUICE_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared));
}

template <WireFormat Wire>
void prepare_pack() {
  allow_shared(pack_kernel<Wire>);
}

/// Of the trees of a sum.
int shared_bytes_of_sum(const RailSlot& p) {
  return levels_of(p) * kRowCta * static_cast<int>(sizeof(Level));
}

}  // namespace

void prepare_rail_kernels() {
  prepare_pack<WireFormat::kBf16>();
  prepare_pack<WireFormat::kE4m3Group>();
  prepare_pack<WireFormat::kE4m3Pow2>();
  prepare_pack<WireFormat::kE4m3Static>();
  prepare_pack<WireFormat::kE4m3Token>();
  allow_shared(place_kernel);
  allow_shared(relay_kernel);
  allow_shared(sum_kernel);
}

void launch_route(const RailSlot& p, const RailTokens& d, void* stream) {
  launch(route_kernel, 1, kOneCta, 0, stream, p, d);
}

void launch_pack(const RailSlot& p, const RailTokens& d, WireFormat wire, int num_ctas,
                 void* stream) {
  switch (wire) {
    case WireFormat::kBf16:
      return launch_pack<WireFormat::kBf16>(p, d, num_ctas, stream);
    case WireFormat::kE4m3Group:
      return launch_pack<WireFormat::kE4m3Group>(p, d, num_ctas, stream);
    case WireFormat::kE4m3Pow2:
      return launch_pack<WireFormat::kE4m3Pow2>(p, d, num_ctas, stream);
    case WireFormat::kE4m3Static:
      return launch_pack<WireFormat::kE4m3Static>(p, d, num_ctas, stream);
    case WireFormat::kE4m3Token:
      return launch_pack<WireFormat::kE4m3Token>(p, d, num_ctas, stream);
  }
  throw Error(ErrorCode::kInternal, std::string("the exchange has no kernel for wire format ") +
                                        std::to_string(static_cast<int>(wire)));
}

void launch_sizes(const RailSlot& p, void* stream) {
  launch(sizes_kernel, 1, kMaxRailHosts, 0, stream, p);
}

void launch_place(const RailSlot& p, const RailTokens& d, void* stream) {
  launch(place_kernel, p.num_hosts, kHostCta, 4 * words_of_place(p), stream, p, d);
}

void launch_spread(const RailSlot& p, int num_ctas, void* stream) {
  launch(spread_kernel, num_ctas, kSpreadCta, 0, stream, p);
}

void launch_give(const RailSlot& p, bool dropped, void* stream) {
  launch(give_kernel, 1, kMaxDeviceRanks, 0, stream, p, dropped);
}

void launch_relay(const RailSlot& p, bool sends, int num_ctas, void* stream) {
  launch(relay_kernel, num_ctas, kRowCta, shared_bytes_of_sum(p), stream, p, sends);
}

void launch_sum(const RailSlot& p, const RailTokens& d, int num_ctas, void* stream) {
  launch(sum_kernel, num_ctas, kRowCta, shared_bytes_of_sum(p), stream, p, d);
}

void launch_keep_rows(const RailSlot& p, const std::uint16_t* expert_y, int num_ctas,
                      void* stream) {
  launch(keep_rows_kernel, num_ctas, kRowCta, 0, stream, p,
         reinterpret_cast<const Vector*>(expert_y));
}

}  // namespace sluice::cuda
