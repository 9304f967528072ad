#include "layer_run.h"

#include <fmt/core.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <numeric>
#include <optional>
#include <span>

#include "launch.h"
#include "rank_results.h"
#include "report.h"
#include "sluice/backend.h"
#include "sluice/balance.h"
#include "sluice/lab/parallel.h"
#include "sluice/transport.h"

namespace sluice::cli {
namespace {

/// One rank's tensors on its device.
struct DeviceTensors {
  std::unique_ptr<DeviceBuffer> x, topk_idx, topk_weights, y;

  DeviceTensors(Backend& backend, const Workload& load, Stream stream) {
    const auto upload = [&](const auto& host) {
      const std::size_t bytes = host.size() * sizeof(host[0]);
      auto buffer = backend.allocate(std::max<std::size_t>(bytes, 1));
      if (bytes > 0) backend.copy_from_host(buffer->data(), host.data(), bytes, stream);
      return buffer;
    };
    x = upload(load.x);
    topk_idx = upload(load.topk_idx);
    topk_weights = upload(load.topk_weights);
    y = backend.allocate(std::max<std::size_t>(load.x.size() * sizeof(load.x[0]), 1));
  }
};

/// The tokens of one rank: the same on whichever process they are made.
Workload workload_of(const LayerRunConfig& config, const ModelGeometry& geometry, int rank) {
  const std::int64_t first =
      std::accumulate(config.tokens.begin(), config.tokens.begin() + rank, std::int64_t{0});
  return make_workload({.num_experts = geometry.num_experts,
                        .num_topk = geometry.num_topk,
                        .hidden = geometry.hidden,
                        .routing = config.routing,
                        .input = InputKind::kRealistic,
                        .seed = config.seed,
                        .num_channels = geometry.token_width()},
                       first, config.tokens[static_cast<std::size_t>(rank)]);
}

ExchangeCounters minus(ExchangeCounters a, const ExchangeCounters& b) {
  const auto subtract = [](std::vector<std::uint64_t>& from, const std::vector<std::uint64_t>& n) {
    for (std::size_t i = 0; i < n.size(); ++i) from[i] -= n[i];
  };
  subtract(a.dispatch_bytes, b.dispatch_bytes);
  subtract(a.combine_bytes, b.combine_bytes);
  subtract(a.dispatch_rows, b.dispatch_rows);
  subtract(a.wait_ns, b.wait_ns);
  a.num_dispatches -= b.num_dispatches;
  a.saturated_values -= b.saturated_values;
  return a;
}

/// One rank of the run: a group, its layers, and one set of tensors for all of them.
class RankRun {
 public:
  RankRun(const LayerRunConfig& config, const Checkpoint& checkpoint, int rank,
          Transport& transport, Backend& backend)
      : config_(config),
        rank_(rank),
        transport_(transport),
        backend_(backend),
        stream_(backend.stream()),
        load_(workload_of(config, checkpoint.geometry(), rank)),
        tensors_(backend, load_, stream_),
        group_(LayerGroup::create(group_config(config, checkpoint), transport, backend)) {
    const Shape x_shape{load_.num_tokens, load_.hidden};
    const Shape topk_shape{load_.num_tokens, load_.num_topk};
    const Device device = backend.device();
    x_ = {tensors_.x->data(), DType::kBFloat16, x_shape, device};
    routing_ = {
        .topk_idx = {tensors_.topk_idx->data(), DType::kInt32, topk_shape, device},
        .topk_weights = {tensors_.topk_weights->data(), DType::kFloat32, topk_shape, device}};
    y_.data = tensors_.y->data(), y_.dtype = DType::kBFloat16, y_.shape = x_shape;
    y_.device = device;
    load_layers(checkpoint);
  }

  [[nodiscard]] const LoadStats& load_stats() const noexcept { return group_.load_stats(); }
  [[nodiscard]] LayerGroupMemory memory() const noexcept { return group_.memory(); }

  /// Layer `index` by itself. Fills recipe and times of `shared`, which is rank 0's.
  RankResult run_layer(std::size_t index, LayerRunResult& shared);
  /// Balances the experts of layer `index`, which gave the outputs `y`, moves them, and repeats.
  RebalanceResult rebalance(std::size_t index, const std::vector<std::uint16_t>& y);

