// bench_link.cu - what kernels get from the link between two GPUs, the ceilings of the exchange:
// GB/s of every way to move bytes, one way and both ways at once, and the time of a flag and of a
// load. One process, GPUs 0 and 1.
//
//   bench_link [--mbytes 256] [--ctas 132,32]
//
//   copy engine   cudaMemcpyAsync
//   load          16 B loads from the peer, 8 in flight per thread, stored here
//   store         16 B loads from here, stored at the peer
//   bulk read     cp.async.bulk from the peer to shared memory, a ring of stages
//   bulk write    cp.async.bulk from shared memory to the peer
//
// Every copy is compared with its source before it is timed.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cuda/check.h"
#include "backend/cuda/ptx/bulk_store.cuh"
#include "backend/cuda/ptx/copy.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/ptx/system.cuh"

namespace sluice::cuda::bench {
namespace {

constexpr int kThreads = 1024, kInFlight = 8, kStages = 12, kChunk = 14336, kRepeats = 7;
constexpr std::size_t kStageBytes = std::size_t{kStages} * kChunk;

enum class Way { kEngine, kLoad, kStore, kBulkRead, kBulkWrite };
constexpr Way kWays[] = {Way::kEngine, Way::kLoad, Way::kStore, Way::kBulkRead, Way::kBulkWrite};
const char* name_of(Way way) {
  static constexpr const char* kNames[] = {"copy engine", "load", "store", "bulk read",
                                           "bulk write"};
  return kNames[static_cast<int>(way)];
}
/// The GPU that the kernel runs on: the reader, or the writer.
bool runs_at_source(Way way) {
  return way == Way::kStore || way == Way::kBulkWrite;
}

__global__ void __launch_bounds__(kThreads, 1)
    copy_kernel(uint4* to, const uint4* from, std::int64_t vectors) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t v = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; v < vectors;
       v += step * kInFlight) {
    uint4 in[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (v + i * step < vectors) in[i] = __ldcs(from + v + i * step);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (v + i * step < vectors) __stcs(to + v + i * step, in[i]);
    }
  }
}

/// Chunk c goes through stage c % kStages of its CTA: one thread moves everything.
__global__ void bulk_kernel(std::uint8_t* to, const std::uint8_t* from, std::int64_t chunks) {
  extern __shared__ __align__(128) std::uint8_t data[];
  __shared__ std::uint64_t full[kStages];
  for (int i = 0; i < kStages; ++i) ptx::mbarrier_init(&full[i], 1);
  ptx::fence_barrier_init();
  const std::uint64_t policy = ptx::policy_evict_first();
  const auto chunk_of = [&](int i) { return blockIdx.x + std::int64_t{gridDim.x} * i; };
  const auto load = [&](int i) {
    const int stage = i % kStages;
    ptx::mbarrier_arrive_expect_tx(&full[stage], kChunk);
    ptx::bulk_copy(data + stage * kChunk, from + chunk_of(i) * kChunk, kChunk, &full[stage],
                   policy);
  };
  constexpr int kAhead = kStages / 2;
  for (int i = 0; i < kAhead && chunk_of(i) < chunks; ++i) load(i);
  for (int i = 0; chunk_of(i) < chunks; ++i) {
    const int stage = i % kStages;
    while (!ptx::mbarrier_try_wait(&full[stage], i / kStages & 1)) {
    }
    ptx::bulk_store(to + chunk_of(i) * kChunk, data + stage * kChunk, kChunk);
    ptx::bulk_commit();
    ptx::bulk_wait_read<kAhead>();  // Stores of the stages that the next load fills are done.
    if (chunk_of(i + kAhead) < chunks) load(i + kAhead);
  }
  ptx::bulk_wait<0>();
}

/// Two GPUs hand a flag to and fro.
__global__ void flag_kernel(std::uint64_t* mine, std::uint64_t* theirs, bool begins, int rounds) {
  for (int i = 1; i <= rounds; ++i) {
    if (begins) ptx::store_release_sys(theirs, static_cast<std::uint64_t>(i));
    while (ptx::load_acquire_sys(mine) < static_cast<std::uint64_t>(i)) {
    }
    if (!begins) ptx::store_release_sys(theirs, static_cast<std::uint64_t>(i));
  }
}

/// Each load's address comes from the load before.
__global__ void chase_kernel(const std::uint64_t* at, int steps, std::uint64_t* sink) {
  std::uint64_t next = 0;
  for (int i = 0; i < steps; ++i) next = ptx::load_relaxed_sys(at + next);
  *sink = next;
}

