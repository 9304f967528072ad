// The expert stage alone: rows of one rank's experts, no exchange.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <limits>
#include <optional>
#include <thread>

#include "backend/ops.h"
#include "bench/device_rows.h"
#include "bench/local_calls.h"
#include "bench/random_experts.h"
#include "core/fail.h"
#include "sluice/lab/experts_bench.h"
#include "sluice/lab/reference.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

// CUDA: launches recorded together last about this long, so that starting a replay is hidden, and
// rotate through copies of the weights that the L2 cannot hold.
constexpr double kReplayUs = 600;
constexpr std::size_t kRotatedBytes = std::size_t{256} << 20;

/// Rows per expert: `mean` * num_experts in all.
std::vector<std::int32_t> spread_rows(RoutingKind routing, int num_experts, int mean) {
  std::vector<std::int32_t> rows(static_cast<std::size_t>(num_experts), mean);
  const std::int64_t total = std::int64_t{mean} * num_experts;
  if (routing == RoutingKind::kOneExpert) {
    std::fill(rows.begin(), rows.end(), 0);
    rows[0] = static_cast<std::int32_t>(total);
  } else if (routing == RoutingKind::kZipf) {
    double harmonic = 0;
    for (int e = 1; e <= num_experts; ++e) harmonic += 1.0 / e;
    std::int64_t left = total;
    for (int e = num_experts; e >= 1; --e) {
      const auto share = static_cast<std::int64_t>(static_cast<double>(total) / (harmonic * e));
      rows[static_cast<std::size_t>(e - 1)] = static_cast<std::int32_t>(e == 1 ? left : share);
      left -= share;
    }
  }
  return rows;
}

/// The first `num_experts` experts; shares the storage.
ExpertWeights first_experts(const ExpertWeights& all, int num_experts) {
  ExpertWeights out = all;
  out.geometry.num_experts = num_experts;
  out.experts.resize(static_cast<std::size_t>(num_experts));
  return out;
}

/// Of all threads of this process so far.
double cpu_time_us() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e6 + static_cast<double>(t.tv_nsec) * 1e-3;
}

using WeightSets = std::vector<std::unique_ptr<PreparedExperts>>;

/// What an operation moves and multiplies at least.
struct Work {
  double bytes = 0, flops = 0;
  Work operator+(const Work& o) const { return {bytes + o.bytes, flops + o.flops}; }
};

class CaseBench {
 public:
  CaseBench(const ExpertsBenchConfig& config, const ExpertsBenchReport& ceilings,
            const Recipe& recipe, BackendOps& backend, DeviceRows& rows, const WeightSets& weights,
            LocalCalls& local)
      : config_(config),
        recipe_(recipe),
        ceilings_(ceilings),
        backend_(backend),
        rows_(rows),
        weights_(weights),
        local_(local),
        on_device_(backend.device().kind != Device::Kind::kHost) {}

  [[nodiscard]] std::vector<ExpertsBenchKernel> run() {
    const ModelGeometry& g = config_.geometry;
    const double rows = static_cast<double>(rows_.total_rows());
    const double used = static_cast<double>(weights_.front()->bytes()) *
                        static_cast<double>(rows_.active_experts()) /
                        static_cast<double>(num_experts());
    const double coded = 1 + 4.0 / kActivationGroup;  // e4m3 and its share of a scale.
    const double product = rows * g.hidden * g.intermediate;
    const Work gate_up{used * 2 / 3 + rows * coded * (g.hidden + g.intermediate), 4 * product};
    const Work down{used / 3 + rows * (coded * g.intermediate + 2 * g.hidden), 2 * product};

    ExpertStageTimes times;
    std::vector<ExpertsBenchKernel> out;
    out.push_back(time("stage", gate_up + down, true,
                       [&](std::size_t set) { rows_.run(*weights_[set], &times); }));
    if (config_.stage_only) return out;
    if (rows_.run_half(ExpertHalf::kGateUp, *weights_.front())) {
      for (const bool first : {true, false}) {
        out.push_back(
            time(first ? "gate_up" : "down", first ? gate_up : down, true, [&](std::size_t set) {
              (void)rows_.run_half(first ? ExpertHalf::kGateUp : ExpertHalf::kDown, *weights_[set]);
            }));
      }
    } else {
      out.push_back(rate("gate_up", gate_up, {times.gemm1_us}));
      out.push_back(rate("activation", {}, {times.activation_us}));
      out.push_back(rate("down", down, {times.gemm2_us}));
    }
    out.push_back(time("quantize", {rows * g.hidden * (2 + coded), 0}, false,
                       [&](std::size_t) { rows_.quantize(); }));
    if (recipe_ != Recipe{}) return out;
    out.push_back(time("requantize", {rows * g.hidden * (coded + 1), 0}, false,
                       [&](std::size_t) { rows_.requantize(); }));
    // Beside the stage: x once, each row's codes and output written and read, y once.
    const Work moved{rows * g.hidden * (coded + 2) + 4.0 * g.hidden * local_tokens(), 0};
    out.push_back(
        time("local", gate_up + down + moved, true, [&](std::size_t set) { local_.forward(set); }));
    if (!on_device_) return out;
    std::vector<double> host_us;
    for (int i = 0; i < config_.repeats; ++i) host_us.push_back(local_.host_us());
    out.push_back(rate("local_host", {}, std::move(host_us)));
    return out;
  }