  /// All layers in a row, `repeats` times: microseconds of each, the slowest rank's.
  std::vector<double> run_passes() {
    std::vector<double> mine;
    for (Layer& layer : layers_) layer.record_stats(false);
    for (int i = 0; i < config_.repeats; ++i) {
      (void)transport_.all_gather({}, config_.environment.peer_timeout);
      const auto begin = std::chrono::steady_clock::now();
      for (Layer& layer : layers_) layer.forward(config_.mode, x_, routing_, y_, stream_);
      backend_.synchronize(stream_);
      mine.push_back(microseconds_since(begin));
      group_.check();
    }
    return slowest_of(mine);
  }

 private:
  static LayerGroupConfig group_config(const LayerRunConfig& config, const Checkpoint& checkpoint) {
    LayerGroupConfig group{.geometry = checkpoint.geometry(),
                           .routed_scaling_factor = config.routed_scaling_factor,
                           .peer_timeout = config.environment.peer_timeout};
    const ModeCapacity capacity{.max_tokens_per_rank = static_cast<int>(
                                    std::max<std::int64_t>(1, std::ranges::max(config.tokens)))};
    (config.mode == Mode::kLowLatency ? group.low_latency : group.normal) = capacity;
    group.num_slots = config.num_slots;
    group.hosts = config.hosts;
    group.sum_parts = config.sum_parts;
    return group;
  }

  static double microseconds_since(std::chrono::steady_clock::time_point begin) {
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
        .count();
  }

  void load_layers(const Checkpoint& checkpoint) {
    ModeRecipes recipes{.dispatch_dtype = config_.environment.dispatch_dtype};
    (config_.mode == Mode::kLowLatency ? recipes.low_latency : recipes.normal) = config_.recipe;
    LoadOptions options;
    options.placements = config_.placements;
    std::optional<ProgressLine> progress;
    if (rank_ == 0) {
      progress.emplace("loading");
      options.progress = [&](double fraction) { progress->update(fraction); };
    }
    layers_ = group_.add_layers(checkpoint, config_.layers, recipes, options);
  }

  /// The largest of every rank's values, at each index.
  [[nodiscard]] std::vector<double> slowest_of(const std::vector<double>& mine) {
    std::vector<double> slowest(mine.size(), 0.0);
    for (const auto& bytes :
         transport_.all_gather(std::as_bytes(std::span(mine)), config_.environment.peer_timeout)) {
      const auto* times = reinterpret_cast<const double*>(bytes.data());
      for (std::size_t i = 0; i < slowest.size(); ++i) slowest[i] = std::max(slowest[i], times[i]);
    }
    return slowest;
  }

  [[nodiscard]] std::vector<std::uint16_t> output() {
    std::vector<std::uint16_t> y(load_.x.size());
    if (!y.empty()) {
      backend_.copy_to_host(y.data(), y_.data, y.size() * sizeof(y[0]), stream_);
    }
    return y;
  }

