#include "layer_run.h"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <nlohmann/json.hpp>
#include <numeric>
#include <thread>

#include "launch.h"
#include "report.h"
#include "sluice/backend.h"
#include "sluice/lab/ranks.h"
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
                        .seed = config.seed},
                       first, config.tokens[static_cast<std::size_t>(rank)]);
}

using Json = nlohmann::json;

Json to_json(const ExchangeCounters& c) {
  return {c.dispatch_bytes, c.combine_bytes,  c.dispatch_rows,
          c.wait_ns,        c.num_dispatches, c.saturated_values};
}

ExchangeCounters counters_from(const Json& j) {
  return {.dispatch_bytes = j[0],
          .combine_bytes = j[1],
          .dispatch_rows = j[2],
          .wait_ns = j[3],
          .num_dispatches = j[4],
          .saturated_values = j[5]};
}

/// A result on its way from one process to another; the workload is made again over there.
std::string encode(const RankResult& r) {
  const StageTimes& t = r.stats.times;
  const auto* y = reinterpret_cast<const std::uint8_t*>(r.y.data());
  const Json json = {{"times",
                      {t.dispatch_us, t.quantize_us, t.gemm1_us, t.activation_us, t.gemm2_us,
                       t.combine_us, t.total_us}},
                     {"rows_per_expert", r.stats.rows_per_expert},
                     {"weight_bytes_read", r.stats.weight_bytes_read},
                     {"flops", r.stats.flops},
                     {"counters", to_json(r.counters)},
                     {"totals", to_json(r.totals)},
                     {"transport_bytes", r.transport_bytes},
                     {"y", Json::binary({y, y + r.y.size() * sizeof(r.y[0])})},
                     {"memory",
                      {r.memory.codes_bytes, r.memory.scales_bytes, r.memory.prepared_bytes,
                       r.memory.exchange_bytes, r.memory.scratch_bytes}},
                     {"digest", r.digest},
                     {"peak_resident_bytes", r.peak_resident_bytes},
                     {"num_ranks_on_device", r.num_ranks_on_device}};
  std::string bytes;
  Json::to_cbor(json, bytes);
  return bytes;
}

RankResult decode(const std::string& bytes) {
  const Json j = Json::from_cbor(bytes);
  const Json& t = j["times"];
  RankResult r{.stats = {.times = {t[0], t[1], t[2], t[3], t[4], t[5], t[6]},
                         .rows_per_expert = j["rows_per_expert"],
                         .weight_bytes_read = j["weight_bytes_read"],
                         .flops = j["flops"]},
               .counters = counters_from(j["counters"]),
               .totals = counters_from(j["totals"]),
               .transport_bytes = j["transport_bytes"],
               .y = {},
               .load = {},
               .memory = {.codes_bytes = j["memory"][0],
                          .scales_bytes = j["memory"][1],
                          .prepared_bytes = j["memory"][2],
                          .exchange_bytes = j["memory"][3],
                          .scratch_bytes = j["memory"][4]},
               .digest = j["digest"],
               .peak_resident_bytes = j["peak_resident_bytes"],
               .num_ranks_on_device = j["num_ranks_on_device"]};
  const auto& y = j["y"].get_binary();
  r.y.resize(y.size() / sizeof(r.y[0]));
  if (!y.empty()) std::memcpy(r.y.data(), y.data(), y.size());
  return r;
}

