// bench_nccl.cu - what stacks do without an exchange, through NCCL: all-gather of every token's FP8
// row and scales, reduce-scatter of every rank's bf16 partial sums; and all-to-all of one FP8 row
// for each token and expert, then of as many bf16 rows home. One rank per GPU, one process.
//
//   bench_nccl [--devices N] [--hidden 7168] [--topk 8] [--repeat 50] [--tokens 1,128]
//              [--json FILE]
//
// All-to-all moves num_topk / num_ranks rows of a token to each rank (rounded up), which is what a
// balanced routing needs; rows are neither put in the experts' order nor summed.
//
// All collectives are checked element by element before they are timed. Times are medians of
// CUDA-event times, slowest GPU. NVLink multicast (NVLS) stays off: a program that uses it can take
// the GPUs of a shared host out of service.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <nccl.h>

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
#include "core/write_text.h"
#include "sluice/lab/median.h"

namespace sluice::cuda::bench {
namespace {

#define SLUICE_NCCL_CHECK(call)                                                       \
  do {                                                                                \
    const ncclResult_t status = (call);                                               \
    if (status != ncclSuccess)                                                        \
      throw std::runtime_error(std::string(#call ": ") + ncclGetErrorString(status)); \
  } while (false)

constexpr int kWarmUps = 5;

__global__ void fill_bytes(std::uint8_t* to, std::size_t n, int rank) {
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    to[i] = static_cast<std::uint8_t>(i * 7 + static_cast<std::size_t>(rank) * 31);
  }
}
__global__ void check_bytes(const std::uint8_t* from, std::size_t n, int num_ranks, int* wrong) {
  const std::size_t total = n * static_cast<std::size_t>(num_ranks);
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < total;
       i += gridDim.x * blockDim.x) {
    const auto expected = static_cast<std::uint8_t>(i % n * 7 + i / n * 31);
    if (from[i] != expected) atomicAdd(wrong, 1);
  }
}
/// Part r of what this rank received is part `rank` of what rank r sent.
__global__ void check_parts(const std::uint8_t* from, std::size_t n, int rank, int num_ranks,
                            int* wrong) {
  const std::size_t total = n * static_cast<std::size_t>(num_ranks);
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < total;
       i += gridDim.x * blockDim.x) {
    const std::size_t sent = static_cast<std::size_t>(rank) * n + i % n;
    const auto expected = static_cast<std::uint8_t>(sent * 7 + i / n * 31);
    if (from[i] != expected) atomicAdd(wrong, 1);
  }
}
/// Small whole numbers, so that bf16 sums over 8 ranks are exact.
__device__ float term(std::size_t i, int rank) {
  return static_cast<float>((i + static_cast<std::size_t>(rank) * 3) % 13);
}
__global__ void fill_terms(__nv_bfloat16* to, std::size_t n, int rank) {
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    to[i] = __float2bfloat16(term(i, rank));
  }
}
__global__ void check_sums(const __nv_bfloat16* from, std::size_t n, int rank, int num_ranks,
                           int* wrong) {
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    float sum = 0;
    for (int r = 0; r < num_ranks; ++r) sum += term(i + n * static_cast<std::size_t>(rank), r);
    if (__bfloat162float(from[i]) != sum) atomicAdd(wrong, 1);
  }
}

struct Gpu {
  cudaStream_t stream;
  cudaEvent_t begin, middle, end;
  ncclComm_t comm;
  std::uint8_t *send, *received;
  std::uint8_t *parts, *parts_received;  // Of all-to-all.
  __nv_bfloat16 *partial, *sum;
  int* wrong;
};

/// Two collectives one after the other.
struct Times {
  double out_us, home_us, pair_us;
};

class NcclBench {
 public:
  NcclBench(int num_gpus, int hidden, int topk, int most_tokens)
      : hidden_(hidden), topk_(topk), gpus_(num_gpus) {
    std::vector<ncclComm_t> comms(gpus_.size());
    SLUICE_NCCL_CHECK(ncclCommInitAll(comms.data(), num_gpus, nullptr));
    const std::size_t row = row_bytes(), all = gpus_.size() * most_tokens;
    for (std::size_t r = 0; r < gpus_.size(); ++r) {
      Gpu& g = gpus_[r];
      SLUICE_CUDA_CHECK(cudaSetDevice(static_cast<int>(r)));
      g.comm = comms[r];
      SLUICE_CUDA_CHECK(cudaStreamCreateWithFlags(&g.stream, cudaStreamNonBlocking));
      for (cudaEvent_t* e : {&g.begin, &g.middle, &g.end}) SLUICE_CUDA_CHECK(cudaEventCreate(e));
      SLUICE_CUDA_CHECK(cudaMalloc(&g.send, row * most_tokens));
      SLUICE_CUDA_CHECK(cudaMalloc(&g.received, row * all));
      SLUICE_CUDA_CHECK(cudaMalloc(&g.partial, 2 * hidden_ * all));
      SLUICE_CUDA_CHECK(cudaMalloc(&g.sum, 2 * hidden_ * most_tokens));
      for (std::uint8_t** p : {&g.parts, &g.parts_received}) {
        SLUICE_CUDA_CHECK(cudaMalloc(p, gpus_.size() * rows_per_peer(most_tokens) * 2 * hidden_));
      }
      SLUICE_CUDA_CHECK(cudaMalloc(&g.wrong, sizeof(int)));
    }
  }