struct Gpu {
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  std::uint8_t *from = nullptr, *to = nullptr;
  std::uint64_t* flag = nullptr;
};

class LinkBench {
 public:
  explicit LinkBench(std::size_t bytes)
      : bytes_(bytes / kChunk * kChunk), values_(bytes_ / 4), received_(bytes_ / 4) {
    for (int g = 0; g < 2; ++g) {
      SLUICE_CUDA_CHECK(cudaSetDevice(g));
      SLUICE_CUDA_CHECK(cudaDeviceEnablePeerAccess(1 - g, 0));
      SLUICE_CUDA_CHECK(cudaStreamCreateWithFlags(&gpus_[g].stream, cudaStreamNonBlocking));
      for (cudaEvent_t* e : {&gpus_[g].begin, &gpus_[g].end}) {
        SLUICE_CUDA_CHECK(cudaEventCreate(e));
      }
      SLUICE_CUDA_CHECK(cudaMalloc(&gpus_[g].from, bytes_));
      SLUICE_CUDA_CHECK(cudaMalloc(&gpus_[g].to, bytes_));
      SLUICE_CUDA_CHECK(cudaMalloc(&gpus_[g].flag, 4096));
      SLUICE_CUDA_CHECK(cudaMemset(gpus_[g].flag, 0, 4096));
      SLUICE_CUDA_CHECK(cudaMemset(gpus_[g].from, 0x5a, bytes_));
      SLUICE_CUDA_CHECK(cudaFuncSetAttribute(
          bulk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int{kStageBytes}));
    }
    for (std::size_t i = 0; i < values_.size(); ++i) {
      values_[i] = static_cast<std::uint32_t>(i * 2654435761u);
    }
    SLUICE_CUDA_CHECK(cudaMemcpy(gpus_[0].from, values_.data(), bytes_, cudaMemcpyHostToDevice));
  }

  /// GB/s that the slower direction gets; both: each GPU's data moves to the other at once.
  double rate(Way way, int ctas, bool both) {
    check(way, ctas);
    std::vector<double> ms;
    for (int i = 0; i < kRepeats; ++i) {
      queue(way, ctas, 0, true);
      if (both) queue(way, ctas, 1, true);
      synchronize();
      double slowest = 0;
      for (int source = 0; source < (both ? 2 : 1); ++source) {
        const Gpu& g = gpus_[runs_at_source(way) ? source : 1 - source];
        float time = 0;
        SLUICE_CUDA_CHECK(cudaEventElapsedTime(&time, g.begin, g.end));
        slowest = std::max(slowest, static_cast<double>(time));
      }
      ms.push_back(slowest);
    }
    std::ranges::sort(ms);
    return static_cast<double>(bytes_) / ms[ms.size() / 2] * 1e-6;
  }

  /// Microseconds that a flag takes from one GPU to the other.
  double flag_us() {
    constexpr int kRounds = 1000;
    for (int g = 0; g < 2; ++g) {
      SLUICE_CUDA_CHECK(cudaSetDevice(g));
      SLUICE_CUDA_CHECK(cudaEventRecord(gpus_[g].begin, gpus_[g].stream));
      flag_kernel<<<1, 1, 0, gpus_[g].stream>>>(gpus_[g].flag, gpus_[1 - g].flag, g == 0, kRounds);
      SLUICE_CUDA_CHECK(cudaGetLastError());
      SLUICE_CUDA_CHECK(cudaEventRecord(gpus_[g].end, gpus_[g].stream));
    }
    synchronize();
    float ms = 0;
    SLUICE_CUDA_CHECK(cudaEventElapsedTime(&ms, gpus_[1].begin, gpus_[1].end));
    return ms * 1e3 / (2 * kRounds);
  }

  /// Microseconds of a load that GPU 0 makes from GPU `owner`.
  double load_us(int owner) {
    constexpr int kSteps = 1000;
    std::vector<std::uint64_t> ring(256);
    for (std::size_t i = 0; i < ring.size(); ++i) ring[i] = (i + 32) % ring.size();
    SLUICE_CUDA_CHECK(
        cudaMemcpy(gpus_[owner].flag + 16, ring.data(), ring.size() * 8, cudaMemcpyHostToDevice));
    SLUICE_CUDA_CHECK(cudaSetDevice(0));
    float ms = 0;
    for (int i = 0; i < 2; ++i) {
      SLUICE_CUDA_CHECK(cudaEventRecord(gpus_[0].begin, gpus_[0].stream));
      chase_kernel<<<1, 1, 0, gpus_[0].stream>>>(gpus_[owner].flag + 16, kSteps, gpus_[0].flag + 8);
      SLUICE_CUDA_CHECK(cudaGetLastError());
      SLUICE_CUDA_CHECK(cudaEventRecord(gpus_[0].end, gpus_[0].stream));
      synchronize();
      SLUICE_CUDA_CHECK(cudaEventElapsedTime(&ms, gpus_[0].begin, gpus_[0].end));
    }
    return ms * 1e3 / kSteps;
  }

