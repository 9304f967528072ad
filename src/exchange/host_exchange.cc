#include "exchange/host_exchange.h"

#include <cmath>
#include <cstring>

#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {

HostExchange::HostExchange(const ExchangeConfig& config_in, Transport& transport, Backend& backend)
    : backend_(ops(backend)), protocol_(config_in, transport) {
  config = config_in;
  rank = transport.rank();
  num_ranks = transport.num_ranks();
  const HostLayout& layout = protocol_.layout();
  placement = layout.placement;
  max_rows = layout.max_rows();
  staging_ = backend_.allocate(layout.staging_bytes);
  if (layout.expanded_rows > 0) {
    for (int slot = 0; slot < layout.num_slots; ++slot) {
      expanded_.push_back(backend_.allocate(layout.rows_x_bytes + layout.rows_scale_bytes));
    }
  }
  held_bytes = protocol_.window_bytes() + staging_->bytes();
  for (const auto& buffer : expanded_) held_bytes += buffer->bytes();
  const auto ranks = static_cast<std::size_t>(num_ranks);
  counters_.dispatch_bytes.resize(ranks);
  counters_.combine_bytes.resize(ranks);
  counters_.dispatch_rows.resize(ranks);
  counters_.wait_ns.resize(ranks);
}

HostExchange::~HostExchange() = default;

HostExchange::HostRoute::~HostRoute() {
  exchange.protocol_.release(use);
}

std::unique_ptr<Dispatched::Route> HostExchange::dispatch_send(TensorView x, const Routing& routing,
                                                               float static_scale, Stream stream) {
  std::vector<std::int32_t> idx = checked_indices(routing.topk_idx);
  if (routing.slots != nullptr) replace_by_slots(*routing.slots, idx);
  auto route = std::make_unique<HostRoute>(*this, protocol_.begin());
  route->routing = routing;
  stage(x, static_scale, stream);
  send_rows(*route, x.dim(0), idx);
  counters_.wait_ns = protocol_.wait_ns();
  counters_.num_dispatches += 1;
  const auto slots = static_cast<std::int64_t>(x.dim(0)) * config.num_topk * num_ranks;
  const std::int64_t experts = placement.num_experts();
  route->batch.expected_m = static_cast<int>((slots + experts - 1) / experts);
  return route;
}

void HostExchange::dispatch_receive(Dispatched::Route& base, Stream) {
  auto& route = static_cast<HostRoute&>(base);
  protocol_.require_healthy();
  protocol_.wait_for_all(route.use, Flag::kDispatched, "dispatch");
  receive_rows(route);
  counters_.wait_ns = protocol_.wait_ns();
  if (route.routing.row_totals.empty()) return;
  for (std::size_t e = 0; e < route.num_rows.size(); ++e) {
    route.routing.row_totals.as<std::int64_t>()[e] += route.num_rows[e];
  }
}

void HostExchange::combine_send(Dispatched::Route& base, TensorView expert_y, Stream) {
  auto& route = static_cast<HostRoute&>(base);
  protocol_.require_healthy();
  route.use.operation = "combine";
  send_home(route, expert_y);
}

void HostExchange::combine_receive(Dispatched::Route& base, MutableTensorView y, Stream) {
  auto& route = static_cast<HostRoute&>(base);
  protocol_.require_healthy();
  protocol_.wait_for_all(route.use, Flag::kCombined, "combine");
  sum_home(route, y);
  counters_.wait_ns = protocol_.wait_ns();
}

/// int32 copies of the router's choice; out-of-range values are refused before anything is sent.
std::vector<std::int32_t> HostExchange::checked_indices(const TensorView& topk_idx) const {
  std::vector<std::int32_t> idx(static_cast<std::size_t>(topk_idx.shape.num_elements()));
  for (std::size_t i = 0; i < idx.size(); ++i) {
    const std::int64_t value = topk_idx.dtype == DType::kInt64 ? topk_idx.as<std::int64_t>()[i]
                                                               : topk_idx.as<std::int32_t>()[i];
    check_argument(value >= -1 && value < config.num_experts,
                   "topk_idx[{}, {}] = {} is not in [-1, {})",
                   i / static_cast<std::size_t>(config.num_topk),
                   i % static_cast<std::size_t>(config.num_topk), value, config.num_experts);
    idx[i] = static_cast<std::int32_t>(value);
  }
  return idx;
}

/// From here on `idx` has slots where it had experts.
void HostExchange::replace_by_slots(const ExpertSlots& slots,
                                    std::vector<std::int32_t>& idx) const {
  const auto topk = static_cast<std::size_t>(config.num_topk);
  for (std::size_t i = 0; i < idx.size(); ++i) {
    if (idx[i] < 0) continue;
    idx[i] = slots.placement().slot_of_row(idx[i], rank, static_cast<int>(i / topk),
                                           static_cast<int>(i % topk));
  }
}