  /// Elements that differ, over all GPUs.
  int check(int tokens) {
    const int num_gpus = static_cast<int>(gpus_.size());
    on_each([&](Gpu& g, int r) {
      SLUICE_CUDA_CHECK(cudaMemsetAsync(g.wrong, 0, sizeof(int), g.stream));
      fill_bytes<<<264, 256, 0, g.stream>>>(g.send, row_bytes() * tokens, r);
      fill_terms<<<264, 256, 0, g.stream>>>(g.partial, hidden_ * tokens * gpus_.size(), r);
    });
    all_gather(tokens), reduce_scatter(tokens);
    for (const std::size_t bytes : {bytes_out(tokens), bytes_home(tokens)}) {
      on_each([&](Gpu& g, int r) {
        fill_bytes<<<264, 256, 0, g.stream>>>(g.parts, bytes * gpus_.size(), r);
      });
      all_to_all(bytes);
      on_each([&](Gpu& g, int r) {
        check_parts<<<264, 256, 0, g.stream>>>(g.parts_received, bytes, r, num_gpus, g.wrong);
      });
    }
    int wrong = 0;
    on_each([&](Gpu& g, int r) {
      check_bytes<<<264, 256, 0, g.stream>>>(g.received, row_bytes() * tokens, num_gpus, g.wrong);
      check_sums<<<264, 256, 0, g.stream>>>(g.sum, hidden_ * tokens, r, num_gpus, g.wrong);
      int mine = 0;
      SLUICE_CUDA_CHECK(
          cudaMemcpyAsync(&mine, g.wrong, sizeof(int), cudaMemcpyDeviceToHost, g.stream));
      SLUICE_CUDA_CHECK(cudaStreamSynchronize(g.stream));
      wrong += mine;
    });
    return wrong;
  }

  Times time_gather_scatter(int tokens, int repeats) {
    return time([&] { all_gather(tokens); }, [&] { reduce_scatter(tokens); }, repeats);
  }
  Times time_all_to_all(int tokens, int repeats) {
    return time([&] { all_to_all(bytes_out(tokens)); }, [&] { all_to_all(bytes_home(tokens)); },
                repeats);
  }

 private:
  [[nodiscard]] std::size_t row_bytes() const { return hidden_ + hidden_ / 128 * sizeof(float); }
  [[nodiscard]] std::size_t rows_per_peer(int tokens) const {
    return (static_cast<std::size_t>(tokens) * topk_ + gpus_.size() - 1) / gpus_.size();
  }
  [[nodiscard]] std::size_t bytes_out(int tokens) const {
    return rows_per_peer(tokens) * row_bytes();
  }
  [[nodiscard]] std::size_t bytes_home(int tokens) const {
    return rows_per_peer(tokens) * 2 * hidden_;
  }
  template <class Out, class Home>
  Times time(const Out& out, const Home& home, int repeats) {
    std::vector<double> outs, homes, pairs;
    for (int i = -kWarmUps; i < repeats; ++i) {
      record(&Gpu::begin), out(), record(&Gpu::middle);
      home(), record(&Gpu::end);
      on_each([](Gpu& g, int) { SLUICE_CUDA_CHECK(cudaStreamSynchronize(g.stream)); });
      if (i < 0) continue;
      outs.push_back(slowest(&Gpu::begin, &Gpu::middle));
      homes.push_back(slowest(&Gpu::middle, &Gpu::end));
      pairs.push_back(slowest(&Gpu::begin, &Gpu::end));
    }
    return {median(outs), median(homes), median(pairs)};
  }
  template <class F>
  void on_each(const F& f) {
    for (std::size_t r = 0; r < gpus_.size(); ++r) {
      SLUICE_CUDA_CHECK(cudaSetDevice(static_cast<int>(r)));
      f(gpus_[r], static_cast<int>(r));
    }
  }
  void all_gather(int tokens) {
    SLUICE_NCCL_CHECK(ncclGroupStart());
    for (Gpu& g : gpus_) {
      SLUICE_NCCL_CHECK(
          ncclAllGather(g.send, g.received, row_bytes() * tokens, ncclUint8, g.comm, g.stream));
    }
    SLUICE_NCCL_CHECK(ncclGroupEnd());
  }
  /// `bytes` from each rank to each, its own included.
  void all_to_all(std::size_t bytes) {
    SLUICE_NCCL_CHECK(ncclGroupStart());
    for (Gpu& g : gpus_) {
      for (std::size_t r = 0; r < gpus_.size(); ++r) {
        const int peer = static_cast<int>(r);
        SLUICE_NCCL_CHECK(ncclSend(g.parts + r * bytes, bytes, ncclUint8, peer, g.comm, g.stream));
        SLUICE_NCCL_CHECK(
            ncclRecv(g.parts_received + r * bytes, bytes, ncclUint8, peer, g.comm, g.stream));
      }
    }
    SLUICE_NCCL_CHECK(ncclGroupEnd());
  }
  void reduce_scatter(int tokens) {
    SLUICE_NCCL_CHECK(ncclGroupStart());
    for (Gpu& g : gpus_) {
      SLUICE_NCCL_CHECK(ncclReduceScatter(g.partial, g.sum, hidden_ * tokens, ncclBfloat16, ncclSum,
                                          g.comm, g.stream));
    }
    SLUICE_NCCL_CHECK(ncclGroupEnd());
  }
  void record(cudaEvent_t Gpu::*event) {
    on_each([&](Gpu& g, int) { SLUICE_CUDA_CHECK(cudaEventRecord(g.*event, g.stream)); });
  }
  double slowest(cudaEvent_t Gpu::*from, cudaEvent_t Gpu::*to) {
    float most = 0;
    on_each([&](Gpu& g, int) {
      float ms = 0;
      SLUICE_CUDA_CHECK(cudaEventElapsedTime(&ms, g.*from, g.*to));
      most = std::max(most, ms);
    });
    return most * 1e3;
  }

