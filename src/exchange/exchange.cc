// The front of every exchange: arguments are checked here, ranks agree here, and a Dispatched is
// kept with the exchange that made it.
#include "sluice/exchange.h"

#include <fmt/core.h>

#include <cmath>

#include "backend/traits.h"
#include "core/check_tensor.h"
#include "core/fail.h"
#include "exchange/agreement.h"
#include "exchange/host_layout.h"
#include "exchange/impl.h"
#include "exchange/limits.h"
#include "exchange/sum_parts.h"
#include "sluice/backend.h"
#include "sluice/config.h"
#include "sluice/quant.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

void check_config(const ExchangeConfig& c, int num_ranks) {
  check_argument(c.num_experts > 0 && (c.num_slots != 0 || c.num_experts % num_ranks == 0),
                 "num_experts {} is not a positive multiple of {} ranks", c.num_experts, num_ranks);
  check_argument(c.num_slots == 0 || (c.num_slots >= c.num_experts && c.num_slots % num_ranks == 0),
                 "num_slots {} is not a multiple of {} ranks that has room for {} experts",
                 c.num_slots, num_ranks, c.num_experts);
  check_argument(c.num_slots <= Placement::kMaxSlots, "num_slots {} exceeds {}", c.num_slots,
                 int{Placement::kMaxSlots});
  check_argument(c.num_topk >= 1 && c.num_topk <= kMaxTopk, "num_topk {} is not in [1, {}]",
                 c.num_topk, int{kMaxTopk});
  check_argument(c.hidden > 0 && c.hidden % kActivationGroup == 0,
                 "hidden {} is not a positive multiple of {}", c.hidden, kActivationGroup);
  check_argument(c.max_tokens_per_rank > 0 && c.max_tokens_per_rank <= (1 << 24),
                 "max_tokens_per_rank {} is not in [1, 2^24]", c.max_tokens_per_rank);
  check_argument(c.max_m >= 0, "max_m {} is negative", c.max_m);
  check_argument(
      c.max_m == 0 || c.mode == Mode::kLowLatency,
      "max_m {} is for the low-latency mode; normal mode has no rows per expert to reserve",
      c.max_m);
  check_argument(c.num_in_flight >= 1 && c.num_in_flight <= kMaxInFlight,
                 "num_in_flight {} is not in [1, {}]", c.num_in_flight, int{kMaxInFlight});
  check_argument(c.num_sms >= 0, "num_sms {} is negative", c.num_sms);
  check_argument(c.peer_timeout.count() > 0, "peer_timeout {} ms is not positive",
                 c.peer_timeout.count());
  check_argument(std::isfinite(c.routed_scaling_factor) && c.routed_scaling_factor > 0,
                 "routed_scaling_factor {} is not a positive float32", c.routed_scaling_factor);
  check_argument(c.hosts.num_ranks() == 0 || c.hosts.num_ranks() == num_ranks,
                 "hosts are of {} ranks, there are {}", c.hosts.num_ranks(), num_ranks);
  (void)SumParts(c, num_ranks);
}

/// What only the exchange for host memory does.
void check_device(const ExchangeConfig& c) {
  if (c.hosts.num_hosts() == 1 && c.total_parts() > 1) {
    fail(ErrorCode::kUnsupported,
         "{}, sum_parts {}: the exchange in CUDA memory of one host adds up in one part",
         c.hosts.to_string(), c.total_parts());
  }
}

Agreement exchange_agreement(const ExchangeConfig& c) {
  return {{"version", version()},
          {"mode", to_string(c.mode)},
          {"wire", to_string(c.wire)},
          {"num_experts", std::to_string(c.num_experts)},
          {"num_slots", std::to_string(c.num_slots)},
          {"num_topk", std::to_string(c.num_topk)},
          {"hidden", std::to_string(c.hidden)},
          {"max_tokens_per_rank", std::to_string(c.max_tokens_per_rank)},
          {"max_m", std::to_string(c.max_m)},
          {"hosts", c.hosts.to_string()},
          {"sum_parts", std::to_string(c.total_parts())},
          {"routed_scaling_factor", fmt::format("{:a}", c.routed_scaling_factor)},
          {"num_in_flight", std::to_string(c.num_in_flight)}};
}

void check_slots(const ExchangeConfig& c, int num_ranks, const ExpertSlots* slots) {
  check_argument((slots != nullptr) == (c.num_slots != 0),
                 "routing.slots {} given, num_slots is {}: an exchange with slots needs them, and "
                 "one without takes none",
                 slots != nullptr ? "is" : "is not", c.num_slots);
  if (slots == nullptr) return;
  const Placement& p = slots->placement();
  check_argument(p.num_experts() == c.num_experts && p.num_slots() == c.num_slots &&
                     p.num_ranks() == num_ranks,
                 "routing.slots place {} experts in {} slots of {} ranks; the exchange has {}, {} "
                 "and {}",
                 p.num_experts(), p.num_slots(), p.num_ranks(), c.num_experts, c.num_slots,
                 num_ranks);
}