void HostExchange::stage(TensorView x, float static_scale, Stream stream) {
  const auto num_tokens = static_cast<std::int32_t>(x.dim(0));
  if (num_tokens == 0) return;
  const HostLayout& layout = protocol_.layout();
  if (config.wire == WireFormat::kBf16) {
    std::memcpy(staging_->data(), x.data, x.bytes());
    return;
  }
  const RowRanges rows{.num_experts = 1,
                       .count = &num_tokens,
                       .max_rows = config.max_tokens_per_rank,
                       .max_rows_per_expert = config.max_tokens_per_rank,
                       .expected_m = num_tokens};
  const bool is_static = config.wire == WireFormat::kE4m3Static;
  std::byte* const scales =
      staging_->data() +
      static_cast<std::size_t>(config.max_tokens_per_rank) * layout.payload_bytes;
  const Fp8Rows out{.codes = reinterpret_cast<std::uint8_t*>(staging_->data()),
                    .scale = is_static ? nullptr : reinterpret_cast<float*>(scales),
                    .static_scale = static_scale,
                    .width = config.hidden,
                    .scale_per_row = config.wire == WireFormat::kE4m3Token};
  backend_.quantize(x.as<std::uint16_t>(), rows, config.wire == WireFormat::kE4m3Pow2, out, stream);
  if (!is_static) return;
  const float inverse = 1.0f / static_scale;
  for (std::int64_t i = 0; i < x.shape.num_elements(); ++i) {
    const float v = std::fabs(bf16_to_float(x.as<std::uint16_t>()[i]) * inverse);
    counters_.saturated_values += v > kE4m3Max;
  }
}

std::span<const std::byte> HostExchange::staged_payload(std::int64_t token) const {
  const std::size_t bytes = protocol_.layout().payload_bytes;
  return {staging_->data() + static_cast<std::size_t>(token) * bytes, bytes};
}

std::span<const std::byte> HostExchange::staged_scales(std::int64_t token) const {
  const HostLayout& layout = protocol_.layout();
  const std::size_t begin =
      static_cast<std::size_t>(config.max_tokens_per_rank) * layout.payload_bytes;
  return {staging_->data() + begin + static_cast<std::size_t>(token) * layout.scale_bytes,
          layout.scale_bytes};
}

void HostExchange::count_sent(int peer, std::size_t bytes, std::uint64_t rows) {
  counters_.dispatch_bytes[static_cast<std::size_t>(peer)] += bytes;
  counters_.dispatch_rows[static_cast<std::size_t>(peer)] += rows;
}

void HostExchange::fill_batch(HostRoute& route, std::byte* x, std::byte* scale, Shape shape) const {
  const bool bf16 = config.wire == WireFormat::kBf16;
  ExpertBatch& batch = route.batch;
  batch.layout = config.mode;
  batch.x = {x, bf16 ? DType::kBFloat16 : DType::kFloat8E4M3, shape};
  if (protocol_.layout().scale_bytes > 0) {
    const std::int64_t groups = scales_per_row(sent_cast(config.wire), config.hidden);
    batch.x_scale = {
        scale, DType::kFloat32,
        shape.rank() == 3 ? Shape{shape[0], shape[1], groups} : Shape{shape[0], groups}};
  }
  const std::int64_t num_local = placement.num_local();
  batch.num_rows = {route.num_rows.data(), DType::kInt32, Shape{num_local}};
  batch.row_begin = {route.row_begin.data(), DType::kInt64, Shape{num_local}};
}

void HostExchange::send_home(const HostRoute& route, TensorView expert_y) {
  const HostLayout& layout = protocol_.layout();
  const auto* rows = static_cast<const std::byte*>(expert_y.data);
  const Origin* origin = route.origin.data();
  for (std::size_t e = 0; e < route.num_rows.size(); ++e) {
    for (std::int64_t r = 0; r < route.num_rows[e]; ++r, ++origin) {
      const auto row = static_cast<std::size_t>(route.row_begin[e] + r);
      const auto place = static_cast<std::size_t>(origin->token_slot);
      protocol_.put(route.use, origin->source, layout.home + place * layout.home_bytes,
                    {rows + row * layout.home_bytes, layout.home_bytes});
      counters_.combine_bytes[static_cast<std::size_t>(origin->source)] += layout.home_bytes;
    }
  }
  for (int peer = 0; peer < num_ranks; ++peer) protocol_.signal(route.use, peer, Flag::kCombined);
}

void HostExchange::sum_home(const HostRoute& route, MutableTensorView y) {
  const HostLayout& layout = protocol_.layout();
  // An entry's row came home to the entry's own place.
  std::vector<std::int32_t> row_of = checked_indices(route.routing.topk_idx);
  for (std::size_t i = 0; i < row_of.size(); ++i) {
    if (row_of[i] >= 0) row_of[i] = static_cast<std::int32_t>(i);
  }
  backend_.sum_entries(
      {.rows = reinterpret_cast<const std::uint16_t*>(protocol_.local(route.use) + layout.home),
       .row_of = row_of.data(),
       .weights = route.routing.topk_weights.as<float>(),
       .num_tokens = y.dim(0),
       .num_topk = config.num_topk,
       .width = config.hidden,
       .factor = config.routed_scaling_factor,
       .y = y.as<std::uint16_t>()},
      {});
}

std::unique_ptr<Exchange::Impl> make_host_exchange(const ExchangeConfig& config,
                                                   Transport& transport, Backend& backend) {
  if (config.mode == Mode::kLowLatency) return make_host_low_latency(config, transport, backend);
  return make_host_normal(config, transport, backend);
}

}  // namespace sluice