  std::size_t hidden_, topk_;
  std::vector<Gpu> gpus_;
};

std::vector<int> numbers(const std::string& text) {
  std::vector<int> values;
  std::stringstream stream(text);
  for (std::string word; std::getline(stream, word, ',');) values.push_back(std::stoi(word));
  return values;
}

int run(std::map<std::string, std::string> given) {
  int devices = std::stoi(given["--devices"]);
  if (devices == 0) SLUICE_CUDA_CHECK(cudaGetDeviceCount(&devices));
  const std::vector<int> tokens = numbers(given["--tokens"]);
  const int hidden = std::stoi(given["--hidden"]), repeats = std::stoi(given["--repeat"]);
  NcclBench bench(devices, hidden, std::stoi(given["--topk"]), std::ranges::max(tokens));
  std::printf(
      "NCCL: %d GPUs, hidden %d, FP8 rows with scales out, bf16 home; us, slowest GPU, launches "
      "by the host\n",
      devices, hidden);
  std::printf("tokens/rank  all-gather  reduce-scatter    pair  all-to-all  and home    pair\n");
  std::string json = "[";
  for (const int t : tokens) {
    if (const int wrong = bench.check(t)) {
      std::printf("%d tokens: %d elements are wrong; nothing was timed\n", t, wrong);
      return 1;
    }
    const Times ag = bench.time_gather_scatter(t, repeats), all = bench.time_all_to_all(t, repeats);
    std::printf("%11d  %10.1f  %14.1f  %6.1f  %10.1f  %8.1f  %6.1f\n", t, ag.out_us, ag.home_us,
                ag.pair_us, all.out_us, all.home_us, all.pair_us);
    char line[300];
    std::snprintf(
        line, sizeof(line),
        "%s{\"tokens_per_rank\": %d, \"all_gather_us\": %.2f, \"reduce_scatter_us\": %.2f, "
        "\"pair_us\": %.2f, \"all_to_all_out_us\": %.2f, \"all_to_all_home_us\": %.2f, "
        "\"all_to_all_pair_us\": %.2f}",
        json.size() > 1 ? ", " : "", t, ag.out_us, ag.home_us, ag.pair_us, all.out_us, all.home_us,
        all.pair_us);
    json += line;
  }
  if (!given["--json"].empty()) write_text(given["--json"], json + "]\n");
  return 0;
}

}  // namespace
}  // namespace sluice::cuda::bench

int main(int argc, char** argv) {
  setenv("NCCL_NVLS_ENABLE", "0", 1);
  std::map<std::string, std::string> given = {{"--devices", "0"},
                                              {"--hidden", "7168"},
                                              {"--topk", "8"},
                                              {"--repeat", "50"},
                                              {"--tokens", "1,16,64,128,256,1024,4096"},
                                              {"--json", ""}};
  try {
    for (int i = 1; i < argc; i += 2) {
      if (given.count(argv[i]) == 0 || i + 1 == argc) {
        throw std::runtime_error(std::string("unknown option or no value: ") + argv[i]);
      }
      given[argv[i]] = argv[i + 1];
    }
    return sluice::cuda::bench::run(given);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_nccl: %s\n", error.what());
    return 2;
  }
}
