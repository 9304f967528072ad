// What layers share, and how a layer is made: ranks agree first, and allocate afterwards.
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <exception>

#include "backend/check_experts.h"
#include "backend/traits.h"
#include "core/fail.h"
#include "engine/layer_impl.h"
#include "exchange/agreement.h"
#include "exchange/impl.h"
#include "sluice/config.h"
#include "sluice/layer.h"
#include "sluice/quant.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

constexpr std::array kModes{Mode::kLowLatency, Mode::kNormal};

std::atomic<std::uint64_t> num_groups_made{0};

const ModeCapacity& capacity_of(const LayerGroupConfig& config, Mode mode) {
  return mode == Mode::kLowLatency ? config.low_latency : config.normal;
}

/// Everything in a configuration in which ranks must not differ, as named text.
Agreement group_agreement(const LayerGroupConfig& c) {
  Agreement fields{{"version", version()},
                   {kCall, "creation of a layer group"},
                   {"num_experts", std::to_string(c.geometry.num_experts)},
                   {"num_slots", std::to_string(c.num_slots)},
                   {"num_topk", std::to_string(c.geometry.num_topk)},
                   {"hidden", std::to_string(c.geometry.hidden)},
                   {"intermediate", std::to_string(c.geometry.intermediate)},
                   {"token width", std::to_string(c.geometry.token_width())},
                   {"biases", c.geometry.has_bias ? "yes" : "no"}};
  for (const Mode mode : kModes) {
    const ModeCapacity& capacity = capacity_of(c, mode);
    fields.emplace_back(fmt::format("{} max_tokens_per_rank", to_string(mode)),
                        std::to_string(capacity.max_tokens_per_rank));
    fields.emplace_back(fmt::format("{} max_m", to_string(mode)), std::to_string(capacity.max_m));
  }
  fields.emplace_back("hosts", c.hosts.to_string());
  fields.emplace_back("sum_parts", std::to_string(c.sum_parts));
  fields.emplace_back("routed_scaling_factor", fmt::format("{:a}", c.routed_scaling_factor));
  fields.emplace_back("num_in_flight", std::to_string(c.num_in_flight));
  fields.emplace_back("send_from_experts", c.send_from_experts ? "yes" : "no");
  return fields;
}

/// The same of one layer. An exchange that has to be made compares its own part as well.
Agreement layer_agreement(const std::string& name, const ModelGeometry& geometry,
                          std::uint64_t identity,
                          const std::array<std::optional<LayerRecipe>, 2>& recipes,
                          const Placement& placement) {
  Agreement fields{
      {"version", version()},
      {kCall, "add_layer"},
      {"layer", name},
      {"checkpoint identity (config and headers)", fmt::format("{:016x}", identity)},
      {"weight format",
       fmt::format("{}, groups of {}", to_string(geometry.weight_format), geometry.group_size)},
      {"activation", to_string(geometry.activation)},
      {"placement",
       fmt::format("{} slots, digest {:016x}", placement.num_slots(), placement.digest())}};
  for (const Mode mode : kModes) {
    const auto& recipe = recipes[static_cast<std::size_t>(mode)];
    fields.emplace_back(
        fmt::format("{} recipe", to_string(mode)),
        recipe ? fmt::format("{}, s1 {:a}, s2 {:a}", recipe->describe(), recipe->s1, recipe->s2)
               : "none");
  }
  return fields;
}

/// That these are this rank's experts of a layer of this group.
void check_weights(const ExpertWeights& weights, const std::string& name,
                   const LayerGroupConfig& config, const ExpertPlacement& placement, int rank) {
  const auto count = static_cast<int>(weights.experts.size());
  const int first = placement.expert_of(rank, 0), num_local = placement.num_local();
  if (config.num_slots != 0) {
    check_argument(count == num_local, "{}: the weights are of {} experts, rank {} has {} slots",
                   name, count, rank, num_local);
  } else {
    check_argument(weights.first_expert == first && count == num_local,
                   "{}: the weights are experts [{}, {}), rank {} has experts [{}, {})", name,
                   weights.first_expert, weights.first_expert + count, rank, first,
                   first + num_local);
  }
  check_argument(weights.geometry.hidden == config.geometry.hidden,
                 "{}: hidden {}, the group has {}", name, weights.geometry.hidden,
                 config.geometry.hidden);
  check_argument(weights.geometry.intermediate == config.geometry.intermediate,
                 "{}: intermediate {}, the group has {}", name, weights.geometry.intermediate,
                 config.geometry.intermediate);
  check_argument(weights.geometry.token_width() == config.geometry.token_width() &&
                     weights.geometry.has_bias == config.geometry.has_bias,
                 "{}: the model's width is {} {} biases, the group's {} {}", name,
                 weights.geometry.token_width(), weights.geometry.has_bias ? "with" : "without",
                 config.geometry.token_width(), config.geometry.has_bias ? "with" : "without");
  check_experts(weights);
}

}  // namespace

