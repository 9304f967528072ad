// A whole layer over several ranks, with its rows leaving from the experts' kernel and without,
// beside the times of its parts.
#include "sluice/lab/layer_bench.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "backend/ops.h"
#include "bench/random_experts.h"
#include "bench/rank_reports.h"
#include "core/fail.h"
#include "exchange/slot_ranks.h"
#include "sluice/exchange.h"
#include "sluice/experts.h"
#include "sluice/lab/median.h"
#include "sluice/layer.h"

namespace sluice {
namespace {

using Work = std::function<void()>;

LayerGroupConfig group_config(const LayerBenchConfig& bench, bool send_from_experts) {
  LayerGroupConfig config{.geometry = bench.geometry,
                          .send_from_experts = send_from_experts,
                          .peer_timeout = kBenchTimeout};
  const int tokens = std::ranges::max(bench.tokens_per_rank);
  (bench.mode == Mode::kNormal ? config.normal : config.low_latency).max_tokens_per_rank = tokens;
  return config;
}

ExchangeConfig exchange_config(const LayerBenchConfig& bench) {
  return {.mode = bench.mode,
          .num_experts = bench.geometry.num_experts,
          .num_topk = bench.geometry.num_topk,
          .hidden = bench.geometry.hidden,
          .max_tokens_per_rank = std::ranges::max(bench.tokens_per_rank),
          .num_in_flight = 1,
          .peer_timeout = kBenchTimeout};
}

/// A rank's experts, random and other ones on every rank.
ExpertWeights experts_of(const LayerBenchConfig& bench, int rank) {
  const ExpertPlacement placement(bench.geometry.num_experts, bench.num_ranks);
  ModelGeometry own = bench.geometry;
  own.num_experts = placement.num_local();
  ExpertWeights weights = random_experts(
      own, bench.scale_dtype, bench.seed + static_cast<std::uint64_t>(rank), CodeRange::kSymmetric);
  weights.geometry = bench.geometry;
  weights.first_expert = placement.expert_of(rank, 0);
  return weights;
}

/// One rank: the layer in both ways, its parts, and the tokens of the case in progress.
class LayerBenchRank {
 public:
  LayerBenchRank(const LayerBenchConfig& bench, Transport& transport, BackendOps& backend)
      : bench_(bench),
        transport_(transport),
        backend_(backend),
        apart_group_(LayerGroup::create(group_config(bench, false), transport, backend)),
        group_(LayerGroup::create(group_config(bench, true), transport, backend)),
        exchange_(Exchange::create(exchange_config(bench), transport, backend)) {
    const ExpertWeights weights = experts_of(bench, transport.rank());
    const LayerSpec spec{.name = "the layer", .weights = weights};
    for (int i = 0; i < bench.copies; ++i) {
      layers_[0].push_back(apart_group_.add_layer(spec));
      layers_[1].push_back(group_.add_layer(spec));
      experts_.push_back(Experts::create(weights, exchange_.max_rows(), backend));
    }
    const auto elements =
        static_cast<std::size_t>(max_tokens()) * static_cast<std::size_t>(bench.geometry.hidden);
    const auto entries =
        static_cast<std::size_t>(max_tokens()) * static_cast<std::size_t>(bench.geometry.num_topk);
    x_ = backend.allocate(elements * 2), y_ = backend.allocate(elements * 2);
    idx_ = backend.allocate(entries * 4), weights_ = backend.allocate(entries * 4);
    if (backend.device().kind == Device::Kind::kHost) {  // Elsewhere they are the exchange's.
      rows_ = backend.allocate(static_cast<std::size_t>(exchange_.max_rows()) *
                               static_cast<std::size_t>(bench.geometry.hidden) * 2);
    }
    barrier();
  }

  LayerBenchCase run(int tokens) {
    load(tokens);
    LayerBenchCase result{.tokens_per_rank = tokens};
    result.checked_elements = check();
    time_parts(result);
    result.apart_us = time_layers(0), result.overlapped_us = time_layers(1);
    result.apart = time_stages(0), result.overlapped = time_stages(1);
    group_.check();
    apart_group_.check();
    exchange_.check();
    barrier();
    return result;
  }
  [[nodiscard]] std::size_t exchange_bytes() const { return group_.memory().exchange_bytes; }
  void barrier() { (void)transport_.all_gather({}, kBenchTimeout); }

 private:
  [[nodiscard]] int max_tokens() const { return std::ranges::max(bench_.tokens_per_rank); }
  [[nodiscard]] Shape tokens_shape() const { return {tokens_, bench_.geometry.hidden}; }
  [[nodiscard]] TensorView x() const {
    return {x_->data(), DType::kBFloat16, tokens_shape(), backend_.device()};
  }
  [[nodiscard]] Routing routing() const {
    const Shape entries{tokens_, bench_.geometry.num_topk};
    return {.topk_idx = {idx_->data(), DType::kInt32, entries, backend_.device()},
            .topk_weights = {weights_->data(), DType::kFloat32, entries, backend_.device()}};
  }
  [[nodiscard]] MutableTensorView y() const {
    MutableTensorView view;
    view.data = y_->data(), view.dtype = DType::kBFloat16, view.device = backend_.device();
    view.shape = tokens_shape();
    return view;
  }
  [[nodiscard]] MutableTensorView rows_of(const Dispatched& d) const {
    MutableTensorView rows = d.expert_y();
    if (!rows.empty()) return rows;
    rows.data = rows_->data(), rows.dtype = DType::kBFloat16;
    rows.shape = d.batch().x.shape, rows.device = backend_.device();
    return rows;
  }
  void put(const std::unique_ptr<DeviceBuffer>& to, const void* from, std::size_t bytes) {
    backend_.copy_from_host(to->data(), from, bytes, backend_.stream());
  }