 private:
  void queue(Way way, int ctas, int source, bool timed) {
    const int at = runs_at_source(way) ? source : 1 - source;
    const Gpu& g = gpus_[at];
    std::uint8_t* const to = gpus_[1 - source].to;
    const std::uint8_t* const from = gpus_[source].from;
    SLUICE_CUDA_CHECK(cudaSetDevice(at));
    if (timed) SLUICE_CUDA_CHECK(cudaEventRecord(g.begin, g.stream));
    if (way == Way::kEngine) {
      SLUICE_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes_, cudaMemcpyDefault, g.stream));
    } else if (way == Way::kLoad || way == Way::kStore) {
      copy_kernel<<<ctas, kThreads, 0, g.stream>>>(reinterpret_cast<uint4*>(to),
                                                   reinterpret_cast<const uint4*>(from),
                                                   static_cast<std::int64_t>(bytes_ / 16));
    } else {
      bulk_kernel<<<ctas, 1, kStageBytes, g.stream>>>(to, from,
                                                      static_cast<std::int64_t>(bytes_ / kChunk));
    }
    SLUICE_CUDA_CHECK(cudaGetLastError());
    if (timed) SLUICE_CUDA_CHECK(cudaEventRecord(g.end, g.stream));
  }

  void check(Way way, int ctas) {
    SLUICE_CUDA_CHECK(cudaSetDevice(1));
    SLUICE_CUDA_CHECK(cudaMemset(gpus_[1].to, 0, bytes_));
    SLUICE_CUDA_CHECK(cudaDeviceSynchronize());
    queue(way, ctas, 0, false);
    synchronize();
    SLUICE_CUDA_CHECK(cudaMemcpy(received_.data(), gpus_[1].to, bytes_, cudaMemcpyDeviceToHost));
    if (received_ != values_) throw std::runtime_error(std::string(name_of(way)) + ": wrong bytes");
  }

  void synchronize() {
    for (int g = 0; g < 2; ++g) {
      SLUICE_CUDA_CHECK(cudaSetDevice(g));
      SLUICE_CUDA_CHECK(cudaStreamSynchronize(gpus_[g].stream));
    }
  }

  std::size_t bytes_;
  std::vector<std::uint32_t> values_, received_;  // What is at GPU 0, and what came to GPU 1.
  Gpu gpus_[2];
};

int run(std::map<std::string, std::string> given) {
  int devices = 0;
  SLUICE_CUDA_CHECK(cudaGetDeviceCount(&devices));
  if (devices < 2) throw std::runtime_error("two GPUs are needed");
  std::vector<int> ctas;
  std::stringstream list(given["--ctas"]);
  for (std::string word; std::getline(list, word, ',');) ctas.push_back(std::stoi(word));
  LinkBench bench(std::stoull(given["--mbytes"]) << 20);
  std::printf("link between GPUs 0 and 1: a flag %.2f us, a load %.2f us (own memory %.2f)\n",
              bench.flag_us(), bench.load_us(1), bench.load_us(0));
  std::printf("%-12s %5s %12s %12s   GB/s in each direction\n", "way", "CTAs", "one way",
              "both ways");
  for (const Way way : kWays) {
    for (const int n : ctas) {
      std::printf("%-12s %5d %12.1f %12.1f\n", name_of(way), n, bench.rate(way, n, false),
                  bench.rate(way, n, true));
      if (way == Way::kEngine) break;
    }
  }
  return 0;
}

}  // namespace
}  // namespace sluice::cuda::bench

int main(int argc, char** argv) {
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);  // No kernel is loaded while another one waits.
  std::map<std::string, std::string> given = {{"--mbytes", "256"}, {"--ctas", "132,32"}};
  try {
    for (int i = 1; i < argc; i += 2) {
      if (given.count(argv[i]) == 0 || i + 1 == argc) {
        throw std::runtime_error(std::string("unknown option or no value: ") + argv[i]);
      }
      given[argv[i]] = argv[i + 1];
    }
    return sluice::cuda::bench::run(given);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_link: %s\n", error.what());
    return 2;
  }
}
