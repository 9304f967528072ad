// bench_rebalance.cc - what uneven routing costs a layer, what a better placement gains, and what
// it takes to get there while serving: eight ranks on one GPU, R1's layer.
//
//   bench_rebalance [--tokens 128] [--ranks 8] [--extra 32] [--experts 256] [--layers 4]
//
// Routing is Zipf. The placement comes from the rows of other tokens with the same popularities. A
// layer's time is that of graphs of kCalls calls, which are captured once and replayed before and
// after the experts have moved. Every output is compared with the one before.
//
// Then the steps of a server: a graph of all layers and a wait for it. Between two steps the
// experts of one layer move, all of them or a few at a time.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/check.h"
#include "core/counter_rng.h"
#include "sluice/backend.h"
#include "sluice/balance.h"
#include "sluice/lab/median.h"
#include "sluice/lab/ranks.h"
#include "sluice/lab/workload.h"
#include "sluice/layer.h"
#include "sluice/transport.h"

namespace sluice::bench {
namespace {

constexpr int kCalls = 10, kRepeats = 9, kTopk = 8, kHidden = 7168, kIntermediate = 2048;
constexpr std::chrono::seconds kTimeout{60};

struct Options {
  int tokens = 128, ranks = 8, extra = 32, experts = 256, layers = 4;
};

/// The same weights for the same expert, wherever it is made.
struct ExpertMemory {
  std::vector<std::uint64_t> codes[3];
  std::vector<std::uint16_t> scales[3];

  explicit ExpertMemory(int expert) {
    constexpr std::size_t kWeights = std::size_t{kHidden} * kIntermediate;
    for (std::uint64_t m = 0; m < 3; ++m) {
      const CounterRng random(static_cast<std::uint64_t>(expert), m);
      codes[m].resize(kWeights / 16);
      for (std::size_t i = 0; i < codes[m].size(); ++i) {
        const std::uint64_t bits = random.bits(i);
        // A nibble of -8 becomes -7: its lowest bit is set where the others are a bare sign.
        const std::uint64_t rest = bits | bits >> 1 | bits >> 2;
        codes[m][i] = bits | ((bits >> 3) & ~rest & 0x1111111111111111u);
      }
      scales[m].resize(kWeights / 128);
      for (std::size_t i = 0; i < scales[m].size(); ++i) {
        scales[m][i] = static_cast<std::uint16_t>(0x3b80 + random.bits(i + codes[m].size()) % 64);
      }
    }
  }
  [[nodiscard]] QuantMatrix matrix(std::size_t m, std::int64_t n, std::int64_t k) const {
    QuantMatrix matrix;
    matrix.group_size = 128;
    matrix.codes = {codes[m].data(), DType::kPackedInt4, Shape{n, k / 2}};
    matrix.scales = {scales[m].data(), DType::kBFloat16, Shape{n, k / 128}};
    return matrix;
  }
};

double milliseconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

Workload tokens(const Options& o, std::int64_t first, std::int64_t count) {
  return make_workload({.num_experts = o.experts,
                        .num_topk = kTopk,
                        .hidden = kHidden,
                        .routing = RoutingKind::kZipf,
                        .seed = 11},
                       first, count);
}

std::vector<std::int64_t> rows_of(const Options& o, std::int64_t first, std::int64_t count) {
  // Routing alone would do; the values of so few channels cost little.
  std::vector<std::int64_t> rows(static_cast<std::size_t>(o.experts));
  for (std::int64_t at = 0; at < count; at += 256) {
    for (const std::int32_t e : tokens(o, first + at, 256).topk_idx) {
      ++rows[static_cast<std::size_t>(e)];
    }
  }
  return rows;
}

/// One rank: its layers, which have the same weights, its tokens on the device, a graph of kCalls
/// calls, and one of a call of each layer.
class Rank {
 public:
  Rank(const Options& o, int rank, Transport& transport)
      : options_(o),
        transport_(transport),
        backend_(make_backend(
            {.device = {Device::Kind::kCuda, 0}, .local_rank = rank, .num_local_ranks = o.ranks})),
        stream_(backend_->stream()),
        load_(tokens(o, std::int64_t{rank} * o.tokens, o.tokens)),
        x_(upload(load_.x)),
        idx_(upload(load_.topk_idx)),
        weights_(upload(load_.topk_weights)),
        y_(backend_->allocate(load_.x.size() * 2)) {}
  ~Rank() {
    for (cudaGraphExec_t graph : {graph_, step_}) {
      if (graph != nullptr) (void)cudaGraphExecDestroy(graph);
    }
  }
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;

