// micro_w4a8.cu - what the card can do for the W4A8 kernels: results stand in
// docs/performance-kernels.md.
//
//   ring     GB/s of cp.async.bulk into a ring of stages: one producer thread, consumers only wait
//   wgmma    cycles of four m64nNk32 with A in registers (K = 128), commit and wait each time
//   mix      what products and the instructions of other warpgroups cost each other
#include <algorithm>
#include <cstring>
#include <utility>

#include "backend/cuda/ptx/copy.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/ptx/wgmma.cuh"
#include "backend/cuda/sm90_w4a8/mainloop.cuh"
#include "backend/cuda/sm90_w4a8/promote.cuh"
#include "bench/kernels/layer.cuh"

namespace sluice::cuda::bench {
namespace {

constexpr int kMaxStages = 16, kRepeats = 512;

struct RingShared {
  std::uint64_t full[kMaxStages], empty[kMaxStages];
  alignas(128) std::uint8_t data[1];
};

/// Each CTA streams its own contiguous part of `data`.
__global__ void ring_kernel(const std::uint8_t* data, int stages, int bytes, int chunks) {
  extern __shared__ __align__(1024) std::uint8_t raw[];
  RingShared& s = *reinterpret_cast<RingShared*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      ptx::mbarrier_init(&s.empty[i], 1);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  const std::uint8_t* src = data + static_cast<long long>(blockIdx.x) * chunks * bytes;
  if (threadIdx.x == 0) {
    const std::uint64_t policy = ptx::policy_evict_first();
    for (int i = 0; i < chunks; ++i) {
      wait(&s.empty[i % stages], (i / stages & 1) ^ 1);
      ptx::mbarrier_arrive_expect_tx(&s.full[i % stages], bytes);
      ptx::bulk_copy(s.data + i % stages * bytes, src + static_cast<long long>(i) * bytes, bytes,
                     &s.full[i % stages], policy);
    }
  } else if (threadIdx.x == 32) {
    for (int i = 0; i < chunks; ++i) {
      wait(&s.full[i % stages], i / stages & 1);
      ptx::mbarrier_arrive(&s.empty[i % stages]);
    }
  }
}

template <int N>
__global__ void wgmma_kernel(long long* cycles, float* sink) {
  extern __shared__ __align__(1024) std::uint8_t raw[];
  for (int i = threadIdx.x; i < 128 * 128; i += blockDim.x)
    raw[i] = static_cast<std::uint8_t>(i % 0x70);
  ptx::fence_proxy_async();
  __syncthreads();
  float acc[N / 2];
  clear(acc);
  Fragments f;
  for (int i = 0; i < 16; ++i) f.a[i / 4][i % 4] = threadIdx.x * 0x01010101u & 0x87878787u;
  const std::uint32_t x = ptx::smem_descriptor(ptx::shared_address(raw));
  const long long begin = clock64();
#pragma unroll 1
  for (int i = 0; i < kRepeats; ++i) {
    ptx::wgmma_fence();  // accumulates: ptxas drops results that are overwritten unread
#pragma unroll
    for (int j = 0; j < 4; ++j) ptx::wgmma_m64k32(acc, f.a[j], x + 2 * j, true);
    ptx::wgmma_commit();
    await<0>(acc);
  }
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = clock64() - begin;
  sink[threadIdx.x] = acc[0];
}

void bench_ring(const Buffer<std::uint8_t>& pool) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  const int shapes[][2] = {{4, 8448}, {8, 8448}, {16, 8448}, {4, 16896}, {8, 16896}, {12, 16896}};
  for (const auto& [stages, bytes] : shapes) {
    const int shared = static_cast<int>(sizeof(RingShared)) + stages * bytes;
    SLUICE_CUDA_CHECK(
        cudaFuncSetAttribute(ring_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    const int chunks = static_cast<int>(pool.size / 132 / bytes);
    std::vector<float> ms(9);
    for (float& t : ms) {
      cudaEventRecord(begin);
      ring_kernel<<<132, 64, shared>>>(pool.data, stages, bytes, chunks);
      cudaEventRecord(end);
      SLUICE_CUDA_CHECK(cudaEventSynchronize(end));
      cudaEventElapsedTime(&t, begin, end);
    }
    std::sort(ms.begin(), ms.end());
    std::printf("ring %2d x %5d B: %7.1f us, %5.0f GB/s\n", stages, bytes, ms[4] * 1e3,
                132.0 * chunks * bytes / ms[4] * 1e-6);
  }
}

template <int N>
void bench_wgmma(long long* cycles, float* sink) {
  std::printf("wgmma m64n%-3dk32 x 4, 1 / 2 / 4 warpgroups per SM:", N);
  for (const int groups : {1, 2, 4}) {
    wgmma_kernel<N><<<132, 128 * groups, 16384>>>(cycles, sink);
    long long c = 0;
    SLUICE_CUDA_CHECK(cudaMemcpy(&c, cycles, 8, cudaMemcpyDeviceToHost));
    std::printf(" %5.0f", static_cast<double>(c) / kRepeats);
  }
  std::printf(" cycles\n");
}

/// What a warpgroup that does not multiply runs.
enum class Alu { kPromote, kFma, kFmaThree, kFmaOne, kMul, kWiden, kLoad };

template <Alu Kind>
__device__ __forceinline__ void run_alu(float (&acc)[32], float (&sum)[32], float (&xs)[16],
                                        std::uint32_t (&w)[8], const float* shared) {
  if constexpr (Kind == Alu::kPromote) {
#pragma unroll
    for (int i = 0; i < 32; ++i)
      sum[i] = __fmaf_rn(__fmul_rn(acc[i], xs[i / 2 % 2]), xs[i / 4 * 2 + i % 2], sum[i]);
#pragma unroll
    for (int i = 0; i < 32; ++i) acc[i] = __int_as_float(__float_as_int(acc[i]) ^ 1);
  } else if constexpr (Kind == Alu::kFma) {
#pragma unroll
    for (int i = 0; i < 96; ++i) sum[i % 32] = __fmaf_rn(acc[i % 32], xs[i / 32], sum[i % 32]);
  } else if constexpr (Kind == Alu::kFmaThree) {  // three registers for each
#pragma unroll
    for (int i = 0; i < 96; ++i)
      sum[i % 32] = __fmaf_rn(acc[i % 32], xs[(i + i / 32) % 16], sum[i % 32]);
  } else if constexpr (Kind == Alu::kFmaOne) {  // one, and two that the one before had
#pragma unroll
    for (int i = 0; i < 96; ++i) sum[i % 32] = __fmaf_rn(acc[i / 32], xs[i / 32], sum[i % 32]);
  } else if constexpr (Kind == Alu::kMul) {
#pragma unroll
    for (int i = 0; i < 96; ++i) sum[i % 32] = __fmul_rn(sum[i % 32], xs[i / 32]);
  } else if constexpr (Kind == Alu::kWiden) {
#pragma unroll
    for (int i = 0; i < 32; ++i) w[i % 8] = __funnelshift_r(w[i % 8], w[i % 8], 4) & 0xf7f7f7f7u;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float x, y;
      asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(x), "=f"(y)
                   : "r"(ptx::shared_address(shared + 8 * i + threadIdx.x % 4 * 2)));
      xs[i] += x;
      xs[8 + i] += y;
    }
  }
}

/// Warpgroups below `tensor` multiply, the others run `Kind`; cycles of each.
template <int N, Alu Kind>
__global__ void __launch_bounds__(512, 1) mix_kernel(int tensor, long long* cycles, float* sink) {
  constexpr int kRounds = 256, kAluRounds = 8 * kRounds;
  extern __shared__ __align__(1024) std::uint8_t raw[];
  for (int i = threadIdx.x; i < 128 * 128; i += blockDim.x) raw[i] = hash(i) & 0x77;
  ptx::fence_proxy_async();
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  float result = 0.0f;
  const long long begin = clock64();
  if (warpgroup < tensor) {
    float acc[N / 2];
    clear(acc);
    Fragments f;
    for (int i = 0; i < 16; ++i) f.a[i / 4][i % 4] = hash(threadIdx.x * 16 + i) & 0x87878787u;
    const std::uint32_t x = ptx::smem_descriptor(ptx::shared_address(raw));
#pragma unroll 1
    for (int i = 0; i < kRounds; ++i) {
      ptx::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 16; ++j) ptx::wgmma_m64k32(acc, f.a[j % 4], x + 2 * (j % 4), true);
      ptx::wgmma_commit();
      await<0>(acc);
    }
    result = acc[0];
  } else {
    float acc[32], sum[32], xs[16];
    std::uint32_t w[8];
    for (int i = 0; i < 32; ++i) acc[i] = threadIdx.x * 1e-3f + i, sum[i] = i;
    for (int i = 0; i < 16; ++i) xs[i] = 1.0f + threadIdx.x * 1e-7f * i, w[i / 2] = hash(i);
#pragma unroll 1
    for (int i = 0; i < kAluRounds; ++i)
      run_alu<Kind>(acc, sum, xs, w, reinterpret_cast<const float*>(raw));
    for (int i = 0; i < 32; ++i) result += acc[i] + sum[i];
    for (int i = 0; i < 16; ++i) result += xs[i] + w[i / 2];
  }
  if (threadIdx.x % 128 == 0 && blockIdx.x == 0) {
    cycles[warpgroup] = (clock64() - begin) / (warpgroup < tensor ? kRounds : kAluRounds);
  }
  sink[threadIdx.x] = result;
}

