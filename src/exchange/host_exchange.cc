#include "exchange/host_exchange.h"

#include "core/fail.h"
#include "exchange/two_level_exchange.h"

namespace sluice {

HostExchange::HostExchange(const ExchangeConfig& config_in, Transport& transport, Backend& backend)
    : layout_(config_in, transport.num_ranks()),
      backend_(ops(backend)),
      protocol_(layout_, protocol_steps(config_in.mode == Mode::kLowLatency),
                ProtocolPeers::all(transport.num_ranks()), config_in.peer_timeout, transport,
                [this](int layer) { return name_of_layer(layer); }),
      staged_(config_in, backend_),
      parts_(config_in, transport.num_ranks()) {
  config = config_in;
  rank = transport.rank();
  num_ranks = transport.num_ranks();
  placement = layout_.placement;
  max_rows = layout_.max_rows();
  if (layout_.expanded_rows > 0) {
    for (int slot = 0; slot < layout_.num_slots; ++slot) {
      expanded_.push_back(backend_.allocate(layout_.rows_x_bytes + layout_.rows_scale_bytes));
    }
  }
  held_bytes = protocol_.window_bytes() + staged_.bytes();
  for (const auto& buffer : expanded_) held_bytes += buffer->bytes();
  counters_ = counters_for(num_ranks);
}

HostExchange::~HostExchange() = default;

HostExchange::HostRoute::~HostRoute() {
  exchange.protocol_.release(use);
}

std::unique_ptr<Dispatched::Route> HostExchange::dispatch_send(TensorView x, const Routing& routing,
                                                               float static_scale, Stream stream) {
  std::vector<std::int32_t> slots = slots_of_entries(config, routing, rank);
  auto route = std::make_unique<HostRoute>(*this, protocol_.begin(routing.layer));
  route->routing = routing;
  route->slots = std::move(slots);
  counters_.saturated_values += staged_.stage(x, static_scale, stream);
  send_rows(*route, x.dim(0));
  counters_.wait_ns = protocol_.wait_ns();
  counters_.num_dispatches += 1;
  route->batch.expected_m = expected_rows_per_slot(config, x.dim(0), num_ranks);
  return route;
}

void HostExchange::dispatch_receive(Dispatched::Route& base, Stream) {
  auto& route = static_cast<HostRoute&>(base);
  protocol_.require_healthy();
  protocol_.wait_for_all(route.use, Flag::kDispatched, "dispatch");
  receive_rows(route);
  counters_.wait_ns = protocol_.wait_ns();
  route.rows.add_to(route.routing.row_totals);
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
  if (parts_.is_one()) {
    sum_home(route, y);
  } else {
    sum_home_by_parts(route, y);
  }
  counters_.wait_ns = protocol_.wait_ns();
}

void HostExchange::count_sent(int peer, std::size_t bytes, std::uint64_t rows) {
  counters_.dispatch_bytes[static_cast<std::size_t>(peer)] += bytes;
  counters_.dispatch_rows[static_cast<std::size_t>(peer)] += rows;
}

void HostExchange::send_home(const HostRoute& route, TensorView expert_y) {
  const auto* rows = static_cast<const std::byte*>(expert_y.data);
  route.rows.for_each([&](const RowOrigin& origin, std::size_t row) {
    const auto place = static_cast<std::size_t>(origin.token_slot);
    protocol_.put(route.use, origin.source, layout_.home + place * layout_.row_bytes,
                  {rows + row * layout_.row_bytes, layout_.row_bytes});
    counters_.combine_bytes[static_cast<std::size_t>(origin.source)] += layout_.row_bytes;
  });
  protocol_.signal_all(route.use, Flag::kCombined);
}

void HostExchange::sum_home(const HostRoute& route, MutableTensorView y) {
  // An entry's row came home to the entry's own place.
  std::vector<std::int32_t> row_of = checked_indices(config, route.routing.topk_idx);
  for (std::size_t i = 0; i < row_of.size(); ++i) {
    if (row_of[i] >= 0) row_of[i] = static_cast<std::int32_t>(i);
  }
  backend_.sum_entries(
      {.rows = reinterpret_cast<const std::uint16_t*>(protocol_.local(route.use) + layout_.home),
       .row_of = row_of.data(),
       .weights = route.routing.topk_weights.as<float>(),
       .num_tokens = y.dim(0),
       .num_topk = config.num_topk,
       .width = config.hidden,
       .factor = config.routed_scaling_factor,
       .y = y.as<std::uint16_t>()},
      {});
}

/// What several hosts would add up, on one.
void HostExchange::sum_home_by_parts(const HostRoute& route, MutableTensorView y) {
  const auto* const rows =
      reinterpret_cast<const std::uint16_t*>(protocol_.local(route.use) + layout_.home);
  const auto* const weights = route.routing.topk_weights.as<float>();
  PartSum sum(parts_.num_parts(), config.hidden);
  for (std::int64_t t = 0; t < y.dim(0); ++t) {
    sum.clear();
    for (std::int64_t i = t * config.num_topk; i < (t + 1) * config.num_topk; ++i) {
      const std::int32_t slot = route.slots[static_cast<std::size_t>(i)];
      if (slot >= 0) sum.add_row(parts_.part_of(slot), weights[i], rows + i * config.hidden);
    }
    round_sum(sum.total(), config.hidden, config.routed_scaling_factor,
              y.as<std::uint16_t>() + t * config.hidden);
  }
}

std::unique_ptr<Exchange::Impl> make_host_exchange(const ExchangeConfig& config,
                                                   Transport& transport, Backend& backend) {
  if (config.hosts.num_hosts() > 1) return make_two_level_exchange(config, transport, backend);
  if (config.mode == Mode::kLowLatency) return make_host_low_latency(config, transport, backend);
  return make_host_normal(config, transport, backend);
}

}  // namespace sluice