  void load(const Placement& placement) {
    ModelGeometry geometry{.name = "r1-layer",
                           .num_experts = options_.experts,
                           .num_topk = kTopk,
                           .hidden = kHidden,
                           .intermediate = kIntermediate};
    group_.emplace(LayerGroup::create({.geometry = geometry,
                                       .low_latency = {.max_tokens_per_rank = options_.tokens},
                                       .num_slots = placement.num_slots(),
                                       .peer_timeout = kTimeout},
                                      transport_, *backend_));
    LayerSpec spec{.name = "layer", .placement = placement};
    spec.weights.geometry = geometry;
    std::vector<std::unique_ptr<ExpertMemory>> memory;
    for (const int e : placement.slot_experts(transport_.rank())) {
      const ExpertMemory& m = *memory.emplace_back(std::make_unique<ExpertMemory>(std::max(0, e)));
      spec.weights.experts.push_back({.gate = m.matrix(0, kIntermediate, kHidden),
                                      .up = m.matrix(1, kIntermediate, kHidden),
                                      .down = m.matrix(2, kHidden, kIntermediate)});
    }
    for (int i = 0; i < options_.layers; ++i) layers_.push_back(group_->add_layer(spec));
    for (Layer& layer : layers_) call(layer);
    synchronize();
    meet();
    graph_ = capture([&] {
      for (int i = 0; i < kCalls; ++i) call(layers_.front());
    });
    step_ = capture([&] {
      for (Layer& layer : layers_) call(layer);
    });
    meet();
  }
  void meet() { (void)transport_.all_gather({}, kTimeout); }

  /// Microseconds of a call, median of the graph's replays.
  double time_us() {
    std::vector<double> us;
    cudaEvent_t begin = nullptr, end = nullptr;
    SLUICE_CUDA_CHECK(cudaEventCreate(&begin));
    SLUICE_CUDA_CHECK(cudaEventCreate(&end));
    meet();
    for (int i = 0; i < kRepeats; ++i) {
      SLUICE_CUDA_CHECK(cudaEventRecord(begin, queue()));
      SLUICE_CUDA_CHECK(cudaGraphLaunch(graph_, queue()));
      SLUICE_CUDA_CHECK(cudaEventRecord(end, queue()));
      SLUICE_CUDA_CHECK(cudaEventSynchronize(end));
      float ms = 0;
      SLUICE_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
      us.push_back(static_cast<double>(ms) * 1e3 / kCalls);
    }
    meet();
    (void)cudaEventDestroy(begin), (void)cudaEventDestroy(end);
    group_->check();
    return median(us);
  }
  [[nodiscard]] std::vector<std::uint16_t> output() {
    std::vector<std::uint16_t> bits(load_.x.size());
    backend_->copy_to_host(bits.data(), y_->data(), bits.size() * 2, stream_);
    return bits;
  }
  RebalanceStats move(const Placement& to, int held) {
    return layers_.front().rebalance(to, stream_, {.max_experts_held = held});
  }
  /// A step of a server: all layers, and a wait for the last one. Milliseconds.
  double step_ms() {
    const auto begin = std::chrono::steady_clock::now();
    SLUICE_CUDA_CHECK(cudaGraphLaunch(step_, queue()));
    synchronize();
    return milliseconds_since(begin);
  }
  [[nodiscard]] Layer& layer(int i) { return layers_[static_cast<std::size_t>(i)]; }
  [[nodiscard]] Stream stream() const { return stream_; }