void check_divisible(const ModelGeometry& geometry, int num_slots, int num_ranks) {
  check_argument(num_ranks > 0, "{} ranks; at least one", num_ranks);
  if (num_slots != 0) {
    (void)Placement::even(geometry.num_experts, num_ranks, num_slots);
    return;
  }
  check_argument(geometry.num_experts % num_ranks == 0,
                 "{} experts are not divisible by {} ranks: num_slots {} leaves some slots empty",
                 geometry.num_experts, num_ranks,
                 (geometry.num_experts + num_ranks - 1) / num_ranks * num_ranks);
}

ExchangeConfig exchange_config(const LayerGroupConfig& config, Mode mode, WireFormat wire,
                               Device::Kind device) {
  const ModeCapacity& capacity = capacity_of(config, mode);
  return {.mode = mode,
          .wire = wire,
          .num_experts = config.geometry.num_experts,
          .num_slots = config.num_slots,
          .num_topk = config.geometry.num_topk,
          .hidden = config.geometry.hidden,
          .max_tokens_per_rank = capacity.max_tokens_per_rank,
          .max_m = capacity.max_m,
          .hosts = config.hosts,
          .sum_parts = config.sum_parts,
          .routed_scaling_factor = config.routed_scaling_factor,
          .num_in_flight =
              config.num_in_flight != 0 ? config.num_in_flight : traits_of(device).engine_slots,
          .peer_timeout = config.peer_timeout};
}

std::int64_t checked_max_rows(const LayerGroupConfig& config, int num_ranks, Device::Kind device) {
  check_divisible(config.geometry, config.num_slots, num_ranks);
  check_argument(
      config.geometry.intermediate > 0 && config.geometry.intermediate % kActivationGroup == 0,
      "intermediate {} is not a positive multiple of {}", config.geometry.intermediate,
      kActivationGroup);
  std::int64_t max_rows = 0;
  for (const Mode mode : kModes) {
    const ModeCapacity& capacity = capacity_of(config, mode);
    check_argument(capacity.max_tokens_per_rank >= 0, "{} max_tokens_per_rank {} is negative",
                   to_string(mode), capacity.max_tokens_per_rank);
    if (capacity.max_tokens_per_rank == 0) {
      check_argument(capacity.max_m == 0, "{} max_m {} is given without max_tokens_per_rank",
                     to_string(mode), capacity.max_m);
      continue;
    }
    // No wire format changes the number of rows.
    const ExchangeConfig exchange = exchange_config(config, mode, WireFormat::kE4m3Group, device);
    max_rows = std::max(max_rows, Exchange::max_rows(exchange, num_ranks));
  }
  check_argument(max_rows > 0,
                 "the group has neither mode: set max_tokens_per_rank of low_latency, of normal or "
                 "of both");
  return max_rows;
}

std::size_t padded_bytes(const LayerGroupConfig& config) {
  const ModelGeometry& g = config.geometry;
  if (g.token_width() == g.hidden) return 0;
  const auto tokens = static_cast<std::size_t>(
      std::max(config.low_latency.max_tokens_per_rank, config.normal.max_tokens_per_rank));
  return tokens * static_cast<std::size_t>(g.hidden) * sizeof(std::uint16_t);
}

std::size_t expert_y_bytes(const LayerGroupConfig& config, std::int64_t max_rows,
                           Device::Kind device) {
  if (traits_of(device).exchange_keeps_expert_y) return 0;
  return static_cast<std::size_t>(max_rows) * static_cast<std::size_t>(config.geometry.hidden) *
         sizeof(std::uint16_t);
}

std::array<std::optional<LayerRecipe>, 2> resolve_recipes(const LayerGroupConfig& config,
                                                          const ModeRecipes& recipes,
                                                          const std::optional<StaticScales>& scales,
                                                          const std::string& layer_name) {
  std::array<std::optional<LayerRecipe>, 2> resolved;
  for (const Mode mode : kModes) {
    const auto& name = mode == Mode::kLowLatency ? recipes.low_latency : recipes.normal;
    if (capacity_of(config, mode).max_tokens_per_rank == 0) {
      check_argument(!name, "{}: recipe {} is for {} mode, which the group does not have",
                     layer_name, name ? to_string(*name) : std::string(), to_string(mode));
      continue;
    }
    resolved[static_cast<std::size_t>(mode)] =
        resolve_recipe(name.value_or(Recipe{}), mode, recipes.dispatch_dtype, scales, layer_name);
  }
  return resolved;
}

