#include "layer_run.h"

#include <fmt/core.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <numeric>
#include <thread>

#include "command.h"
#include "sluice/backend.h"
#include "sluice/error.h"
#include "sluice/transport.h"

namespace sluice::cli {
namespace {

/// Runs body(r) on a thread per rank and rethrows the first failure that is a cause rather than a
/// consequence: ranks waiting for a failed one time out.
template <class Body>
void on_every_rank(int num_ranks, const Body& body) {
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(num_ranks));
  std::vector<std::thread> threads;
  for (int r = 0; r < num_ranks; ++r) {
    threads.emplace_back([&, r] {
      try {
        body(r);
      } catch (...) {
        failures[static_cast<std::size_t>(r)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::exception_ptr consequence;
  for (const std::exception_ptr& failure : failures) {
    if (!failure) continue;
    try {
      std::rethrow_exception(failure);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kPeerTimeout) throw;
      if (!consequence) consequence = failure;
    }
  }
  if (consequence) std::rethrow_exception(consequence);
}

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

  const auto r = static_cast<std::size_t>(rank);
  const std::int64_t first =
      std::accumulate(config.tokens.begin(), config.tokens.begin() + rank, std::int64_t{0});
  RankResult result;
  result.load = make_workload({.num_experts = geometry.num_experts,
                               .num_topk = geometry.num_topk,
                               .hidden = geometry.hidden,
                               .routing = config.routing,
                               .input = InputKind::kRealistic,
                               .seed = config.seed},
                              first, config.tokens[r]);
  const Workload& load = result.load;
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
    engine.forward(config.mode, x, routing, y, stream);
    if (i == 0) result.counters = engine.exchange_counters(config.mode);
    repeats.push_back(engine.stats());
  }
  engine.check();
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
  result.weight_bytes = engine.weight_bytes();
  result.digest = engine.gemm_input_digest();
  result.y.resize(load.x.size());
  if (!result.y.empty()) {
    backend.copy_to_host(result.y.data(), y.data, result.y.size() * sizeof(result.y[0]), stream);
  }
  if (rank == 0) {
    shared.recipe = engine.recipe(config.mode);
    shared.total_us = slowest;
  }
  return result;
}

}  // namespace

LayerRunResult run_layer(const LayerRunConfig& config, const Checkpoint& checkpoint) {
  LayerRunResult result;
  result.ranks.resize(static_cast<std::size_t>(config.num_ranks));
  {
    // The ceiling is measured alone, with all of the device, before any rank starts.
    const auto whole = make_backend({.device = {config.backend, 0}});
    result.read_bytes_per_s = whole->measure_read_bandwidth();
  }
  auto transports = make_inproc_transports(config.num_ranks);
  on_every_rank(config.num_ranks, [&](int r) {
    const auto backend = make_backend(
        {.device = {config.backend, 0}, .local_rank = r, .num_local_ranks = config.num_ranks});
    if (r == 0) result.backend = backend->description();
    const auto i = static_cast<std::size_t>(r);
    result.ranks[i] = run_rank(config, checkpoint, r, *transports[i], *backend, result);
  });
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