 private:
  template <class T>
  std::unique_ptr<DeviceBuffer> upload(const std::vector<T>& host) {
    auto buffer = backend_->allocate(host.size() * sizeof(T));
    backend_->copy_from_host(buffer->data(), host.data(), host.size() * sizeof(T), stream_);
    return buffer;
  }
  [[nodiscard]] cudaStream_t queue() const { return static_cast<cudaStream_t>(stream_.handle); }
  void synchronize() { backend_->synchronize(stream_); }
  void call(Layer& layer) {
    const Device device = backend_->device();
    const Shape rows{load_.num_tokens, kHidden}, entries{load_.num_tokens, kTopk};
    MutableTensorView y;
    y.data = y_->data(), y.dtype = DType::kBFloat16, y.shape = rows, y.device = device;
    layer.forward(Mode::kLowLatency, {x_->data(), DType::kBFloat16, rows, device},
                  {.topk_idx = {idx_->data(), DType::kInt32, entries, device},
                   .topk_weights = {weights_->data(), DType::kFloat32, entries, device}},
                  y, stream_);
  }
  cudaGraphExec_t capture(const std::function<void()>& body) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    SLUICE_CUDA_CHECK(cudaStreamBeginCapture(queue(), cudaStreamCaptureModeThreadLocal));
    body();
    SLUICE_CUDA_CHECK(cudaStreamEndCapture(queue(), &graph));
    SLUICE_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    SLUICE_CUDA_CHECK(cudaGraphDestroy(graph));
    SLUICE_CUDA_CHECK(cudaGraphUpload(exec, queue()));
    synchronize();
    return exec;
  }