  const LayerRunConfig& config_;
  int rank_;
  Transport& transport_;
  Backend& backend_;
  Stream stream_;
  Workload load_;
  DeviceTensors tensors_;
  TensorView x_;
  Routing routing_;
  MutableTensorView y_;
  LayerGroup group_;
  std::vector<Layer> layers_;
};

RankResult RankRun::run_layer(std::size_t index, LayerRunResult& shared) {
  Layer& layer = layers_[index];
  RankResult result;
  layer.record_stats(true);
  layer.count_rows(true);
  const ExchangeCounters at_begin = layer.exchange_counters(config_.mode);
  std::vector<ForwardStats> repeats;
  std::vector<double> total_us;
  std::optional<ProgressLine> progress;
  if (rank_ == 0) progress.emplace("running");
  for (int i = 0; i < config_.repeats; ++i) {
    // Ranks start together, so that waiting for a late one is not counted as dispatch.
    (void)transport_.all_gather({}, config_.environment.peer_timeout);
    // Every rank has been through the layer by now.
    if (progress && i > 0) progress->update(static_cast<double>(i) / config_.repeats);
    layer.record_gemm_input_digest(config_.with_digest && i == 0);
    const TransportCounters before = transport_.counters();
    layer.forward(config_.mode, x_, routing_, y_, stream_);
    if (i == 0) {
      result.counters = minus(layer.exchange_counters(config_.mode), at_begin);
      result.transport_bytes = transport_.counters().bytes_put;
      for (std::size_t p = 0; p < before.bytes_put.size(); ++p) {
        result.transport_bytes[p] -= before.bytes_put[p];
      }
    }
    repeats.push_back(layer.stats());
    total_us.push_back(layer.stats().times.total_us);
    layer.check();  // Before the next wait, which would come on top of one that failed.
  }
  // Every rank reports the same repeat: the one whose slowest rank is the median.
  const std::vector<double> slowest = slowest_of(total_us);
  std::vector<std::size_t> order(slowest.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, {}, [&](std::size_t i) { return slowest[i]; });
  result.stats = repeats[order[order.size() / 2]];
  result.totals = minus(layer.exchange_counters(config_.mode), at_begin);
  result.counted_rows = layer.counted_rows(stream_);
  result.memory = group_.memory();
  result.digest = layer.gemm_input_digest();
  result.y = output();
  if (rank_ == 0) shared.placement = layer.placement();
  if (config_.rebalances) result.rebalance = rebalance(index, result.y);
  result.moves = layer.rebalance_counters();
  layer.count_rows(false);
  result.peak_resident_bytes = peak_resident_bytes();
  if (rank_ == 0) {
    shared.recipe = layer.recipe(config_.mode);
    shared.total_us = slowest;
  }
  return result;
}

RebalanceResult RankRun::rebalance(std::size_t index, const std::vector<std::uint16_t>& y) {
  Layer& layer = layers_[index];
  const Placement& before = layer.placement();
  const BalanceConfig config{.num_ranks = before.num_ranks(), .num_slots = before.num_slots()};
  const Placement placement = balance(layer.counted_rows_of_all(stream_), config, before);
  (void)layer.rebalance(placement, stream_);
  RebalanceResult result{.has_same_bits = true};
  result.slot_experts.assign(placement.slot_experts().begin(), placement.slot_experts().end());
  layer.record_gemm_input_digest(false);
  const std::vector<std::uint16_t> poison(y.size(), 0x7fc1);  // A NaN: what is not written shows.
  std::vector<double> total_us;
  for (int i = 0; i < config_.repeats; ++i) {
    if (!y.empty()) backend_.copy_from_host(y_.data, poison.data(), y.size() * 2, stream_);
    (void)transport_.all_gather({}, config_.environment.peer_timeout);
    layer.forward(config_.mode, x_, routing_, y_, stream_);
    total_us.push_back(layer.stats().times.total_us);
    result.has_same_bits = result.has_same_bits && output() == y;
    layer.check();
  }
  result.rows = layer.stats().rows_per_expert;
  result.counted_rows = layer.counted_rows(stream_);
  result.total_us = slowest_of(total_us);
  return result;
}

/// Everything that rank `rank` does. What only rank 0 knows goes into `shared`.
std::string run_rank(const LayerRunConfig& config, const Checkpoint& checkpoint, int rank,
                     Transport& transport, const BackendConfig& device, RunResult& shared) {
  const auto backend = make_backend(device);
  RankRun run(config, checkpoint, rank, transport, *backend);
  std::vector<RankResult> results;
  for (std::size_t i = 0; i < config.layers.size(); ++i) {
    RankResult mine = run.run_layer(i, shared.layers[i]);
    mine.num_ranks_on_device = device.num_local_ranks;
    results.push_back(std::move(mine));
  }
  std::vector<double> pass_us;
  if (config.layers.size() > 1) pass_us = run.run_passes();
  if (rank == 0) {
    shared.pass_us = pass_us;
    for (LayerRunResult& layer : shared.layers) layer.backend = backend->description();
  }
  return pack_results({.layers = std::move(results), .load = run.load_stats()});
}

void check_output_bytes(const LayerRunConfig& config, const ModelGeometry& geometry) {
  const std::int64_t tokens =
      std::accumulate(config.tokens.begin(), config.tokens.end(), std::int64_t{0});
  const auto layers = static_cast<std::int64_t>(config.layers.size());
  const std::int64_t bytes = tokens * geometry.hidden * 2 * layers;
  if (bytes <= kMaxOutputBytes) return;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{} tokens through {} layers: {} of outputs to verify, more than {}; run "
                          "fewer tokens or layers",
                          tokens, layers, human_bytes(static_cast<double>(bytes)),
                          human_bytes(static_cast<double>(kMaxOutputBytes))));
}

}  // namespace

double peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) * 1024;
}

double measure_ceiling(const LayerRunConfig& config) {
  return make_backend({.device = {config.backend, 0}})->measure_read_bandwidth();
}

RunResult run_layers(const LayerRunConfig& config, const Checkpoint& checkpoint, Launch& launch) {
  check_output_bytes(config, checkpoint.geometry());
  RunResult result;
  for (const int layer : config.layers) result.layers.push_back({.layer = layer});
  const auto parts = launch.run_ranks([&](int r, Transport& transport) {
    const Launch::Place place = launch.place_of(r);
    return run_rank(
        config, checkpoint, r, transport,
        place_rank(config.backend, place.local_rank, place.num_local_ranks, config.num_devices),
        result);
  });
  if (!launch.is_reporter()) return result;
  for (int r = 0; r < config.num_ranks; ++r) {
    RankResults part = unpack_results(parts[static_cast<std::size_t>(r)]);
    const LoadStats& load = part.load;
    result.load.seconds = std::max(result.load.seconds, load.seconds);
    result.load.num_threads = std::max(result.load.num_threads, load.num_threads);
    result.load.file_bytes += load.file_bytes;
    result.load.prepared_bytes += load.prepared_bytes;
    result.load.host_bytes += load.host_bytes;
    for (std::size_t i = 0; i < result.layers.size(); ++i) {
      result.layers[i].ranks.push_back(std::move(part.layers[i]));
    }
    result.loads.push_back(workload_of(config, checkpoint.geometry(), r));
  }
  return result;
}

VerifyReport verify_layer(const LayerRunConfig& config, const Checkpoint& checkpoint,
                          const LayerRunResult& result, const std::vector<Workload>& loads,
                          std::int64_t num_rows) {
  const ModelGeometry& geometry = checkpoint.geometry();
  const LayerReference reference(checkpoint.load_experts(result.layer, 0, geometry.num_experts),
                                 result.recipe, config.routed_scaling_factor,
                                 error_model(config.backend));
  struct Place {
    std::size_t rank, token;
  };
  std::vector<Place> places;
  for (std::size_t r = 0; r < result.ranks.size(); ++r) {
    for (std::int64_t t = 0; t < config.tokens[r]; ++t) {
      places.push_back({r, static_cast<std::size_t>(t)});
    }
  }
  const auto total = static_cast<std::int64_t>(places.size());
  num_rows = std::min(num_rows, total);

  VerifyReport report;
  std::mutex mutex;
  ProgressLine progress("verifying against float64");
  for_each_in_parallel(static_cast<std::size_t>(num_rows), [&](std::size_t i) {
    const std::int64_t index = static_cast<std::int64_t>(i) * total / num_rows;
    const auto [r, t] = places[static_cast<std::size_t>(index)];
    const RankResult& rank = result.ranks[r];
    const Workload& load = loads[r];
    const auto hidden = static_cast<std::size_t>(geometry.hidden);
    const auto topk = static_cast<std::size_t>(geometry.num_topk);
    const ReferenceRow row = reference.row(&load.x[t * hidden], &load.topk_idx[t * topk],
                                           &load.topk_weights[t * topk], geometry.num_topk);
    const std::lock_guard lock(mutex);
    compare_row(row, &rank.y[t * hidden], index, report);
    progress.update(static_cast<double>(report.num_rows) / static_cast<double>(num_rows));
  });
  return report;
}

}  // namespace sluice::cli