template <int N, Alu Kind>
void bench_mix(const char* name, long long* cycles, float* sink) {
  std::printf("mix N %3d, %-26s", N, name);
  for (const auto& [tensor, alu] : {std::pair{2, 0}, {0, 1}, {0, 2}, {1, 1}, {2, 1}, {2, 2}}) {
    mix_kernel<N, Kind><<<132, 128 * (tensor + alu), 16384>>>(tensor, cycles, sink);
    long long c[4] = {};
    SLUICE_CUDA_CHECK(cudaMemcpy(c, cycles, sizeof(c), cudaMemcpyDeviceToHost));
    std::printf("  %d+%d:", tensor, alu);
    if (tensor > 0) std::printf(" %lld", c[0] / 16);
    if (alu > 0) std::printf(" /%lld", c[tensor]);
  }
  std::printf("\n");
}

/// How a unit of k = 32 is added to the sums.
enum class Add { kPerRow, kJoined, kPromote };

/// Warpgroups do what the main loop of groups of 32 does between its loads: products on all but one
/// of the accumulators run while that one is added. `Units` are in a loop body, at whose end no
/// product is in flight. Cycles of one unit of 64 x N x 32 Chain.
template <int N, Add How, int Accumulators, int Units, int Chain>
__global__ void __launch_bounds__(N >= 64 ? 256 : 512, 1)
    unit_kernel(long long* cycles, float* sink) {
  constexpr int kSteps = 2048 / Units, kAhead = Accumulators - 1;
  extern __shared__ __align__(1024) std::uint8_t raw[];
  for (int i = threadIdx.x; i < N * 128; i += blockDim.x) raw[i] = hash(i) & 0x77;
  ptx::fence_proxy_async();
  __syncthreads();
  float acc[Accumulators][N / 2], joined[N / 2], sum[N / 2], xs[N / 4];
#pragma unroll
  for (int i = 0; i < Accumulators; ++i) clear(acc[i]);
  clear(joined);
  clear(sum);
  Fragments f;
  for (int i = 0; i < 16; ++i) f.a[i / 4][i % 4] = hash(threadIdx.x * 16 + i) & 0x87878787u;
  for (int i = 0; i < N / 4; ++i) xs[i] = 1.0f + threadIdx.x * 1e-7f * i;
  float2 ws{1.0f + threadIdx.x * 1e-7f, 1.0f - threadIdx.x * 1e-7f};
  const std::uint32_t x = ptx::smem_descriptor(ptx::shared_address(raw));
  const long long begin = clock64();
#pragma unroll 1
  for (int k = 0; k < kSteps; ++k) {
    pin(f);
#pragma unroll
    for (int i = -kAhead; i < Units; ++i) {
      const int next = i + kAhead;
      if (next < Units) {
        if constexpr (Chain == 1) {
          multiply_step32(acc[next % Accumulators], f, x, next % 4);
        } else {
          multiply(acc[next % Accumulators], f, x);
        }
      }
      if (i < 0) continue;
      float(&done)[N / 2] = acc[i % Accumulators];
      if (Units - 1 - i >= kAhead) {
        await<kAhead>(done);
      } else if (Units - 1 - i == 1) {
        await<1>(done);
      } else {
        await<0>(done);
      }
      pin(done);
      // NOTE: ptxas, which an empty asm does not hold, would form the products once for all units.
      if constexpr (How == Add::kPromote) {
        asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(ws.x), "=f"(ws.y)
                     : "r"(ptx::shared_address(raw + 8 * (threadIdx.x / 4 % 8))));
      }
      if constexpr (How == Add::kPerRow) {
#pragma unroll
        for (int at = 0; at < N / 2; ++at) {
          sum[at] = __fmaf_rn(done[at], at % 4 < 2 ? ws.x : ws.y, sum[at]);
        }
      } else if constexpr (How == Add::kJoined) {
        join(i % 4, done, ws, joined);
        if (i % 4 == 3) add_joined(0, 0, joined, xs, sum);
      } else if constexpr (How == Add::kPromote) {
        promote_columns<XScale::kPerGroup>(0, done, ws, xs, sum);
      }
      pin(sum);
      pin(joined);
    }
  }
  if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = (clock64() - begin) / (Units * kSteps);
  float result = 0.0f;
  for (int i = 0; i < N / 2; ++i) {
    result += sum[i] + joined[i];
    for (int a = 0; a < Accumulators; ++a) result += acc[a][i];
  }
  sink[threadIdx.x] = result;
}

