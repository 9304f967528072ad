// bench_w4a8.cu - times the expert stage and its two GEMMs; see docs/performance-kernels.md for
// results.
//
// Every time is the median over replays of a CUDA graph of several launches that rotate through 32
// experts' weights (727 MB, 12 x L2). Run check_w4a8 first: this program does not verify results.
//
//   bench_w4a8 [--quick]          a fixed list of cases, weights in groups of 128
//   bench_w4a8 --rows 16,64,128   the stage at these rows per expert; narrowed by
//       --experts 8 --group 32 --static|--token --code 7|mxfp4 --config decode|prefill|prefill64
//       --hidden 4096 --intermediate 256 --activation swiglu:limit=10
#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "bench/kernels/layer.cuh"

namespace sluice::cuda::bench {
namespace {

constexpr int kMaxM = 1024;

/// Plain reads: the ceiling that decode is held against.
__global__ void read_all(const uint4* data, std::size_t n, int* sink) {
  std::uint32_t sum = 0;
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x;
  for (; i < n; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const std::size_t at = i + j * stride;
      v[j] = at < n ? __ldcs(data + at) : uint4{};
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0x12345678) *sink = 1;
}

struct Timing {
  double median_us, min_us, max_us;
};

/// Per launch, over `replays` replays of a graph with `per_graph` launches.
template <class Launch>
Timing time_graph(int per_graph, int replays, Launch launch) {
  cudaStream_t stream;
  SLUICE_CUDA_CHECK(cudaStreamCreate(&stream));
  launch(stream, 0);
  SLUICE_CUDA_CHECK(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  SLUICE_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < per_graph; ++i) launch(stream, i);
  SLUICE_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  SLUICE_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  SLUICE_CUDA_CHECK(cudaEventCreate(&begin));
  SLUICE_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<double> us;
  for (int r = -2; r < replays; ++r) {
    SLUICE_CUDA_CHECK(cudaEventRecord(begin, stream));
    SLUICE_CUDA_CHECK(cudaGraphLaunch(exec, stream));
    SLUICE_CUDA_CHECK(cudaEventRecord(end, stream));
    SLUICE_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    SLUICE_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (r >= 0) us.push_back(ms * 1e3 / per_graph);
  }
  std::sort(us.begin(), us.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return {us[us.size() / 2], us.front(), us.back()};
}

/// What weights there are: experts of one shape. Launches rotate through them.
struct Pool {
  int experts = 32, hidden = 7168, intermediate = 2048, group = 128;
  bool is_mxfp4 = false;
};

struct Bench {
  Pool pool;
  Weights weights[3];  // by WeightCode; of int4 two, or of mxfp4 one
  Buffer<std::uint8_t> x, h;
  Buffer<float> x_scale, h_scale;
  Buffer<std::uint16_t> y;
  Buffer<std::int32_t> num_rows, sync;
  double read_gbs = 0;
  bool rests = true;
  bool is_token = false;  // x has one scale per row, unless it is static
  ActivationFn activation;

  explicit Bench(Data data, const Pool& of = {}) : pool(of) {
    for (int i = pool.is_mxfp4 ? 2 : 0; i < (pool.is_mxfp4 ? 3 : 2); ++i) {
      weights[i] = make_weights({.num_experts = pool.experts,
                                 .hidden = pool.hidden,
                                 .intermediate = pool.intermediate,
                                 .group = pool.is_mxfp4 ? 32 : pool.group,
                                 .scale_type = pool.is_mxfp4 ? ScaleType::kE8M0 : ScaleType::kBf16,
                                 .code = static_cast<WeightCode>(i),
                                 .seed = 5,
                                 .keep_canonical = false,
                                 .data = data});
    }
    const std::size_t rows = static_cast<std::size_t>(pool.experts) * kMaxM;
    x = Buffer<std::uint8_t>(rows * pool.hidden);
    h = Buffer<std::uint8_t>(rows * pool.intermediate);
    x_scale = Buffer<float>(rows * pool.hidden / 128);
    h_scale = Buffer<float>(rows * pool.intermediate / 128);
    y = Buffer<std::uint16_t>(rows * pool.hidden);
    num_rows = Buffer<std::int32_t>(pool.experts);
    sync = Buffer<std::int32_t>(sync_bytes(pool.experts) / 4);
    sync.fill(0);
    random_activations<<<4096, 256>>>(x.data, x.size, pool.hidden, 3, data);
    random_activations<<<4096, 256>>>(h.data, h.size, pool.intermediate, 4, data);
    random_scales<<<1024, 256>>>(x_scale.data, x_scale.size, 5, false, 1e-3f, 1.0f);
    random_scales<<<1024, 256>>>(h_scale.data, h_scale.size, 6, false, 1e-3f, 1.0f);
    SLUICE_CUDA_CHECK(cudaDeviceSynchronize());
  }

  void measure_read() {
    const Buffer<std::uint8_t>& all = weights[pool.is_mxfp4 ? 2 : 0].packed_gate_up;
    const Timing t = time_graph(4, 15, [&](cudaStream_t s, int) {
      read_all<<<132 * 8, 512, 0, s>>>(reinterpret_cast<const uint4*>(all.data), all.size / 16,
                                       sync.data);
    });
    read_gbs = all.size / t.median_us * 1e-3;
    std::printf("read rate: %.0f GB/s (%.1f us, %.1f..%.1f, %.0f MB)\n", read_gbs, t.median_us,
                t.min_us, t.max_us, all.size * 1e-6);
  }

  enum What { kStage, kGemm1, kGemm2 };

  void run(What what, int experts, const std::vector<int>& counts, int expected, WeightCode code,
           bool is_static, KernelConfig config, const char* label) {
    // The card throttles for a while after heavy work: start every measurement from the same state.
    if (rests) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    num_rows.upload(counts);
    const Weights& w = weights[static_cast<int>(code)];
    const int sets = pool.experts / experts;
    const std::size_t gu = packed_expert_bytes(w.gate_up().shape) * experts;
    const std::size_t dn = packed_expert_bytes(w.down().shape) * experts;
    const RowRanges rows{.num_experts = experts,
                         .count = num_rows.data,
                         .max_rows = std::int64_t{experts} * kMaxM,
                         .max_rows_per_expert = kMaxM};
    const ConfigChoice choice{.config = config, .num_ctas = 132, .reason = ""};
    const Fp8RowsView in{.codes = x.data,
                         .scale = is_static ? nullptr : x_scale.data,
                         .static_scale = 0.002f,
                         .width = pool.hidden,
                         .scale_per_row = is_token && !is_static};
    const Fp8Rows hidden{h.data, is_static ? nullptr : h_scale.data, 0.5f, pool.intermediate};
    long long total = 0, active = 0;
    for (int c : counts) total += c, active += c > 0;
    const int per_graph = total > 4096 ? 2 : 8, replays = total > 4096 ? 7 : 15;
    const Timing t = time_graph(per_graph, replays, [&](cudaStream_t s, int i) {
      PackedWeights a = w.gate_up(), b = w.down();
      a.data = static_cast<const std::uint8_t*>(a.data) + i % sets * gu;
      b.data = static_cast<const std::uint8_t*>(b.data) + i % sets * dn;
      if (what == kStage) {
        launch_experts({.gate_up = a,
                        .down = b,
                        .rows = rows,
                        .x = in,
                        .h = hidden,
                        .y = y.data,
                        .sync = sync.data,
                        .config = choice,
                        .activation = activation},
                       s);
      } else if (what == kGemm1) {
        launch_gate_up({.weights = a,
                        .rows = rows,
                        .x = in,
                        .h = hidden,
                        .sync = sync.data,
                        .config = choice,
                        .activation = activation},
                       s);
      } else {
        launch_grouped_gemm({.weights = b,
                             .rows = rows,
                             .x = hidden,
                             .y = y.data,
                             .sync = sync.data,
                             .config = choice},
                            s);
      }
    });
    double bytes = 0, flops = 0;
    if (what != kGemm2) {
      bytes += 1.0 * gu / experts * active + total * (pool.hidden * 1.03 + pool.intermediate);
      flops += 2.0 * total * pool.hidden * 2 * pool.intermediate;
    }
    if (what != kGemm1) {
      bytes += 1.0 * dn / experts * active + total * (pool.intermediate + 2.0 * pool.hidden);
      flops += 2.0 * total * pool.hidden * pool.intermediate;
    }
    std::printf(
        "%-7s E %2d %-10s expected %5d %-7s %-7s %-6s %8.1f us (%.1f..%.1f) %6.0f GB/s %4.0f%% "
        "%6.0f TFLOPS\n",
        what == kStage   ? "stage"
        : what == kGemm1 ? "gate_up"
                         : "down",
        experts, label, expected,
        config == KernelConfig::kDecode    ? "decode"
        : config == KernelConfig::kPrefill ? "prefill"
                                           : "narrow",
        code == WeightCode::kE2M1             ? "mxfp4"
        : code == WeightCode::kOnesComplement ? "7-instr"
                                              : "3-instr",
        is_static  ? "static"
        : is_token ? "token"
                   : "group",
        t.median_us, t.min_us, t.max_us, bytes / t.median_us * 1e-3,
        bytes / t.median_us * 1e-1 / read_gbs, flops / t.median_us * 1e-6);
    std::fflush(stdout);
  }

  void uniform(What what, int experts, int m, WeightCode code, bool is_static = false,
               int force = -1) {
    const ConfigChoice c = choose_config(
        {.num_experts = experts, .expected_m = m, .has_row_scales = is_token && !is_static}, {});
    const KernelConfig config = force < 0 ? c.config : static_cast<KernelConfig>(force);
    const std::string label = "m " + std::to_string(m);
    run(what, experts, std::vector<int>(experts, m), m, code, is_static, config, label.c_str());
  }
};

int bench_all(bool quick, bool rests, Data data) {
  const auto k7 = WeightCode::kOnesComplement, k3 = WeightCode::kSignMagnitude;
  std::printf("data: %s\n", data == Data::kNormal ? "normal" : "uniform codes");
  Bench b(data);
  b.rests = rests;
  b.measure_read();
  if (quick) {
    for (int m : {1, 16, 32, 64}) b.uniform(Bench::kStage, 32, m, k3);
    b.uniform(Bench::kStage, 32, 64, k3, false, 1);
    b.uniform(Bench::kStage, 32, 16, k7);
    for (int m : {128, 1024}) b.uniform(Bench::kStage, 32, m, k3);
    b.uniform(Bench::kGemm1, 32, 1024, k3);
    b.uniform(Bench::kGemm2, 32, 1024, k3);
    b.uniform(Bench::kStage, 8, 16, k3);
    return 0;
  }
  for (const WeightCode code : {k3, k7}) {
    for (int m : {1, 8, 16, 32, 64, 128, 256, 512, 1024}) b.uniform(Bench::kStage, 32, m, code);
    for (int m : {1, 16, 128, 1024}) {
      b.uniform(Bench::kGemm1, 32, m, code);
      b.uniform(Bench::kGemm2, 32, m, code);
    }
  }
  for (int e : {8, 16}) {
    for (int m : {1, 8, 16, 32, 64, 128, 1024}) b.uniform(Bench::kStage, e, m, k3);
  }
  for (int m : {16, 128, 1024}) b.uniform(Bench::kStage, 32, m, k3, true);
  std::vector<int> zipf(32), one(32, 0);
  for (int e = 0; e < 32; ++e) zipf[e] = static_cast<int>(126.0 / (e + 1));
  one[7] = 512;
  b.run(Bench::kStage, 32, zipf, 16, k3, false, KernelConfig::kDecode, "zipf 126/e");
  b.run(Bench::kStage, 32, one, 16, k3, false, KernelConfig::kDecode, "one, 512");
  b.measure_read();
  return 0;
}

/// Chosen cases instead of the fixed list.
struct Choice {
  std::vector<int> rows;
  Pool pool;
  int experts = 32, config = -1;  // -1: choose_config()
  bool is_static = false, is_token = false;
  WeightCode code = WeightCode::kSignMagnitude;
  ActivationFn activation;
};

int bench_chosen(const Choice& c, bool rests, Data data) {
  std::printf("hidden %d, intermediate %d, groups of %d, %s\n", c.pool.hidden, c.pool.intermediate,
              c.pool.is_mxfp4 ? 32 : c.pool.group, to_string(c.activation).c_str());
  Pool pool = c.pool;
  pool.experts = std::max(32, c.experts);
  Bench b(data, pool);
  b.activation = c.activation;
  b.rests = rests;
  b.is_token = c.is_token;
  b.measure_read();
  for (const int m : c.rows) {
    b.uniform(Bench::kStage, c.experts, m, c.code, c.is_static, c.config);
  }
  return 0;
}

std::vector<int> parse_list(const char* text) {
  std::vector<int> out;
  for (char* end = nullptr; *text != 0; text = *end == ',' ? end + 1 : end) {
    const long value = std::strtol(text, &end, 10);
    if (end == text || value < 1 || value > kMaxM) {
      throw std::runtime_error(std::string("--rows ") + text + ": rows are 1..1024");
    }
    out.push_back(static_cast<int>(value));
  }
  return out;
}

}  // namespace
}  // namespace sluice::cuda::bench

int main(int argc, char** argv) {
  try {
    if (argc > 5 &&
        std::strcmp(argv[1], "--one") == 0) {  // experts, rows, config, code: for profilers
      sluice::cuda::bench::Bench b(sluice::cuda::bench::Data::kNormal);
      b.read_gbs = 1;
      b.uniform(sluice::cuda::bench::Bench::kStage, std::atoi(argv[2]), std::atoi(argv[3]),
                static_cast<sluice::cuda::WeightCode>(std::atoi(argv[5])), false,
                std::atoi(argv[4]));
      return 0;
    }
    bool quick = false, rests = true;
    auto data = sluice::cuda::bench::Data::kNormal;
    sluice::cuda::bench::Choice choice;
    for (int i = 1; i < argc; ++i) {
      const std::string arg = argv[i];
      const char* value = i + 1 < argc ? argv[i + 1] : "";
      if (arg == "--quick") quick = true;
      if (arg == "--hot") rests = false;
      if (arg == "--uniform") data = sluice::cuda::bench::Data::kUniform;
      if (arg == "--static") choice.is_static = true;
      if (arg == "--token") choice.is_token = true;
      if (arg == "--rows") choice.rows = sluice::cuda::bench::parse_list(value);
      if (arg == "--experts") choice.experts = std::atoi(value);
      if (arg == "--intermediate") choice.pool.intermediate = std::atoi(value);
      if (arg == "--group") choice.pool.group = std::atoi(value);
      if (arg == "--code" && std::string("7") == value) {
        choice.code = sluice::cuda::WeightCode::kOnesComplement;
      }
      if (arg == "--code" && std::string("mxfp4") == value) {
        choice.code = sluice::cuda::WeightCode::kE2M1;
        choice.pool.is_mxfp4 = true;
      }
      if (arg == "--hidden") choice.pool.hidden = std::atoi(value);
      if (arg == "--activation") choice.activation = sluice::parse_activation(value);
      if (arg == "--config") {
        choice.config = std::string("prefill64") == value ? 2 : std::string("prefill") == value;
      }
    }
    if (!choice.rows.empty()) return sluice::cuda::bench::bench_chosen(choice, rests, data);
    return sluice::cuda::bench::bench_all(quick, rests, data);
  } catch (const std::exception& e) {
    std::printf("error: %s\n", e.what());
    return 1;
  }
}