  void load(int tokens) {
    tokens_ = tokens;
    const ModelGeometry& g = bench_.geometry;
    const Workload load = make_workload({.num_experts = g.num_experts,
                                         .num_topk = g.num_topk,
                                         .hidden = g.hidden,
                                         .routing = bench_.routing,
                                         .seed = bench_.seed},
                                        std::int64_t{transport_.rank()} * tokens, tokens);
    put(x_, load.x.data(), load.x.size() * 2);
    put(idx_, load.topk_idx.data(), load.topk_idx.size() * 4);
    put(weights_, load.topk_weights.data(), load.topk_weights.size() * 4);
    poison_.assign(load.x.size(), 0x7fc1);
    put(y_, poison_.data(), poison_.size() * 2);
    barrier();
  }
  /// What the last call gave; poison takes its place.
  std::vector<std::uint16_t> take() {
    std::vector<std::uint16_t> bits(poison_.size());
    backend_.copy_to_host(bits.data(), y_->data(), bits.size() * 2, backend_.stream());
    put(y_, poison_.data(), poison_.size() * 2);
    return bits;
  }
  /// Copies take turns: what the last call left in a cache is not what the next one reads.
  [[nodiscard]] std::size_t next_copy() { return ++turn_ % layers_[0].size(); }
  void forward(std::size_t way) {
    layers_[way][next_copy()].forward(bench_.mode, x(), routing(), y(), backend_.stream());
  }
  [[nodiscard]] LayerRecipe recipe() const { return layers_[0][0].recipe(bench_.mode); }

  std::int64_t check() {
    forward(0);
    want_ = take();
    barrier();
    for (int i = 0; i < std::max(3, bench_.copies); ++i) {
      forward(1);
      expect_same("with send_from_experts");
      barrier();
    }
    return static_cast<std::int64_t>(want_.size());
  }
  void expect_same(const char* what) {
    const std::vector<std::uint16_t> have = take();
    const auto found = std::ranges::mismatch(have, want_);
    if (found.in1 == have.end()) return;
    const std::int64_t at = found.in1 - have.begin();
    fail(ErrorCode::kInternal,
         "rank {}, {} tokens: {} token {} element {} has bits {:04x}, expected {:04x}; nothing is "
         "timed",
         transport_.rank(), tokens_, what, at / bench_.geometry.hidden, at % bench_.geometry.hidden,
         *found.in1, *found.in2);
  }

  /// Records one call that is not marked, in which ranks that were launched early wait for the
  /// others, and bench.calls more, whose work marks what it likes. Medians over the calls of each
  /// of the `marks` times of a call, of the slowest rank.
  std::vector<double> time(std::size_t marks,
                           const std::function<void(const std::function<void()>&)>& call) {
    auto recording = backend_.record(backend_.stream(), [&](const std::function<void()>& mark) {
      call([] {});
      mark();
      for (int i = 0; i < bench_.calls; ++i) call(mark);
    });
    std::vector<std::vector<double>> times(marks);
    for (int repeat = -1; repeat < bench_.repeats; ++repeat) {
      barrier();
      recording->replay();
      std::vector<double> us = recording->marks_us();
      keep_slowest(transport_, us);
      for (std::size_t i = 0; repeat >= 0 && i < us.size(); ++i) times[i % marks].push_back(us[i]);
    }
    recording.reset();  // Giving memory back waits for the device, so before any rank goes on.
    barrier();
    std::vector<double> medians;
    for (const auto& of_mark : times) medians.push_back(median(of_mark));
    return medians;
  }

  /// Whole calls in a row, and no stamp between them: the mean of a recording, its median.
  double time_in_a_row(const Work& call) {
    int calls = 0;
    const auto all = time(1, [&](const std::function<void()>& mark) {
      call();
      if (++calls % (bench_.calls + 1) == 0) mark();  // The last one; the first is not counted.
    });
    return all.front() / bench_.calls;
  }