template <int N, Add How, int Accumulators, int Units, int Chain = 1>
void bench_unit(const char* name, long long* cycles, float* sink) {
  std::printf("unit 64x%dx%d, %-28s %d accumulators, %2d a loop:", N, 32 * Chain, name,
              Accumulators, Units);
  for (const int groups : {1, 2, 4}) {
    if (N >= 64 && groups == 4) continue;
    unit_kernel<N, How, Accumulators, Units, Chain><<<132, 128 * groups, 16384>>>(cycles, sink);
    long long c = 0;
    SLUICE_CUDA_CHECK(cudaMemcpy(&c, cycles, 8, cudaMemcpyDeviceToHost));
    std::printf(" %lld", c);
  }
  std::printf(" cycles\n");
}

template <int N>
void bench_units(long long* cycles, float* sink) {
  bench_unit<N, Add::kPerRow, 2, 4>("1 fma", cycles, sink);
  bench_unit<N, Add::kJoined, 2, 4>("1 product or fma + 1/4 fma", cycles, sink);
  bench_unit<N, Add::kPromote, 2, 4>("1 product + 1 fma", cycles, sink);
  bench_unit<N, Add::kPerRow, 1, 12>("1 fma", cycles, sink);
  bench_unit<N, Add::kJoined, 1, 12>("1 product or fma + 1/4 fma", cycles, sink);
  bench_unit<N, Add::kPerRow, 2, 12>("1 fma", cycles, sink);
  bench_unit<N, Add::kPerRow, 3, 12>("1 fma", cycles, sink);
  bench_unit<N, Add::kJoined, 2, 12>("1 product or fma + 1/4 fma", cycles, sink);
  bench_unit<N, Add::kJoined, 3, 12>("1 product or fma + 1/4 fma", cycles, sink);
}