void check_dispatch(const ExchangeConfig& c, int num_ranks, const TensorView& x,
                    const Routing& routing, float static_scale, const Device& device) {
  check_slots(c, num_ranks, routing.slots);
  check_argument(routing.layer >= 0 && routing.layer <= Routing::kMaxLayer,
                 "routing.layer {} is not in [0, {}]", routing.layer, int{Routing::kMaxLayer});
  if (c.wire == WireFormat::kE4m3Static) {
    check_argument(std::isnormal(static_scale) && static_scale > 0,
                   "static_scale {} is not a positive normal number", static_scale);
  } else {
    check_argument(static_scale == 0, "static_scale {} is given, but rows of {} have none",
                   static_scale, to_string(c.wire));
  }
  check_argument(x.shape.rank() == 2, "x has shape {}, expected [num_tokens, {}]",
                 x.shape.to_string(), c.hidden);
  const std::int64_t tokens = x.dim(0);
  check_argument(tokens <= c.max_tokens_per_rank, "num_tokens {} exceeds max_tokens_per_rank {}",
                 tokens, c.max_tokens_per_rank);
  check_tensor("x", x, DType::kBFloat16, Shape{tokens, c.hidden}, device);
  const Shape slots{tokens, c.num_topk};
  const DType idx = routing.topk_idx.dtype;
  check_argument(idx == DType::kInt32 || idx == DType::kInt64,
                 "topk_idx is {}, expected int32 or int64", to_string(idx));
  check_tensor("topk_idx", routing.topk_idx, idx, slots, device);
  check_tensor("topk_weights", routing.topk_weights, DType::kFloat32, slots, device);
}

void check_row_totals(const Exchange::Impl& impl, const MutableTensorView& totals) {
  if (totals.empty()) return;
  check_tensor("row_totals", totals, DType::kInt64, Shape{impl.placement.num_local()}, impl.device);
}

ExchangeConfig resolved(ExchangeConfig config, int num_ranks) {
  check_config(config, num_ranks);
  if (config.mode == Mode::kLowLatency && config.max_m == 0) {
    const std::int64_t worst = std::int64_t{num_ranks} * config.max_tokens_per_rank;
    check_argument(worst <= (1 << 30),
                   "max_tokens_per_rank {} of {} ranks: {} rows for an expert, at most 2^30: take "
                   "fewer tokens, or set max_m where the library is called",
                   config.max_tokens_per_rank, num_ranks, worst);
    config.max_m = static_cast<int>(worst);
  }
  return config;
}

}  // namespace

std::size_t Exchange::workspace_bytes(const ExchangeConfig& config, int num_ranks,
                                      Device::Kind kind) {
  check_argument(num_ranks >= 1, "{} ranks; at least one", num_ranks);
  const ExchangeConfig checked = resolved(config, num_ranks);
  if (traits_of(kind).has_host_memory) return host_workspace_bytes(checked, num_ranks);
  check_device(checked);
  return device_workspace_bytes(checked, num_ranks);
}

std::int64_t Exchange::max_rows(const ExchangeConfig& config, int num_ranks) {
  check_argument(num_ranks >= 1, "{} ranks; at least one", num_ranks);
  return HostLayout(resolved(config, num_ranks), num_ranks).max_rows();
}

Exchange Exchange::create(const ExchangeConfig& config, Transport& transport, Backend& backend) {
  ExchangeConfig with_hosts = config;
  if (config.hosts.num_ranks() == 0) with_hosts.hosts = transport.hosts();
  const ExchangeConfig checked = resolved(with_hosts, transport.num_ranks());
  const bool is_on_host = traits_of(backend.device().kind).has_host_memory;
  if (!is_on_host) check_device(checked);
  require_agreement(transport, exchange_agreement(checked), checked.peer_timeout);
  std::unique_ptr<Impl> impl;
  if (is_on_host) {
    impl = make_host_exchange(checked, transport, backend);
  } else {
#ifdef SLUICE_HAS_CUDA
    impl = make_cuda_exchange(checked, transport, backend);
#else
    fail(ErrorCode::kUnsupported, "this build has no exchange for CUDA memory");
#endif
  }
  impl->config = checked;
  impl->rank = transport.rank();
  impl->num_ranks = transport.num_ranks();
  impl->device = backend.device();
  return Exchange(std::move(impl));
}

std::string Exchange::Impl::name_of_layer(int layer) const {
  if (layer == 0) return "no named layer";
  return layer_name ? layer_name(layer) : fmt::format("layer number {}", layer);
}

std::string different_calls(
    const std::vector<std::pair<std::string, std::string>>& ranks_and_layers,
    const std::string& own_rank, const std::string& own_layer) {
  std::string text;
  for (const auto& [ranks, layer] : ranks_and_layers) {
    text += text.empty() ? fmt::format("rank(s) {} dispatch for {}", ranks, layer)
                         : fmt::format(", rank(s) {} for {}", ranks, layer);
  }
  return fmt::format("{}, rank {} for {}: ranks must make the same calls in the same order", text,
                     own_rank, own_layer);
}

