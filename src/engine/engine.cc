// The layer: exchange, experts, exchange. All buffers are made by create(); forward() only queues
// work.
#include "sluice/engine.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>

#include "backend/traits.h"
#include "core/fail.h"
#include "core/row_digest.h"
#include "engine/experts_impl.h"
#include "exchange/agreement.h"
#include "sluice/checkpoint.h"
#include "sluice/config.h"
#include "sluice/quant.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;

double microseconds_since(Clock::time_point& start) {
  const Clock::time_point now = Clock::now();
  const double us = std::chrono::duration<double, std::micro>(now - start).count();
  start = now;
  return us;
}

/// One mode of the engine: its recipe and its exchange.
struct Lane {
  LayerRecipe recipe;
  Exchange exchange;
};

}  // namespace

struct Engine::Impl {
  BackendOps* backend = nullptr;
  int rank = 0, experts_per_rank = 0;
  ModelGeometry geometry;
  std::unique_ptr<Experts::Impl> experts;    // With scratch for the larger of the two modes.
  std::array<std::optional<Lane>, 2> lanes;  // By Mode.

  std::unique_ptr<DeviceBuffer> expert_y;  // [max_rows, hidden] bf16

  bool records_stats = false, records_digest = false;
  ForwardStats stats;
  std::uint64_t digest = 0;

  [[nodiscard]] Lane& lane(Mode mode);
  void record_rows(const ExpertBatch& batch, Stream stream);
  void record_digest(const RowRanges& rows, const Fp8RowsView& in, Stream stream);
  [[nodiscard]] double stage_us(Clock::time_point& start, Stream stream);
};

namespace {

void check_geometry(const EngineConfig& config, const ModelGeometry& geometry, int num_ranks) {
  check_argument(config.low_latency || config.normal,
                 "the engine has a recipe for neither mode: set low_latency, normal or both");
  check_argument(num_ranks > 0 && geometry.num_experts % num_ranks == 0,
                 "{} experts are not divisible by {} ranks", geometry.num_experts, num_ranks);
  check_argument(config.max_tokens_per_rank > 0, "max_tokens_per_rank {} is not positive",
                 config.max_tokens_per_rank);
}

void check_config(const EngineConfig& config, const Checkpoint& checkpoint, int num_ranks) {
  check_argument(std::ranges::binary_search(checkpoint.moe_layers(), config.layer),
                 "layer {} of {} holds no routed experts", config.layer,
                 checkpoint.path().string());
  check_geometry(config, checkpoint.geometry(), num_ranks);
}

/// forward() has one dispatch in flight, so one buffer slot would do. On the CPU a second slot lets
/// a rank dispatch before the slowest rank has released the first. On CUDA a second slot would save
/// no wait, since combine has already waited for every rank's `returned` flag, and it would cost as
/// much device memory as the first.
ExchangeConfig exchange_config(const EngineConfig& config, const ModelGeometry& geometry,
                               const LayerRecipe& recipe, Device::Kind device) {
  return {.mode = recipe.mode,
          .wire = recipe.wire,
          .num_experts = geometry.num_experts,
          .num_topk = geometry.num_topk,
          .hidden = geometry.hidden,
          .max_tokens_per_rank = config.max_tokens_per_rank,
          .max_m = recipe.mode == Mode::kLowLatency ? config.max_m : 0,
          .routed_scaling_factor = config.routed_scaling_factor,
          .num_in_flight = traits_of(device).engine_slots,
          .peer_timeout = config.peer_timeout};
}

/// Everything in which ranks must not differ, as named text. The exchange checks its own part.
Agreement engine_agreement(const EngineConfig& config, const Checkpoint& checkpoint,
                           const std::array<std::optional<LayerRecipe>, 2>& recipes) {
  Agreement fields;
  fields.emplace_back("version", version());
  fields.emplace_back("layer", std::to_string(config.layer));
  const ModelGeometry& geometry = checkpoint.geometry();
  fields.emplace_back(
      "weight format",
      fmt::format("{}, groups of {}", to_string(geometry.weight_format), geometry.group_size));
  fields.emplace_back("activation", to_string(geometry.activation));
  fields.emplace_back("checkpoint identity", fmt::format("{:016x}", checkpoint.identity()));
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    const auto& recipe = recipes[static_cast<std::size_t>(mode)];
    fields.emplace_back(
        fmt::format("{} recipe", to_string(mode)),
        recipe ? fmt::format("{}, s1 {:a}, s2 {:a}", recipe->describe(), recipe->s1, recipe->s2)
               : "none");
  }
  return fields;
}

std::size_t expert_y_bytes(const ModelGeometry& geometry, std::int64_t max_rows,
                           Device::Kind device) {
  if (traits_of(device).exchange_keeps_expert_y) return 0;
  return static_cast<std::size_t>(max_rows) * static_cast<std::size_t>(geometry.hidden) *
         sizeof(std::uint16_t);
}

}  // namespace