/// Units as prefill could have them: wider ones of groups of 32, and those of groups of 128.
void bench_wide_units(long long* cycles, float* sink) {
  const char* const kJoined = "1 product or fma + 1/4 fma";
  bench_unit<96, Add::kJoined, 1, 12>(kJoined, cycles, sink);
  bench_unit<96, Add::kJoined, 2, 12>(kJoined, cycles, sink);
  bench_unit<128, Add::kJoined, 1, 12>(kJoined, cycles, sink);
  bench_unit<96, Add::kPerRow, 2, 12>("1 fma", cycles, sink);
  bench_unit<128, Add::kPerRow, 1, 12>("1 fma", cycles, sink);
  bench_unit<128, Add::kPerRow, 2, 12>("1 fma", cycles, sink);
  const char* const kPromote = "1 product + 1 fma";
  bench_unit<64, Add::kPromote, 1, 8, 4>(kPromote, cycles, sink);
  bench_unit<64, Add::kPromote, 2, 8, 4>(kPromote, cycles, sink);
  bench_unit<96, Add::kPromote, 1, 8, 4>(kPromote, cycles, sink);
  bench_unit<96, Add::kPromote, 2, 8, 4>(kPromote, cycles, sink);
  bench_unit<128, Add::kPromote, 1, 8, 4>(kPromote, cycles, sink);
  bench_unit<128, Add::kPromote, 2, 8, 4>(kPromote, cycles, sink);
  bench_unit<128, Add::kPerRow, 1, 8, 4>("1 fma", cycles, sink);
}