ExchangeCounters counters_for(int num_ranks) {
  ExchangeCounters counters;
  const auto ranks = static_cast<std::size_t>(num_ranks);
  counters.dispatch_bytes.resize(ranks);
  counters.combine_bytes.resize(ranks);
  counters.dispatch_rows.resize(ranks);
  counters.wait_ns.resize(ranks);
  return counters;
}

namespace {

using Stage = Dispatched::Route::Stage;

/// The route of a value that this exchange made and that is ready for its next step.
Dispatched::Route& checked_route(const std::unique_ptr<Dispatched::Route>& route,
                                 const Exchange::Impl* impl, Stage stage, const char* operation) {
  check_argument(route != nullptr, "{} of a Dispatched that was moved away", operation);
  check_argument(route->owner == impl, "{} of a Dispatched that another exchange made", operation);
  static constexpr const char* kNext[] = {"dispatch_receive", "combine or combine_send",
                                          "combine_receive"};
  check_argument(route->stage == stage, "{} of a Dispatched whose next step is {}", operation,
                 kNext[static_cast<int>(route->stage)]);
  return *route;
}

void check_expert_y(const Exchange::Impl& impl, const Dispatched::Route& route,
                    const TensorView& expert_y) {
  check_tensor("expert_y", expert_y, DType::kBFloat16, route.batch.x.shape, impl.device);
}

void check_y(const Exchange::Impl& impl, const Dispatched::Route& route,
             const MutableTensorView& y) {
  check_tensor("y", y, DType::kBFloat16, Shape{route.num_tokens, impl.config.hidden}, impl.device);
}

}  // namespace

Dispatched Exchange::dispatch(TensorView x, const Routing& routing, Stream stream,
                              float static_scale) {
  check_dispatch(impl_->config, impl_->num_ranks, x, routing, static_scale, impl_->device);
  check_row_totals(*impl_, routing.row_totals);
  auto route = impl_->dispatch(x, routing, static_scale, stream);
  route->stage = Stage::kReceived;
  route->num_tokens = x.dim(0);
  route->owner = impl_.get();
  return Dispatched(std::move(route));
}

Dispatched Exchange::dispatch_send(TensorView x, const Routing& routing, Stream stream,
                                   float static_scale) {
  check_dispatch(impl_->config, impl_->num_ranks, x, routing, static_scale, impl_->device);
  check_row_totals(*impl_, routing.row_totals);
  auto route = impl_->dispatch_send(x, routing, static_scale, stream);
  route->num_tokens = x.dim(0);
  route->owner = impl_.get();
  return Dispatched(std::move(route));
}

void Exchange::dispatch_receive(Dispatched& dispatched, Stream stream) {
  auto& route = checked_route(dispatched.route_, impl_.get(), Stage::kSent, "dispatch_receive");
  impl_->dispatch_receive(route, stream);
  route.stage = Stage::kReceived;
}

void Exchange::combine(Dispatched dispatched, TensorView expert_y, MutableTensorView y,
                       Stream stream) {
  auto& route = checked_route(dispatched.route_, impl_.get(), Stage::kReceived, "combine");
  check_expert_y(*impl_, route, expert_y);
  check_y(*impl_, route, y);
  impl_->combine(route, expert_y, y, stream);
}

void Exchange::combine_send(Dispatched& dispatched, TensorView expert_y, Stream stream) {
  auto& route = checked_route(dispatched.route_, impl_.get(), Stage::kReceived, "combine_send");
  check_expert_y(*impl_, route, expert_y);
  impl_->combine_send(route, expert_y, stream);
  route.stage = Stage::kReturning;
}

void Exchange::combine_receive(Dispatched dispatched, MutableTensorView y, Stream stream) {
  auto& route = checked_route(dispatched.route_, impl_.get(), Stage::kReturning, "combine_receive");
  check_y(*impl_, route, y);
  impl_->combine_receive(route, y, stream);
}

void Exchange::check() {
  impl_->check();
}

const ExchangeConfig& Exchange::config() const noexcept {
  return impl_->config;
}
int Exchange::num_local_experts() const noexcept {
  return impl_->placement.num_local();
}
std::int64_t Exchange::max_rows() const noexcept {
  return impl_->max_rows;
}
std::size_t Exchange::held_bytes() const noexcept {
  return impl_->held_bytes;
}
ExchangeCounters Exchange::counters() const {
  return impl_->counters();
}

Exchange::Exchange(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
Exchange::Exchange(Exchange&&) noexcept = default;
Exchange& Exchange::operator=(Exchange&&) noexcept = default;
Exchange::~Exchange() = default;

Dispatched::Dispatched(std::unique_ptr<Route> route) noexcept : route_(std::move(route)) {}
Dispatched::Dispatched(Dispatched&&) noexcept = default;
Dispatched& Dispatched::operator=(Dispatched&&) noexcept = default;
Dispatched::~Dispatched() = default;
const ExpertBatch& Dispatched::batch() const noexcept {
  return route_->batch;
}
MutableTensorView Dispatched::expert_y() const noexcept {
  return route_->expert_y;
}

}  // namespace sluice
