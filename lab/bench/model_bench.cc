// All layers of a model in one graph: through an exchange of one rank, locally, and the expert
// stages alone.
#include "sluice/lab/model_bench.h"

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend/ops.h"
#include "bench/random_experts.h"
#include "core/fail.h"
#include "sluice/experts.h"
#include "sluice/lab/median.h"
#include "sluice/lab/ranks.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/workload.h"
#include "sluice/local_experts.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

constexpr std::array<std::int64_t, 2> kCheckedTokens{0, -1};  // The first and the last.

template <class T>
std::unique_ptr<DeviceBuffer> upload(BackendOps& backend, const std::vector<T>& values) {
  auto buffer = backend.allocate(values.size() * sizeof(T));
  backend.copy_from_host(buffer->data(), values.data(), values.size() * sizeof(T),
                         backend.stream());
  return buffer;
}

MutableTensorView view(const std::unique_ptr<DeviceBuffer>& buffer, DType dtype, Shape shape,
                       Device device) {
  MutableTensorView v;
  v.data = buffer->data(), v.dtype = dtype, v.shape = shape, v.device = device;
  return v;
}

/// One batch of tokens on the device, and the rows that the expert stage has of it.
class Batch {
 public:
  Batch(const ModelBenchConfig& config, int num_tokens, BackendOps& backend)
      : backend_(backend), geometry_(config.geometry) {
    load_ = make_workload({.num_experts = geometry_.num_experts,
                           .num_topk = geometry_.num_topk,
                           .hidden = geometry_.hidden,
                           .input = InputKind::kGaussian,
                           .seed = config.seed},
                          0, num_tokens);
    x_ = upload(backend, load_.x);
    idx_ = upload(backend, load_.topk_idx);
    weights_ = upload(backend, load_.topk_weights);
    y_ = backend.allocate(load_.x.size() * sizeof(std::uint16_t));
    arrange_rows();
  }

  [[nodiscard]] const Workload& load() const { return load_; }
  [[nodiscard]] std::int64_t num_rows() const {
    return load_.num_tokens * std::int64_t{geometry_.num_topk};
  }
  [[nodiscard]] TensorView x() const {
    return {x_->data(), DType::kBFloat16, tokens_shape(), backend_.device()};
  }
  [[nodiscard]] Routing routing() const {
    const Shape entries{load_.num_tokens, geometry_.num_topk};
    return {.topk_idx = {idx_->data(), DType::kInt32, entries, backend_.device()},
            .topk_weights = {weights_->data(), DType::kFloat32, entries, backend_.device()}};
  }
  [[nodiscard]] MutableTensorView y() const {
    return view(y_, DType::kBFloat16, tokens_shape(), backend_.device());
  }
  /// After everything that is queued; the output is filled with a NaN again.
  std::vector<std::uint16_t> take() {
    const Stream stream = backend_.stream();
    std::vector<std::uint16_t> bits(load_.x.size());
    backend_.copy_to_host(bits.data(), y_->data(), bits.size() * sizeof(bits[0]), stream);
    const std::vector<std::uint16_t> poison(bits.size(), 0x7fc1);
    backend_.copy_from_host(y_->data(), poison.data(), poison.size() * sizeof(poison[0]), stream);
    return bits;
  }
  void stage(Experts& experts, const LayerRecipe& recipe) const {
    experts.forward(
        recipe, rows_,
        view(rows_y_, DType::kBFloat16, {num_rows(), geometry_.hidden}, backend_.device()),
        backend_.stream());
  }

 private:
  [[nodiscard]] Shape tokens_shape() const { return {load_.num_tokens, geometry_.hidden}; }