void bench_all() {
  Buffer<std::uint8_t> pool(std::size_t{480} << 20);
  random_codes<<<1024, 256>>>(pool.data, pool.size, 9, false, Data::kUniform);
  SLUICE_CUDA_CHECK(cudaDeviceSynchronize());
  bench_ring(pool);
  Buffer<long long> cycles(4);
  Buffer<float> sink(1024);
  bench_wgmma<8>(cycles.data, sink.data);
  bench_wgmma<16>(cycles.data, sink.data);
  bench_wgmma<32>(cycles.data, sink.data);
  bench_wgmma<64>(cycles.data, sink.data);
  bench_wgmma<128>(cycles.data, sink.data);
  std::printf("units: cycles of one with 1 / 2 / 4 warpgroups per SM\n");
  bench_units<32>(cycles.data, sink.data);
  bench_units<64>(cycles.data, sink.data);
  bench_wide_units(cycles.data, sink.data);
  std::printf("mix: T + A warpgroups multiply + run others; cycles of a wgmma / of a round\n");
  bench_mix<64, Alu::kPromote>("32 fmul + 32 fma + 32 xor", cycles.data, sink.data);
  bench_mix<64, Alu::kFma>("96 fma", cycles.data, sink.data);
  bench_mix<128, Alu::kFma>("96 fma", cycles.data, sink.data);
  bench_mix<64, Alu::kFmaThree>("96 fma of 3 registers", cycles.data, sink.data);
  bench_mix<128, Alu::kFmaThree>("96 fma of 3 registers", cycles.data, sink.data);
  bench_mix<64, Alu::kFmaOne>("96 fma of 1 register", cycles.data, sink.data);
  bench_mix<128, Alu::kFmaOne>("96 fma of 1 register", cycles.data, sink.data);
  bench_mix<64, Alu::kMul>("96 fmul of 1 register", cycles.data, sink.data);
  bench_mix<128, Alu::kMul>("96 fmul of 1 register", cycles.data, sink.data);
  bench_mix<128, Alu::kPromote>("32 fmul + 32 fma + 32 xor", cycles.data, sink.data);
  bench_mix<128, Alu::kWiden>("32 shift + 32 and", cycles.data, sink.data);
  bench_mix<128, Alu::kLoad>("8 8-byte loads + 16 fadd", cycles.data, sink.data);
}

}  // namespace
}  // namespace sluice::cuda::bench

int main() {
  try {
    sluice::cuda::bench::bench_all();
  } catch (const std::exception& e) {
    std::printf("error: %s\n", e.what());
    return 1;
  }
  return 0;
}