LayerGroup LayerGroup::create(const LayerGroupConfig& wanted, Transport& transport,
                              Backend& backend) {
  LayerGroupConfig config = wanted;
  if (config.hosts.num_ranks() == 0) config.hosts = transport.hosts();
  const Device::Kind device = backend.device().kind;
  check_bias(config.geometry, device);
  const std::int64_t max_rows = checked_max_rows(config, transport.num_ranks(), device);
  require_agreement(transport, group_agreement(config), config.peer_timeout);
  auto impl = std::make_shared<Impl>();
  impl->config = config;
  impl->transport = &transport;
  impl->backend = &ops(backend);
  impl->placement = {config.num_slots != 0 ? config.num_slots : config.geometry.num_experts,
                     transport.num_ranks()};
  impl->scratch = std::make_shared<ExpertScratch>();
  impl->scratch->max_rows = max_rows;
  const std::int64_t intermediate = config.geometry.intermediate;
  impl->scratch->h.codes = backend.allocate(fp8_code_bytes(max_rows, intermediate));
  impl->scratch->h.scale = backend.allocate(fp8_scale_bytes(max_rows, intermediate));
  impl->expert_y = backend.allocate(expert_y_bytes(config, max_rows, device));
  if (const std::size_t bytes = padded_bytes(config); bytes > 0) {
    impl->padded_x = backend.allocate(bytes);
    impl->padded_y = backend.allocate(bytes);
    const std::vector<std::byte> zeros(bytes);
    backend.copy_from_host(impl->padded_x->data(), zeros.data(), bytes, {});
    backend.synchronize({});
  }
  impl->order = impl->backend->make_stream_order();
  // As at the end of add_layer(): no rank queues a call while another one still allocates. What
  // rank 0 counts tells groups apart.
  const std::uint64_t mine = ++num_groups_made;
  const auto counts = transport.all_gather(std::as_bytes(std::span(&mine, 1)), config.peer_timeout);
  std::memcpy(&impl->group_number, counts.front().data(), sizeof(mine));
  return LayerGroup(std::move(impl));
}

Exchange& LayerGroup::Impl::exchange_for(const LayerRecipe& recipe) {
  const std::pair key{recipe.mode, recipe.wire};
  const auto found = exchanges.find(key);
  if (found != exchanges.end()) return found->second;
  const Device::Kind device = backend->device().kind;
  Exchange& made =
      exchanges
          .emplace(key, Exchange::create(exchange_config(config, recipe.mode, recipe.wire, device),
                                         *transport, *backend))
          .first->second;
  made.impl_->layer_name = [this](int number) { return name_of_layer(number); };
  return made;
}

Placement LayerGroup::Impl::placement_or_default(const Placement& wanted) const {
  const int experts = config.geometry.num_experts, ranks = transport->num_ranks();
  const int slots = placement.num_experts();
  if (wanted == Placement()) return Placement::even(experts, ranks, slots);
  check_argument(config.num_slots != 0, "a placement is given, the group has no num_slots");
  check_argument(
      wanted.num_experts() == experts && wanted.num_slots() == slots && wanted.num_ranks() == ranks,
      "the placement has {} experts in {} slots of {} ranks; the group has {}, {} and "
      "{}",
      wanted.num_experts(), wanted.num_slots(), wanted.num_ranks(), experts, slots, ranks);
  return wanted;
}

AgreedLayer LayerGroup::Impl::agree(std::string name, const ExpertWeights& shapes,
                                    std::uint64_t identity, const ModeRecipes& recipes,
                                    const Placement& experts) {
  check_weights(shapes, name, config, placement, transport->rank());
  AgreedLayer agreed{.name = std::move(name), .number = 0, .recipes = {}, .placement = experts};
  agreed.recipes = resolve_recipes(config, recipes, shapes.static_scales, agreed.name);
  agreed.number = layer_number(layer_names.size());
  Agreement fields =
      layer_agreement(agreed.name, shapes.geometry, identity, agreed.recipes, experts);
  // Ranks that count differently would refuse each other's calls.
  fields.emplace_back("number of the layer", std::to_string(agreed.number));
  fields.push_back(group_of(agreed.name));
  require_agreement(*transport, fields, config.peer_timeout);
  // Counted here: whatever happens to the layer now, ranks go on with the same number.
  layer_names.push_back(agreed.name);
  return agreed;
}