Engine Engine::create(const EngineConfig& config, const Checkpoint& checkpoint,
                      Transport& transport, Backend& backend) {
  check_config(config, checkpoint, transport.num_ranks());
  auto impl = std::make_unique<Impl>();
  impl->backend = &ops(backend);
  impl->rank = transport.rank();
  impl->geometry = checkpoint.geometry();

  const std::optional<StaticScales> scales = checkpoint.static_scales(config.layer);
  const std::string layer_name = fmt::format("model.layers.{}.mlp.experts", config.layer);
  std::array<std::optional<LayerRecipe>, 2> recipes;
  for (const auto& [mode, name] : {std::pair{Mode::kLowLatency, config.low_latency},
                                   std::pair{Mode::kNormal, config.normal}}) {
    if (!name) continue;
    recipes[static_cast<std::size_t>(mode)] =
        resolve_recipe(*name, mode, config.dispatch_dtype, scales, layer_name);
  }
  require_agreement(transport, engine_agreement(config, checkpoint, recipes), config.peer_timeout);

  std::int64_t max_rows = 0;
  for (std::size_t i = 0; i < recipes.size(); ++i) {
    if (!recipes[i]) continue;
    impl->lanes[i].emplace(*recipes[i],
                           Exchange::create(exchange_config(config, impl->geometry, *recipes[i],
                                                            backend.device().kind),
                                            transport, backend));
    max_rows = std::max(max_rows, impl->lanes[i]->exchange.max_rows());
  }
  const int num_local = impl->geometry.num_experts / transport.num_ranks();
  impl->experts_per_rank = num_local;
  impl->experts = std::make_unique<Experts::Impl>(
      checkpoint.load_experts(config.layer, transport.rank() * num_local, num_local), max_rows,
      backend);
  impl->expert_y =
      backend.allocate(expert_y_bytes(impl->geometry, max_rows, backend.device().kind));
  // Allocating waits for the device. If rank A's kernel already waited for rank B while B still
  // allocated, neither would end. So all ranks meet here before any of them can start a kernel.
  (void)transport.all_gather({}, config.peer_timeout);
  return Engine(std::move(impl));
}

EngineMemory Engine::plan_memory(const EngineConfig& config, const ModelGeometry& geometry,
                                 DType scale_dtype, Device::Kind device, int num_ranks) {
  check_geometry(config, geometry, num_ranks);
  const int num_local = geometry.num_experts / num_ranks;
  EngineMemory memory;
  const std::size_t weights = static_cast<std::size_t>(num_local) * 3u *
                              static_cast<std::size_t>(geometry.hidden) *
                              static_cast<std::size_t>(geometry.intermediate);
  memory.codes_bytes = code_bytes(geometry.weight_format, weights);
  memory.scales_bytes =
      weights / static_cast<std::size_t>(geometry.group_size) * size_bytes(scale_dtype);
  memory.prepared_bytes = traits_of(device).prepared_bytes(geometry, num_local, scale_dtype);
  std::int64_t max_rows = 0;
  for (const auto& [mode, name] : {std::pair{Mode::kLowLatency, config.low_latency},
                                   std::pair{Mode::kNormal, config.normal}}) {
    if (!name) continue;
    // Sizes do not depend on the values of static scales.
    const LayerRecipe recipe =
        resolve_recipe(*name, mode, config.dispatch_dtype, StaticScales{1, 1}, "the layer");
    const ExchangeConfig exchange = exchange_config(config, geometry, recipe, device);
    memory.exchange_bytes += Exchange::workspace_bytes(exchange, num_ranks, device);
    max_rows = std::max(max_rows, Exchange::max_rows(exchange, num_ranks));
  }
  memory.scratch_bytes = expert_y_bytes(geometry, max_rows, device);
  for (const std::size_t bytes : Experts::Impl::scratch_bytes(geometry, max_rows)) {
    memory.scratch_bytes += bytes;
  }
  return memory;
}

Lane& Engine::Impl::lane(Mode mode) {
  auto& lane = lanes[static_cast<std::size_t>(mode)];
  check_argument(lane.has_value(), "this engine was made without a recipe for {} mode",
                 to_string(mode));
  return *lane;
}

double Engine::Impl::stage_us(Clock::time_point& start, Stream stream) {
  if (!records_stats) return 0;
  backend->synchronize(stream);
  return microseconds_since(start);
}