  /// Expert after expert, each expert's in order of tokens; quantized as the recipe has them.
  void arrange_rows() {
    const auto hidden = static_cast<std::size_t>(geometry_.hidden);
    const auto topk = static_cast<std::size_t>(geometry_.num_topk);
    std::vector<std::size_t> entries(load_.topk_idx.size());
    std::iota(entries.begin(), entries.end(), std::size_t{0});
    std::ranges::stable_sort(entries, {}, [&](std::size_t i) { return load_.topk_idx[i]; });
    std::vector<std::uint16_t> x(entries.size() * hidden);
    std::vector<std::int32_t> count(static_cast<std::size_t>(geometry_.num_experts), 0);
    for (std::size_t row = 0; row < entries.size(); ++row) {
      std::copy_n(&load_.x[entries[row] / topk * hidden], hidden, &x[row * hidden]);
      ++count[static_cast<std::size_t>(load_.topk_idx[entries[row]])];
    }
    std::vector<std::int64_t> begin(count.size());
    std::exclusive_scan(count.begin(), count.end(), begin.begin(), std::int64_t{0});
    const auto bf16 = upload(backend_, x);
    codes_ = backend_.allocate(x.size());
    scale_ = backend_.allocate(x.size() / kActivationGroup * sizeof(float));
    count_ = upload(backend_, count), begin_ = upload(backend_, begin);
    rows_y_ = backend_.allocate(x.size() * sizeof(std::uint16_t));
    const Device device = backend_.device();
    const Shape shape{num_rows(), geometry_.hidden};
    const Shape groups{num_rows(), geometry_.hidden / kActivationGroup};
    ExpertBatch unquantized;
    unquantized.layout = Mode::kNormal;
    unquantized.x = {bf16->data(), DType::kBFloat16, shape, device};
    E4m3Rows quantized;
    quantized.codes = view(codes_, DType::kFloat8E4M3, shape, device);
    quantized.scale = view(scale_, DType::kFloat32, groups, device);
    quantize(backend_, unquantized, quantized, backend_.stream());
    backend_.synchronize(backend_.stream());
    const Shape experts{geometry_.num_experts};
    rows_ = {.layout = Mode::kNormal,
             .x = {codes_->data(), DType::kFloat8E4M3, shape, device},
             .x_scale = {scale_->data(), DType::kFloat32, groups, device},
             .num_rows = {count_->data(), DType::kInt32, experts, device},
             .row_begin = {begin_->data(), DType::kInt64, experts, device},
             .expected_m = std::max(1, static_cast<int>(num_rows() / geometry_.num_experts))};
  }

  BackendOps& backend_;
  ModelGeometry geometry_;
  Workload load_;
  std::unique_ptr<DeviceBuffer> x_, idx_, weights_, y_, codes_, scale_, count_, begin_, rows_y_;
  ExpertBatch rows_;
};

/// The same layers three times: their experts through an exchange, locally, and alone.
class Model {
 public:
  Model(const ModelBenchConfig& config, BackendOps& backend)
      : backend_(backend),
        transport_(std::move(make_inproc_transports(1).front())),
        config_{.geometry = config.geometry,
                .low_latency = {.max_tokens_per_rank = std::ranges::max(config.num_tokens)}},
        group_(LayerGroup::create(config_, *transport_, backend)),
        local_group_(LocalGroup::create(
            {.hidden = config.geometry.hidden,
             .intermediate = config.geometry.intermediate,
             .max_entries =
                 std::int64_t{std::ranges::max(config.num_tokens)} * config.geometry.num_topk},
            backend)) {}

  void add(const ExpertWeights& weights, DType scale_dtype) {
    const std::int64_t max_rows = local_group_.config().max_entries;
    layers_.push_back(
        group_.add_layer({.name = "layer " + std::to_string(layers_.size()), .weights = weights}));
    experts_.push_back(Experts::create(weights, max_rows, backend_));
    local_.push_back(local_group_.add_layer(experts_.back(), recipe()));
    planned_.push_back({.weight_format = weights.geometry.weight_format,
                        .scale_dtype = scale_dtype,
                        .group_size = weights.geometry.group_size});
  }