void LayerGroup::Impl::together(const std::string& layer, const std::function<void()>& body) {
  std::exception_ptr error;
  try {
    body();
  } catch (...) {
    error = std::current_exception();
  }
  const std::byte failed{error != nullptr};
  std::vector<std::vector<std::byte>> others;
  try {
    others = transport->all_gather({&failed, 1}, config.peer_timeout);
  } catch (...) {
    if (!error) throw;
  }
  if (error) std::rethrow_exception(error);
  std::vector<int> ranks;
  for (std::size_t r = 0; r < others.size(); ++r) {
    if (others[r].front() != std::byte{}) ranks.push_back(static_cast<int>(r));
  }
  if (ranks.empty()) return;
  fail_of_ranks(ErrorCode::kTransport, ranks,
                "{}: rank(s){} could not load their experts; their own errors say why", layer,
                list_of(ranks));
}

std::unique_ptr<Layer::Impl> LayerGroup::Impl::attach(const std::shared_ptr<Impl>& self,
                                                      const AgreedLayer& agreed,
                                                      const ExpertWeights& shapes,
                                                      std::shared_ptr<PreparedExperts> prepared) {
  auto layer = std::make_unique<Layer::Impl>(self, agreed, shapes, std::move(prepared));
  for (std::size_t i = 0; i < agreed.recipes.size(); ++i) {
    const auto& recipe = agreed.recipes[i];
    if (!recipe) continue;
    layer->modes[i].emplace(*recipe, &exchange_for(*recipe));
    if (scales_per_row(recipe->gemm1, config.geometry.hidden) == 0 || scratch->x.scale) continue;
    scratch->x.scale =
        backend->allocate(fp8_scale_bytes(scratch->max_rows, config.geometry.hidden));
  }
  if (layer->slots) layer->settle_slots(shapes);
  return layer;
}

Layer LayerGroup::add_layer(const LayerSpec& spec, const ModeRecipes& recipes) {
  Impl& self = *impl_;
  const std::string name =
      spec.name.empty() ? fmt::format("layer {}", spec.weights.layer) : spec.name;
  const AgreedLayer agreed = self.agree(name, spec.weights, spec.identity, recipes,
                                        self.placement_or_default(spec.placement));

  // First what may be refused: a layer that is not made leaves no exchange behind.
  std::shared_ptr<PreparedExperts> prepared;
  self.together(name, [&] { prepared = self.backend->prepare(spec.weights); });
  auto layer = self.attach(impl_, agreed, spec.weights, std::move(prepared));
  // Allocating waits for the device. If a kernel of rank A already waited for rank B while B still
  // allocates, neither would end. So all ranks meet here before any of them can queue a call.
  (void)self.transport->all_gather({}, self.config.peer_timeout);
  return Layer(std::move(layer));
}

const LayerGroupConfig& LayerGroup::config() const noexcept {
  return impl_->config;
}
int LayerGroup::rank() const noexcept {
  return impl_->transport->rank();
}
int LayerGroup::num_ranks() const noexcept {
  return impl_->transport->num_ranks();
}
const LoadStats& LayerGroup::load_stats() const noexcept {
  return impl_->load_stats;
}
void LayerGroup::check() {
  for (auto& [key, exchange] : impl_->exchanges) exchange.check();
}
LayerGroupMemory LayerGroup::memory() const noexcept {
  LayerGroupMemory memory = impl_->layers;
  for (const auto& [key, exchange] : impl_->exchanges)
    memory.exchange_bytes += exchange.held_bytes();
  memory.scratch_bytes =
      impl_->expert_y->bytes() + impl_->scratch->x.bytes() + impl_->scratch->h.bytes();
  for (const auto* buffer : {&impl_->padded_x, &impl_->padded_y}) {
    if (*buffer) memory.scratch_bytes += (*buffer)->bytes();
  }
  if (impl_->mover_memory) memory.moving_bytes = impl_->mover_memory->bytes();
  return memory;
}

LayerGroup::LayerGroup(std::shared_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
LayerGroup::LayerGroup(LayerGroup&&) noexcept = default;
LayerGroup& LayerGroup::operator=(LayerGroup&&) noexcept = default;
LayerGroup::~LayerGroup() = default;

}  // namespace sluice
