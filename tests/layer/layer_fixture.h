// layer_fixture.h - runs an Engine over R ranks as threads and hands back every token's output.
#pragma once

#include <gtest/gtest.h>

#include <unistd.h>
#include <exception>
#include <filesystem>

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "sluice/backend.h"
#include "sluice/checkpoint.h"
#include "sluice/engine.h"
#include "sluice/error.h"
#include "sluice/lab/ranks.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/synthetic.h"
#include "sluice/lab/workload.h"
#include "sluice/transport.h"

namespace sluice::testing {

/// 24 experts divide over 1, 2, 3, 4 and 8 ranks; hidden and intermediate have odd group counts.
inline ModelGeometry small_geometry() {
  return {.name = "test", .num_experts = 24, .num_topk = 4, .hidden = 384, .intermediate = 128};
}

/// A checkpoint on disk for the lifetime of the object.
class TemporaryCheckpoint {
 public:
  explicit TemporaryCheckpoint(SyntheticCheckpoint spec) {
    static int counter = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("sluice-layer-" + std::to_string(::getpid()) + "-" + std::to_string(counter++));
    write_synthetic_checkpoint(spec, path_);
  }
  ~TemporaryCheckpoint() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryCheckpoint(const TemporaryCheckpoint&) = delete;
  TemporaryCheckpoint& operator=(const TemporaryCheckpoint&) = delete;
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// A suite over one layer of small_geometry(), which its tests share.
class SmallLayerTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    files_ = new TemporaryCheckpoint({.geometry = small_geometry()});
    checkpoint_ = new Checkpoint(Checkpoint::open(files_->path()));
  }
  static void TearDownTestSuite() {
    delete checkpoint_;
    delete files_;
  }
  inline static TemporaryCheckpoint* files_ = nullptr;
  inline static Checkpoint* checkpoint_ = nullptr;
};

struct LayerCase {
  std::vector<std::int64_t> tokens = {5};  ///< One entry per rank.
  Mode mode = Mode::kLowLatency;
  Recipe recipe = {};  ///< direct
  DispatchDtype dispatch_dtype = DispatchDtype::kAuto;
  float routed_scaling_factor = 1.0f;
  int max_tokens_per_rank = 0;  ///< 0 = the largest of `tokens`.
  int max_m = 0;
  Hosts hosts = {};
  int sum_parts = 0;
  int num_threads = 1;
  RoutingKind routing = RoutingKind::kUniform;
  std::chrono::milliseconds timeout{20'000};
  /// Changes rank r's workload before it is used.
  std::function<void(int r, Workload&)> edit = {};
  /// Wraps rank r's transport, to inject faults.
  std::function<std::unique_ptr<Transport>(int r, std::unique_ptr<Transport>)> wrap = {};
  /// Checkpoint that rank r opens, if not the common one.
  std::map<int, std::filesystem::path> own_checkpoint = {};
  std::map<int, int> own_max_tokens =
      {};  ///< max_tokens_per_rank of rank r, if not the common one.
};

struct LayerOutcome {
  LayerRecipe recipe;
  std::vector<Workload> loads;                ///< [rank]
  std::vector<std::vector<std::uint16_t>> y;  ///< [rank][num_tokens * hidden]
  std::vector<ExchangeCounters> counters;     ///< [rank]
  std::vector<ForwardStats> stats;            ///< [rank]
  std::vector<std::exception_ptr> failures;   ///< [rank]
  std::uint64_t digest = 0;                   ///< Sum over ranks.