 private:
  [[nodiscard]] int num_experts() const { return config_.geometry.num_experts; }
  [[nodiscard]] double local_tokens() const { return static_cast<double>(local_.num_tokens()); }

  [[nodiscard]] static ExpertsBenchKernel rate(const char* name, const Work& work,
                                               std::vector<double> us) {
    std::sort(us.begin(), us.end());
    ExpertsBenchKernel k{
        .name = name, .median_us = us[us.size() / 2], .min_us = us.front(), .max_us = us.back()};
    if (k.median_us > 0) {
      k.gbytes_per_s = work.bytes / k.median_us * 1e-3, k.tflops = work.flops / k.median_us * 1e-6;
    }
    return k;
  }

  /// call(set) with each set of weights in turn.
  template <class Call>
  ExpertsBenchKernel time(const char* name, const Work& work, bool rests, const Call& call) {
    int calls = 1;
    if (on_device_) {
      if (rests) {
        std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(config_.rest_ms));
      }
      const double floor_us = std::max(work.bytes / ceilings_.read_gbytes_per_s * 1e-3,
                                       work.flops / ceilings_.peak_tflops * 1e-6);
      calls = static_cast<int>(std::clamp(std::ceil(kReplayUs / floor_us), 2.0, 64.0));
    }
    const auto queue = [&] {
      for (int i = 0; i < calls; ++i) call(static_cast<std::size_t>(i) % weights_.size());
    };
    const Stream stream = backend_.stream();
    queue();  // A kernel's first launch loads it, which cannot be recorded.
    backend_.synchronize(stream);
    const auto recording = backend_.record(stream, [&](const std::function<void()>& mark) {
      mark();
      queue();
      mark();
    });
    std::vector<double> us;
    double cpu_us = std::numeric_limits<double>::infinity();
    for (int i = 0; i <= config_.repeats; ++i) {
      const double start = cpu_time_us();
      recording->replay();
      const double cpu = (cpu_time_us() - start) / calls / backend_.num_host_threads();
      const double one = recording->marks_us().front() / calls;
      if (i == 0) continue;  // The first replay is for warmth.
      us.push_back(one);
      cpu_us = std::min(cpu_us, cpu);
    }
    ExpertsBenchKernel kernel = rate(name, work, std::move(us));
    if (!on_device_) kernel.cpu_us = cpu_us;
    return kernel;
  }

  const ExpertsBenchConfig& config_;
  const Recipe& recipe_;
  const ExpertsBenchReport& ceilings_;
  BackendOps& backend_;
  DeviceRows& rows_;
  const WeightSets& weights_;
  LocalCalls& local_;
  bool on_device_;
};

/// Copies of the same weights, on a GPU enough of them to be gone from its L2 when they come round.
WeightSets prepare_sets(BackendOps& backend, const ExpertWeights& weights) {
  constexpr std::size_t kMostSets = 16;
  WeightSets sets;
  sets.push_back(backend.prepare(weights));
  while (backend.device().kind != Device::Kind::kHost && sets.size() < kMostSets &&
         sets.size() * sets.front()->bytes() < kRotatedBytes) {
    sets.push_back(backend.prepare(weights));
  }
  return sets;
}

void check_config(const ExpertsBenchConfig& config) {
  check_argument(config.repeats >= 1, "{} repeats; at least one", config.repeats);
  check_argument(!config.rows_per_expert.empty() && !config.routing.empty(), "no case to bench");
  for (const int rows : config.rows_per_expert) {
    check_argument(rows >= 1, "{} rows per expert; at least one", rows);
  }
  for (const int experts : config.num_experts) {
    check_argument(experts >= 1, "{} experts; at least one", experts);
  }
  check_argument(!config.recipes.empty(), "no recipe to bench");
  for (const Recipe& recipe : config.recipes) {
    check_argument(recipe == Recipe{} || recipe == parse_recipe("bf16-static") ||
                       recipe == parse_recipe("direct-token"),
                   "recipe {}: the GEMMs of every recipe are those of direct, bf16-static or "
                   "direct-token, bench one of them",
                   to_string(recipe));
  }
  for (const RoutingKind routing : config.routing) {
    check_argument(routing == RoutingKind::kUniform || routing == RoutingKind::kZipf ||
                       routing == RoutingKind::kOneExpert,
                   "routing is none of: uniform, zipf, one-expert");
  }
}

}  // namespace