  Options options_;
  Transport& transport_;
  std::unique_ptr<Backend> backend_;
  Stream stream_;
  Workload load_;
  std::unique_ptr<DeviceBuffer> x_, idx_, weights_, y_;
  std::optional<LayerGroup> group_;
  std::vector<Layer> layers_;
  cudaGraphExec_t graph_ = nullptr, step_ = nullptr;
};

void print_placement(const char* name, const std::vector<std::int64_t>& rows,
                     const Placement& placement, double us) {
  const std::vector<double> of_ranks = expected_rows(rows, placement);
  std::printf("%-22s  fullest rank over mean %.3f   layer %8.1f us\n", name,
              max_over_mean(of_ranks), us);
  std::fflush(stdout);
}

/// The steps of a server while the experts of its layers move to `to`, no rank receiving more than
/// `max_received` at a time; 0: a layer at once. `keep`: the memory for experts on their way.
void move_between_steps(Rank& rank, const Options& o, const Placement& to, int max_received,
                        int held, bool keep, bool prints) {
  std::vector<double> steps, moves, after_move;
  rank.meet();
  for (int i = 0; i < 2 * kRepeats; ++i) steps.push_back(rank.step_ms());
  const auto expected = rank.output();
  std::uint64_t bytes = 0;
  int rounds = 0;
  rank.meet();
  for (int i = 0; i < o.layers; ++i) {
    Layer& layer = rank.layer(i);
    while (!(layer.placement() == to)) {
      const auto begin = std::chrono::steady_clock::now();
      const RebalanceStats s = layer.rebalance(
          max_received == 0 ? to : placement_toward(layer.placement(), to, max_received),
          rank.stream(), {.max_experts_held = held, .keep_memory = keep});
      moves.push_back(milliseconds_since(begin));
      after_move.push_back(rank.step_ms());
      bytes += s.received_bytes, rounds += s.num_rounds;
    }
  }
  if (rank.output() != expected) throw Error(ErrorCode::kInternal, "other bits");
  rank.meet();
  if (!prints) return;
  std::printf("%8d %5d %5s %9.3f %6zu %7d %9.1f %9.3f %9.3f %9.2f %11.3f\n", max_received, held,
              keep ? "yes" : "no", median(steps), moves.size(), rounds,
              static_cast<double>(bytes) * 1e-6, median(moves), std::ranges::max(moves),
              std::accumulate(moves.begin(), moves.end(), 0.0), median(after_move));
  std::fflush(stdout);
}

void run(const Options& o) {
  const int slots = o.experts + o.extra;
  const Placement even = Placement::even(o.experts, o.ranks, slots);
  const std::vector<std::int64_t> seen = rows_of(o, 1 << 20, 4096);
  const std::vector<std::int64_t> real = rows_of(o, 0, std::int64_t{o.ranks} * o.tokens);
  const BalanceConfig config{.num_ranks = o.ranks, .num_slots = slots};
  const Placement of_seen = balance(seen, config, even), of_real = balance(real, config, even);
  std::printf("%d experts in %d slots of %d ranks on one GPU, %d tokens each, top-%d, Zipf\n",
              o.experts, slots, o.ranks, o.tokens, kTopk);
  auto transports = make_inproc_transports(o.ranks);
  on_every_rank(o.ranks, [&](int r) {
    Rank rank(o, r, *transports[static_cast<std::size_t>(r)]);
    rank.load(even);
    const double us_even = rank.time_us();
    const auto expected = rank.output();
    if (r == 0) print_placement("even", real, even, us_even);
    const auto move = [&](const char* name, const Placement& to, int held) {
      const RebalanceStats s = rank.move(to, held);
      const double us = rank.time_us();
      if (rank.output() != expected) throw Error(ErrorCode::kInternal, "other bits");
      if (r != 0) return;
      print_placement(name, real, to, us);
      std::printf(
          "  moved in %.2f ms, %d rounds, rank 0 received %d experts, sent %d, copied %d: "
          "%.1f MB and %.1f MB, held %.1f MB\n",
          s.seconds * 1e3, s.num_rounds, s.num_received, s.num_sent, s.num_copied,
          static_cast<double>(s.received_bytes) * 1e-6, static_cast<double>(s.sent_bytes) * 1e-6,
          static_cast<double>(s.extra_bytes) * 1e-6);
      std::fflush(stdout);
    };
    move("of 4096 other tokens", of_seen, 2);
    move("even again", even, 2);
    move("of these tokens", of_real, 2);
    move("even again", even, 5);
    move("of these tokens", of_real, 9);
    move("even again", even, 5);
    if (r == 0) {
      std::printf(
          "steps of %d layers; a rank receives at most so many experts at a time, 0: a whole "
          "layer\n"
          "received  held  kept  step, ms  parts  rounds     MB in  part, ms   longest   all, ms  "
          "step after\n",
          o.layers);
    }
    struct Case {
      int max_received, held;
      bool keep;
    };
    bool is_even = true;
    for (const Case& c : {Case{0, 2, false},
                          {0, 2, true},
                          {0, 9, false},
                          {0, 9, true},
                          {1, 2, false},
                          {1, 2, true},
                          {2, 3, true},
                          {4, 5, true}}) {
      move_between_steps(rank, o, is_even ? of_real : even, c.max_received, c.held, c.keep, r == 0);
      is_even = !is_even;
    }
    rank.meet();
  });
}

int parse(int argc, char** argv, Options& o) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    int* const to = name == "--tokens"    ? &o.tokens
                    : name == "--ranks"   ? &o.ranks
                    : name == "--extra"   ? &o.extra
                    : name == "--experts" ? &o.experts
                    : name == "--layers"  ? &o.layers
                                          : nullptr;
    if (to == nullptr) return 2;
    *to = std::atoi(argv[i + 1]);
  }
  return argc % 2 == 1 ? 0 : 2;
}

}  // namespace
}  // namespace sluice::bench

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  sluice::bench::Options options;
  if (sluice::bench::parse(argc, argv, options) != 0) {
    std::fprintf(
        stderr,
        "bench_rebalance [--tokens N] [--ranks N] [--extra N] [--experts N] [--layers N]\n");
    return 2;
  }
  try {
    sluice::bench::run(options);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