RankResult run_rank(const LayerRunConfig& config, const Checkpoint& checkpoint, int rank,
                    Transport& transport, Backend& backend, LayerRunResult& shared) {
  const ModelGeometry& geometry = checkpoint.geometry();
  const bool low_latency = config.mode == Mode::kLowLatency;
  const auto recipe = std::optional(config.recipe);
  Engine engine = Engine::create({.layer = config.layer,
                                  .low_latency = low_latency ? recipe : std::nullopt,
                                  .normal = low_latency ? std::nullopt : recipe,
                                  .dispatch_dtype = config.environment.dispatch_dtype,
                                  .max_tokens_per_rank = static_cast<int>(
                                      std::max<std::int64_t>(1, std::ranges::max(config.tokens))),
                                  .routed_scaling_factor = config.routed_scaling_factor,
                                  .peer_timeout = config.environment.peer_timeout},
                                 checkpoint, transport, backend);

  RankResult result;
  const Workload load = workload_of(config, geometry, rank);
  const Stream stream = backend.stream();
  const DeviceTensors tensors(backend, load, stream);
  const Device device = backend.device();
  const Shape x_shape{load.num_tokens, load.hidden}, topk_shape{load.num_tokens, load.num_topk};
  const TensorView x(tensors.x->data(), DType::kBFloat16, x_shape, device);
  const Routing routing{
      .topk_idx = {tensors.topk_idx->data(), DType::kInt32, topk_shape, device},
      .topk_weights = {tensors.topk_weights->data(), DType::kFloat32, topk_shape, device}};
  MutableTensorView y;
  y.data = tensors.y->data(), y.dtype = DType::kBFloat16, y.shape = x_shape, y.device = device;

  engine.record_stats(true);
  std::vector<ForwardStats> repeats;
  for (int i = 0; i < config.repeats; ++i) {
    // Ranks start together, so that waiting for a late one is not counted as dispatch.
    (void)transport.all_gather({}, config.environment.peer_timeout);
    engine.record_gemm_input_digest(config.with_digest && i == 0);
    const TransportCounters before = transport.counters();
    engine.forward(config.mode, x, routing, y, stream);
    if (i == 0) {
      result.counters = engine.exchange_counters(config.mode);
      result.transport_bytes = transport.counters().bytes_put;
      for (std::size_t p = 0; p < before.bytes_put.size(); ++p) {
        result.transport_bytes[p] -= before.bytes_put[p];
      }
    }
    repeats.push_back(engine.stats());
    engine.check();  // Before the next wait, which would come on top of one that failed.
  }
  // Every rank reports the same repeat: the one whose slowest rank is the median.
  std::vector<double> mine(repeats.size());
  std::ranges::transform(repeats, mine.begin(), [](const auto& s) { return s.times.total_us; });
  const auto all =
      transport.all_gather(std::as_bytes(std::span(mine)), config.environment.peer_timeout);
  std::vector<double> slowest(mine.size(), 0.0);
  for (const auto& bytes : all) {
    const auto* times = reinterpret_cast<const double*>(bytes.data());
    for (std::size_t i = 0; i < slowest.size(); ++i) slowest[i] = std::max(slowest[i], times[i]);
  }
  std::vector<std::size_t> order(slowest.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, {}, [&](std::size_t i) { return slowest[i]; });
  result.stats = repeats[order[order.size() / 2]];
  result.totals = engine.exchange_counters(config.mode);
  result.memory = engine.memory();
  result.digest = engine.gemm_input_digest();
  result.y.resize(load.x.size());
  if (!result.y.empty()) {
    backend.copy_to_host(result.y.data(), y.data, result.y.size() * sizeof(result.y[0]), stream);
  }
  result.peak_resident_bytes = peak_resident_bytes();
  if (rank == 0) {
    shared.recipe = engine.recipe(config.mode);
    shared.total_us = slowest;
  }
  return result;
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

LayerRunResult run_layer(const LayerRunConfig& config, const Checkpoint& checkpoint,
                         Launch& launch) {
  LayerRunResult result;
  const auto parts = launch.run_ranks([&](int r, Transport& transport) {
    const Launch::Place place = launch.place_of(r);
    const BackendConfig device =
        place_rank(config.backend, place.local_rank, place.num_local_ranks, config.num_devices);
    const auto backend = make_backend(device);
    if (r == 0) result.backend = backend->description();
    RankResult mine = run_rank(config, checkpoint, r, transport, *backend, result);
    mine.num_ranks_on_device = device.num_local_ranks;
    return encode(mine);
  });
  if (!launch.is_reporter()) return result;
  for (int r = 0; r < config.num_ranks; ++r) {
    result.ranks.push_back(decode(parts[static_cast<std::size_t>(r)]));
    result.ranks.back().load = workload_of(config, checkpoint.geometry(), r);
  }
  return result;
}

VerifyReport verify_run(const LayerRunConfig& config, const Checkpoint& checkpoint,
                        const LayerRunResult& result, std::int64_t num_rows) {
  const ModelGeometry& geometry = checkpoint.geometry();
  const LayerReference reference(checkpoint.load_experts(config.layer, 0, geometry.num_experts),
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
  std::atomic<std::int64_t> next{0};
  ProgressLine progress("verifying against float64");
  on_every_rank(static_cast<int>(std::max(1u, std::thread::hardware_concurrency())), [&](int) {
    for (std::int64_t i; (i = next.fetch_add(1)) < num_rows;) {
      const std::int64_t index = i * total / num_rows;
      const auto [r, t] = places[static_cast<std::size_t>(index)];
      const RankResult& rank = result.ranks[r];
      const auto hidden = static_cast<std::size_t>(geometry.hidden);
      const auto topk = static_cast<std::size_t>(geometry.num_topk);
      const ReferenceRow row =
          reference.row(&rank.load.x[t * hidden], &rank.load.topk_idx[t * topk],
                        &rank.load.topk_weights[t * topk], geometry.num_topk);
      const std::lock_guard lock(mutex);
      compare_row(row, &rank.y[t * hidden], index, report);
      progress.update(static_cast<double>(report.num_rows) / static_cast<double>(num_rows));
    }
  });
  return report;
}

}  // namespace sluice::cli