ExpertsBenchReport bench_experts(const ExpertsBenchConfig& config_in, Backend& backend_in,
                                 const std::function<void(double)>& on_progress) {
  BackendOps& backend = ops(backend_in);
  ExpertsBenchConfig config = config_in;
  if (config.num_experts.empty()) config.num_experts = {config.geometry.num_experts};
  if (config.activations.empty()) config.activations = {config.geometry.activation};
  check_config(config);
  const int max_experts = *std::ranges::max_element(config.num_experts);
  const int max_mean = *std::ranges::max_element(config.rows_per_expert);
  config.geometry.num_experts = max_experts;

  ExpertsBenchReport report{.device = backend.description()};
  ExpertWeights weights =
      random_experts(config.geometry, config.scale_dtype, config.seed,
                     config.has_minus8 ? CodeRange::kAll : CodeRange::kSymmetric);
  const auto reference_of = [&](const Recipe& named, const std::optional<StaticScales>& scales) {
    const LayerRecipe recipe =
        resolve_recipe(named, Mode::kNormal, DispatchDtype::kAuto, scales, "bench experts");
    return LayerReference(weights, recipe, 1.0f, error_model(backend.device().kind));
  };
  report.read_gbytes_per_s = backend.measure_read_bandwidth() * 1e-9;
  for (const ArithmeticRate& rate : backend.measure_arithmetic_rates()) {
    report.arithmetic.push_back({rate.kind, rate.operations_per_s * 1e-12});
    report.peak_tflops = std::max(report.peak_tflops, report.arithmetic.back().tflops);
  }
  DeviceRows rows(backend, config, std::int64_t{max_mean} * max_experts, max_experts);
  const bool any_local =
      !config.stage_only && std::ranges::find(config.recipes, Recipe{}) != config.recipes.end();
  LocalCalls local(backend, config.geometry, any_local ? std::int64_t{max_mean} * max_experts : 1,
                   config.seed);

  const double num_cases = static_cast<double>(
      config.num_experts.size() * config.activations.size() * config.recipes.size() *
      config.routing.size() * config.rows_per_expert.size());
  for (const int num_experts : config.num_experts) {
    config.geometry.num_experts = num_experts;
    for (const ActivationFn& activation : config.activations) {
      weights.geometry.activation = activation;
      const WeightSets sets = prepare_sets(backend, first_experts(weights, num_experts));
      if (any_local) local.use(first_experts(weights, num_experts), sets.size());
      for (const Recipe& recipe : config.recipes) {
        const bool has_local = any_local && recipe == Recipe{};
        for (const RoutingKind routing : config.routing) {
          for (const int mean : config.rows_per_expert) {
            rows.arrange(spread_rows(routing, num_experts, mean), mean);
            ExpertsBenchCase& out =
                report.cases.emplace_back(ExpertsBenchCase{.num_experts = num_experts,
                                                           .activation = activation,
                                                           .recipe = recipe,
                                                           .routing = routing,
                                                           .rows_per_expert = mean,
                                                           .total_rows = rows.total_rows()});
            const auto scales = rows.use_scales(recipe, *sets.front());
            rows.quantize();
            rows.run(*sets.front(), nullptr);
            out.worst_error_ratio = rows.check(reference_of(recipe, scales));
            if (has_local) {
              local.arrange(spread_rows(routing, num_experts, mean));
              out.worst_error_ratio =
                  std::max(out.worst_error_ratio, local.check(reference_of(recipe, scales)));
            }
            out.kernels = CaseBench(config, report, recipe, backend, rows, sets, local).run();
            if (backend.device().kind == Device::Kind::kHost) {  // Others may have read meanwhile.
              report.read_gbytes_per_s =
                  std::max(report.read_gbytes_per_s, backend.measure_read_bandwidth() * 1e-9);
            }
            if (on_progress) on_progress(static_cast<double>(report.cases.size()) / num_cases);
          }
        }
      }
    }
  }
  return report;
}

void check_ceiling(const ExpertsBenchReport& report) {
  constexpr double kMostShare = 1.05;
  for (const ExpertsBenchCase& c : report.cases) {
    for (const ExpertsBenchKernel& k : c.kernels) {
      if (k.tflops <= kMostShare * report.peak_tflops) continue;
      fail(ErrorCode::kInternal,
           "the arithmetic ceiling is wrong: {} of {} experts with {} rows each computes {:.4g} "
           "TFLOPS, {:.0f} % of the {:.4g} TFLOPS measured as the most of {}",
           k.name, c.num_experts, c.rows_per_expert, k.tflops, 100 * k.tflops / report.peak_tflops,
           report.peak_tflops, report.device);
    }
  }
}

}  // namespace sluice