  void time_parts(LayerBenchCase& result) {
    const Stream stream = backend_.stream();
    const auto pair = [&](const std::function<void()>& mark) {
      Dispatched d = exchange_.dispatch(x(), routing(), stream);
      mark();
      const MutableTensorView rows = rows_of(d);
      exchange_.combine(std::move(d), rows, y(), stream);
      mark();
    };
    pair([] {});  // A kernel's first launch loads it, which cannot be recorded.
    backend_.synchronize(stream);
    barrier();
    const auto halves = time(2, pair);
    result.dispatch_us = halves[0], result.combine_us = halves[1];
    result.pair_us = time_in_a_row([&] { pair([] {}); });

    Dispatched d = exchange_.dispatch(x(), routing(), stream);
    const auto stage = [&] {
      experts_[next_copy()].forward(recipe(), d.batch(), rows_of(d), stream);
    };
    for (std::size_t i = 0; i < experts_.size(); ++i) stage();
    backend_.synchronize(stream);
    barrier();
    result.stage_us = time_in_a_row(stage);
    const MutableTensorView rows = rows_of(d);
    exchange_.combine(std::move(d), rows, y(), stream);
    (void)take();
  }

  double time_layers(std::size_t way) {
    const double us = time_in_a_row([&] { forward(way); });
    expect_same(way == 0 ? "a replay" : "a replay with send_from_experts");
    return us;
  }

  LayerBenchCase::Stages time_stages(std::size_t way) {
    std::array<std::vector<double>, 3> times;
    for (int repeat = -1; repeat < bench_.repeats; ++repeat) {
      barrier();
      Layer& layer = layers_[way][next_copy()];
      layer.record_stats(true);
      layer.forward(bench_.mode, x(), routing(), y(), backend_.stream());
      layer.record_stats(false);
      const StageTimes& t = layer.stats().times;
      std::array us{t.dispatch_us, t.quantize_us + t.gemm1_us + t.activation_us + t.gemm2_us,
                    t.combine_us};
      keep_slowest(transport_, us);
      for (std::size_t i = 0; repeat >= 0 && i < us.size(); ++i) times[i].push_back(us[i]);
    }
    barrier();
    return {median(times[0]), median(times[1]), median(times[2])};
  }

  const LayerBenchConfig& bench_;
  Transport& transport_;
  BackendOps& backend_;
  LayerGroup apart_group_, group_;
  Exchange exchange_;
  std::array<std::vector<Layer>, 2> layers_;  // By way: without and with send_from_experts; copies.
  std::vector<Experts> experts_;              // Copies.
  std::size_t turn_ = 0;
  std::unique_ptr<DeviceBuffer> x_, y_, idx_, weights_, rows_;
  std::int64_t tokens_ = 0;
  std::vector<std::uint16_t> poison_, want_;
};

void check_config(const LayerBenchConfig& bench) {
  check_argument(bench.geometry.num_experts % bench.num_ranks == 0,
                 "{} experts are not divisible by {} ranks", bench.geometry.num_experts,
                 bench.num_ranks);
  check_argument(bench.calls >= 1, "calls {}; at least one", bench.calls);
  check_argument(bench.copies >= 1, "copies {}; at least one", bench.copies);
  check_argument(bench.repeats >= 1, "repeats {}; at least one", bench.repeats);
  check_argument(!bench.tokens_per_rank.empty(), "no number of tokens to bench");
  for (const int tokens : bench.tokens_per_rank) {
    check_argument(tokens >= 1, "tokens_per_rank {}; at least one", tokens);
  }
}

/// Of one rank; trivially copyable, so that a process may hand it to another.
struct RankReport {
  char device[200] = {};
  std::size_t exchange_bytes = 0;
  LayerBenchCase result;
};

}  // namespace

LayerBenchReport bench_layer(const LayerBenchConfig& bench,
                             const std::function<void(double)>& on_progress,
                             const RunRanks& run_ranks_in) {
  const RunRanks run_ranks =
      checked_ranks(bench.num_ranks, run_ranks_in, [&] { check_config(bench); });
  const auto parts = run_ranks([&](int r, Transport& transport) {
    const auto backend =
        make_backend(place_rank(bench.device, r, bench.num_ranks, bench.num_devices));
    LayerBenchRank rank(bench, transport, ops(*backend));
    RankReport report;
    const std::string text = backend->description();
    text.copy(report.device, sizeof(report.device) - 1);
    report.exchange_bytes = rank.exchange_bytes();
    std::string all;
    for (std::size_t i = 0; i < bench.tokens_per_rank.size(); ++i) {
      report.result = rank.run(bench.tokens_per_rank[i]);
      all += to_bytes(report);
      if (r == 0 && on_progress) {
        on_progress(static_cast<double>(i + 1) / static_cast<double>(bench.tokens_per_rank.size()));
      }
    }
    return all;
  });
  LayerBenchReport report;
  report.num_devices = devices_in_use(bench.device, bench.num_ranks, bench.num_devices);
  for (std::size_t i = 0; i < bench.tokens_per_rank.size(); ++i) {
    std::int64_t checked = 0;
    for (const std::string& part : parts) {
      const auto of_rank = from_bytes<RankReport>(part.substr(i * sizeof(RankReport)));
      checked += of_rank.result.checked_elements;
      if (&part != &parts.front()) continue;
      report.device = of_rank.device, report.exchange_bytes = of_rank.exchange_bytes;
      report.cases.push_back(of_rank.result);
    }
    report.cases.back().checked_elements = checked;
  }
  return report;
}

}  // namespace sluice