void Engine::forward(Mode mode, TensorView x, const Routing& routing, MutableTensorView y,
                     Stream stream) {
  Impl& self = *impl_;
  Lane& lane = self.lane(mode);
  ForwardStats& stats = self.stats = {};
  const Clock::time_point begin = Clock::now();
  Clock::time_point mark = begin;

  Dispatched dispatched =
      lane.exchange.dispatch(x, routing, stream, lane.recipe.wire_static_scale());
  const ExpertBatch& batch = dispatched.batch();
  stats.times.dispatch_us = self.stage_us(mark, stream);

  const RowRanges rows = row_ranges(batch);
  const Fp8RowsView in = self.experts->gemm1_rows(lane.recipe, batch, rows, stream);
  stats.times.quantize_us = self.stage_us(mark, stream);
  if (self.records_digest) self.record_digest(rows, in, stream);

  // Where the exchange has memory of its own for the experts' rows, combine need not copy them.
  MutableTensorView expert_y = dispatched.expert_y();
  if (expert_y.empty()) {
    expert_y.data = self.expert_y->data(), expert_y.dtype = DType::kBFloat16;
    expert_y.shape = batch.x.shape, expert_y.device = self.backend->device();
  }
  ExpertStageTimes split;
  mark = Clock::now();
  self.experts->gemms(lane.recipe, in, rows, expert_y.as<std::uint16_t>(), stream, &split);
  const double stage_us = self.stage_us(mark, stream);
  const double split_us = split.gemm1_us + split.activation_us + split.gemm2_us;
  const double share = split_us > 0 ? stage_us / split_us : 0;
  stats.times.gemm1_us = split_us > 0 ? split.gemm1_us * share : stage_us;
  stats.times.activation_us = split.activation_us * share;
  stats.times.gemm2_us = split.gemm2_us * share;

  if (self.records_stats) self.record_rows(batch, stream);
  mark = Clock::now();
  lane.exchange.combine(std::move(dispatched), expert_y, y, stream);
  stats.times.combine_us = self.stage_us(mark, stream);
  stats.times.total_us = std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

void Engine::Impl::record_rows(const ExpertBatch& batch, Stream stream) {
  const auto num_local = static_cast<std::size_t>(experts_per_rank);
  std::vector<std::int32_t> rows(num_local);
  backend->copy_to_host(rows.data(), batch.num_rows.data, num_local * sizeof(std::int32_t), stream);
  stats.rows_per_expert.assign(rows.begin(), rows.end());
  std::int64_t total = 0, active = 0;
  for (const std::int32_t n : rows) total += n, active += n > 0;
  stats.weight_bytes_read =
      experts->prepared->bytes() / num_local * static_cast<std::size_t>(active);
  stats.flops = static_cast<std::uint64_t>(total) * 6u *
                static_cast<std::uint64_t>(geometry.hidden) *
                static_cast<std::uint64_t>(geometry.intermediate);
}

/// Sums one hash per row, so that the total over ranks does not depend on how experts are spread.
void Engine::Impl::record_digest(const RowRanges& rows, const Fp8RowsView& in, Stream stream) {
  const auto num_local = static_cast<std::size_t>(rows.num_experts);
  std::vector<std::int64_t> begin(num_local);
  std::vector<std::int32_t> count(num_local);
  RowRanges on_host = rows;
  if (rows.begin != nullptr) {
    backend->copy_to_host(begin.data(), rows.begin, num_local * sizeof(begin[0]), stream);
    on_host.begin = begin.data();
  }
  backend->copy_to_host(count.data(), rows.count, num_local * sizeof(count[0]), stream);
  on_host.count = count.data();
  const auto width = static_cast<std::size_t>(in.width);
  std::vector<std::uint8_t> codes(width);
  std::vector<float> scales(in.scale ? width / kActivationGroup : 0);
  digest = 0;
  for (int e = 0; e < rows.num_experts; ++e) {
    const std::uint64_t expert =
        static_cast<std::uint64_t>(rank) * num_local + static_cast<std::uint64_t>(e);
    for (std::int64_t r = 0; r < on_host.num_rows(e); ++r) {
      const auto source = static_cast<std::size_t>(on_host.first_row(e) + r);
      backend->copy_to_host(codes.data(), in.codes + source * width, width, stream);
      if (in.scale) {
        backend->copy_to_host(scales.data(), in.scale + source * scales.size(),
                              scales.size() * sizeof(float), stream);
      }
      digest += row_digest(expert, static_cast<std::uint64_t>(r), codes, scales);
    }
  }
}

const LayerRecipe& Engine::recipe(Mode mode) const {
  return impl_->lane(mode).recipe;
}
const ForwardStats& Engine::stats() const noexcept {
  return impl_->stats;
}
ExchangeCounters Engine::exchange_counters(Mode mode) const {
  return impl_->lane(mode).exchange.counters();
}
std::size_t Engine::weight_bytes() const noexcept {
  return impl_->experts->prepared->bytes();
}
EngineMemory Engine::memory() const noexcept {
  const Experts::Impl& experts = *impl_->experts;
  EngineMemory memory = {.codes_bytes = experts.codes_bytes,
                         .scales_bytes = experts.scales_bytes,
                         .prepared_bytes = experts.prepared->bytes()};
  for (const auto& lane : impl_->lanes) {
    if (lane) memory.exchange_bytes += lane->exchange.held_bytes();
  }
  memory.scratch_bytes = impl_->expert_y->bytes();
  for (const auto* buffer :
       {&experts.x_codes, &experts.x_scale, &experts.h_codes, &experts.h_scale}) {
    memory.scratch_bytes += (*buffer)->bytes();
  }
  return memory;
}
void Engine::check() {
  for (auto& lane : impl_->lanes) {
    if (lane) lane->exchange.check();
  }
}
void Engine::record_stats(bool on) noexcept {
  impl_->records_stats = on;
}
void Engine::record_gemm_input_digest(bool on) noexcept {
  impl_->records_digest = on;
}
std::uint64_t Engine::gemm_input_digest() const noexcept {
  return impl_->digest;
}

Engine::Engine(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

}  // namespace sluice