  [[nodiscard]] std::size_t size() const { return layers_.size(); }
  [[nodiscard]] LayerRecipe recipe() const {
    return resolve_recipe({}, Mode::kNormal, DispatchDtype::kAuto, std::nullopt, "bench model");
  }
  void through_exchange(std::size_t layer, const Batch& b) {
    layers_[layer].forward(Mode::kLowLatency, b.x(), b.routing(), b.y(), backend_.stream());
  }
  void locally(std::size_t layer, const Batch& b) {
    local_[layer].forward(b.x(), b.routing(), b.y(), backend_.stream());
  }
  void alone(std::size_t layer, const Batch& b) { b.stage(experts_[layer], recipe()); }

  /// Throws: kInternal if it is not what was planned.
  [[nodiscard]] LayerGroupMemory memory() {
    group_.check();
    const LayerGroupMemory taken = group_.memory();
    const LayerGroupMemory plan =
        LayerGroup::plan_memory(config_, planned_, backend_.device().kind, 1);
    if (taken.total_bytes() != plan.total_bytes()) {
      fail(ErrorCode::kInternal, "{} layers take {} bytes, the plan says {}", layers_.size(),
           taken.total_bytes(), plan.total_bytes());
    }
    return taken;
  }

 private:
  BackendOps& backend_;
  std::unique_ptr<Transport> transport_;
  LayerGroupConfig config_;
  LayerGroup group_;
  LocalGroup local_group_;
  std::vector<Layer> layers_;
  std::vector<LocalExperts> local_;
  std::vector<Experts> experts_;
  std::vector<PlannedLayer> planned_;
};

/// What layer `layer` gives both ways, which is the same.
std::vector<std::uint16_t> both_ways(Model& model, std::size_t layer, Batch& batch) {
  model.through_exchange(layer, batch);
  std::vector<std::uint16_t> y = batch.take();
  model.locally(layer, batch);
  if (batch.take() == y) return y;
  fail(ErrorCode::kInternal,
       "layer {}, {} tokens: the local call gives other bits; nothing is timed", layer,
       batch.load().num_tokens);
}

/// Some tokens near float64. Returns the largest error by its bound.
double check_rows(std::size_t layer, const Workload& load, const std::vector<std::uint16_t>& y,
                  const LayerReference& reference) {
  const auto hidden = static_cast<std::size_t>(load.hidden);
  const auto topk = static_cast<std::size_t>(load.num_topk);
  std::array<VerifyReport, kCheckedTokens.size()> reports;
  on_every_rank(static_cast<int>(reports.size()), [&](int i) {
    const std::int64_t from_either_end = kCheckedTokens[static_cast<std::size_t>(i)];
    const auto t = static_cast<std::size_t>(from_either_end < 0 ? load.num_tokens + from_either_end
                                                                : from_either_end);
    compare_row(reference.row(&load.x[t * hidden], &load.topk_idx[t * topk],
                              &load.topk_weights[t * topk], load.num_topk),
                &y[t * hidden], static_cast<std::int64_t>(t), reports[static_cast<std::size_t>(i)]);
  });
  double worst = 0;
  for (const VerifyReport& report : reports) {
    worst = std::max(worst, report.worst_ratio);
    if (report.passed()) continue;
    fail(ErrorCode::kInternal,
         "layer {}, token {}, element {}: {} where float64 has {} +- {}; nothing is timed", layer,
         report.worst_token, report.worst_element, report.worst_actual, report.worst_expected,
         report.worst_bound);
  }
  return worst;
}

/// Layer `layer` with every batch, both ways. The tokens of a batch are the first ones of every
/// larger batch, and a token's bits do not depend on the others: so float64, which takes a second
/// for a token of R1, is for the largest batch alone. Returns the largest error by its bound.
double check_layer(Model& model, std::size_t layer, std::vector<Batch>& batches,
                   const LayerReference& reference) {
  const auto largest = std::ranges::max_element(
      batches, {}, [](const Batch& batch) { return batch.load().num_tokens; });
  const std::vector<std::uint16_t> y = both_ways(model, layer, *largest);
  for (Batch& batch : batches) {
    const std::vector<std::uint16_t> first = both_ways(model, layer, batch);
    if (std::equal(first.begin(), first.end(), y.begin())) continue;
    fail(ErrorCode::kInternal,
         "layer {}: of {} tokens some have other bits than among {}; nothing is timed", layer,
         batch.load().num_tokens, largest->load().num_tokens);
  }
  return check_rows(layer, largest->load(), y, reference);
}