  /// Outputs of all ranks one after the other, in order of global tokens.
  [[nodiscard]] std::vector<std::uint16_t> all_y() const {
    std::vector<std::uint16_t> all;
    for (const auto& part : y) all.insert(all.end(), part.begin(), part.end());
    return all;
  }
  void rethrow() const {
    for (const auto& failure : failures) {
      if (failure) std::rethrow_exception(failure);
    }
  }
};

/// Runs one forward() per rank. Never throws: failures are in the outcome.
inline LayerOutcome try_layer(const Checkpoint& checkpoint, const LayerCase& c) {
  const int num_ranks = static_cast<int>(c.tokens.size());
  const ModelGeometry& g = checkpoint.geometry();
  LayerOutcome out;
  const auto n = c.tokens.size();
  out.loads.resize(n), out.y.resize(n), out.counters.resize(n), out.stats.resize(n);
  std::vector<std::uint64_t> digests(n);
  std::vector<LayerRecipe> recipes(n);
  auto transports = make_inproc_transports(num_ranks);
  out.failures = try_on_every_rank(num_ranks, [&](int rank) {
    const auto r = static_cast<std::size_t>(rank);
    std::unique_ptr<Transport> transport = std::move(transports[r]);
    if (c.wrap) transport = c.wrap(rank, std::move(transport));
    const auto backend = make_backend({.num_threads = c.num_threads});
    std::optional<Checkpoint> own;
    if (c.own_checkpoint.contains(rank)) {
      own.emplace(Checkpoint::open(c.own_checkpoint.at(rank)));
    }
    const auto largest = static_cast<int>(*std::max_element(c.tokens.begin(), c.tokens.end()));
    int max_tokens = c.max_tokens_per_rank ? c.max_tokens_per_rank : std::max(1, largest);
    if (c.own_max_tokens.contains(rank)) max_tokens = c.own_max_tokens.at(rank);
    const bool low_latency = c.mode == Mode::kLowLatency;
    const std::optional<Recipe> recipe = c.recipe;
    Engine engine = Engine::create({.layer = checkpoint.moe_layers().front(),
                                    .low_latency = low_latency ? recipe : std::nullopt,
                                    .normal = low_latency ? std::nullopt : recipe,
                                    .dispatch_dtype = c.dispatch_dtype,
                                    .max_tokens_per_rank = max_tokens,
                                    .max_m = c.max_m,
                                    .hosts = c.hosts,
                                    .sum_parts = c.sum_parts,
                                    .routed_scaling_factor = c.routed_scaling_factor,
                                    .peer_timeout = c.timeout},
                                   own ? *own : checkpoint, *transport, *backend);
    const std::int64_t first =
        std::accumulate(c.tokens.begin(), c.tokens.begin() + rank, std::int64_t{0});
    Workload& load = out.loads[r] = make_workload({.num_experts = g.num_experts,
                                                   .num_topk = g.num_topk,
                                                   .hidden = g.hidden,
                                                   .routing = c.routing,
                                                   .seed = 7,
                                                   .num_channels = g.token_width()},
                                                  first, c.tokens[r]);
    if (c.edit) c.edit(rank, load);
    out.y[r].assign(load.x.size(), 0x7fc1);  // Poison: a NaN that nothing writes.
    MutableTensorView y;
    y.data = out.y[r].data(), y.dtype = DType::kBFloat16, y.shape = load.x_view().shape;
    engine.record_stats(true);
    engine.record_gemm_input_digest(true);
    engine.forward(c.mode, load.x_view(), load.routing_view(), y, {});
    digests[r] = engine.gemm_input_digest();
    recipes[r] = engine.recipe(c.mode);
    out.counters[r] = engine.exchange_counters(c.mode);
    out.stats[r] = engine.stats();
  });
  for (const std::uint64_t digest : digests) out.digest += digest;
  out.recipe = recipes[0];
  return out;
}

inline LayerOutcome run_layer(const Checkpoint& checkpoint, const LayerCase& c) {
  LayerOutcome outcome = try_layer(checkpoint, c);
  outcome.rethrow();
  return outcome;
}

/// Compares every token with the float64 reference, within what `kind` may round.
inline VerifyReport verify_all(const Checkpoint& checkpoint, const LayerCase& c,
                               const LayerOutcome& outcome,
                               Device::Kind kind = Device::Kind::kHost) {
  const ModelGeometry& g = checkpoint.geometry();
  const LayerReference reference(
      checkpoint.load_experts(checkpoint.moe_layers().front(), 0, g.num_experts), outcome.recipe,
      c.routed_scaling_factor, error_model(kind));
  VerifyReport report;
  std::int64_t token = 0;
  const auto hidden = static_cast<std::size_t>(g.hidden),
             topk = static_cast<std::size_t>(g.num_topk);
  for (std::size_t r = 0; r < outcome.loads.size(); ++r) {
    const Workload& load = outcome.loads[r];
    for (std::size_t t = 0; t < static_cast<std::size_t>(load.num_tokens); ++t, ++token) {
      compare_row(reference.row(&load.x[t * hidden], &load.topk_idx[t * topk],
                                &load.topk_weights[t * topk], g.num_topk),
                  &outcome.y[r][t * hidden], token, report);
    }
  }
  return report;
}

/// The code and text of rank r's failure.
struct Failure {
  ErrorCode code;
  std::string text;
};
inline std::optional<Failure> failure_of(const LayerOutcome& outcome, int rank) {
  const auto& failure = outcome.failures[static_cast<std::size_t>(rank)];
  if (!failure) return std::nullopt;
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    return Failure{error.code(), error.what()};
  } catch (const std::exception& error) {
    return Failure{ErrorCode::kInternal, error.what()};
  }
}

}  // namespace sluice::testing