/// A pass over all layers in one way and with one batch.
struct Pass {
  void (Model::*call)(std::size_t, const Batch&);
  std::vector<std::uint16_t> y = {};  ///< What the last layer gave when they were called.
  std::unique_ptr<Recording> recording = {};
  std::vector<double> us = {};

  void record(Model& model, Batch& batch, BackendOps& backend) {
    const auto all = [&model, &batch, call = call] {
      for (std::size_t i = 0; i < model.size(); ++i) (model.*call)(i, batch);
    };
    all();  // A kernel's first launch loads it, which cannot be recorded.
    y = batch.take();
    recording = backend.record(backend.stream(), [all](const std::function<void()>& mark) {
      mark();
      all();
      mark();
    });
  }
  void replay(Batch& batch) {
    recording->replay();
    us.push_back(recording->marks_us().front());
    if (batch.take() != y) {
      fail(ErrorCode::kInternal, "{} tokens: a replay gives other bits than a call",
           batch.load().num_tokens);
    }
  }
};

void check_config(const ModelBenchConfig& config) {
  check_argument(config.num_layers >= 1, "{} layers; at least one", config.num_layers);
  check_argument(config.repeats >= 1, "{} repeats; at least one", config.repeats);
  check_argument(!config.num_tokens.empty(), "no number of tokens to bench");
  for (const int tokens : config.num_tokens) {
    check_argument(tokens >= 1, "{} tokens; at least one", tokens);
  }
}

}  // namespace

ModelBenchReport bench_model(const ModelBenchConfig& config, Backend& backend_in,
                             const std::function<void(double)>& on_progress) {
  check_config(config);
  BackendOps& backend = ops(backend_in);
  ModelBenchReport report{.device = backend.description(), .memory = {}};
  std::vector<Batch> batches;
  batches.reserve(config.num_tokens.size());
  for (const int tokens : config.num_tokens) batches.emplace_back(config, tokens, backend);
  Model model(config, backend);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const ExpertWeights weights =
        random_experts(config.geometry, config.scale_dtype,
                       config.seed + static_cast<std::uint64_t>(layer), CodeRange::kSymmetric);
    model.add(weights, config.scale_dtype);
    const LayerReference reference(weights, model.recipe(), 1.0f,
                                   error_model(backend.device().kind));
    report.worst_error_ratio =
        std::max(report.worst_error_ratio,
                 check_layer(model, static_cast<std::size_t>(layer), batches, reference));
    if (on_progress) on_progress((layer + 1.0) / (config.num_layers + 1.0));
  }
  report.memory = model.memory();

  std::vector<std::array<Pass, 3>> passes;
  for (Batch& batch : batches) {
    passes.push_back({Pass{&Model::through_exchange}, Pass{&Model::locally}, Pass{&Model::alone}});
    for (Pass& pass : passes.back()) pass.record(model, batch, backend);
  }
  for (int i = 0; i <= config.repeats; ++i) {
    for (std::size_t b = 0; b < batches.size(); ++b) {
      for (Pass& pass : passes[b]) pass.replay(batches[b]);
    }
    if (i > 0) continue;  // The first replay is for warmth.
    for (auto& of_batch : passes) {
      for (Pass& pass : of_batch) pass.us.clear();
    }
  }
  for (std::size_t b = 0; b < batches.size(); ++b) {
    auto& [exchange, local, stages] = passes[b];
    report.cases.push_back({.num_tokens = config.num_tokens[b],
                            .exchange_us = median(exchange.us),
                            .local_us = median(local.us),
                            .stages_us = median(stages.us)});
  }
  (void)model.memory();  // As before the graphs.
  if (on_progress) on_progress(1);
  return report;
}

}  // namespace sluice
