#include "exchange/host_exchange.h"

#include <utility>

#include "exchange/one_host_exchange.h"
#include "exchange/two_level_exchange.h"

namespace sluice {

HostExchange::HostExchange(const ExchangeConfig& config_in, const ReceiveLayout& layout,
                           std::span<const ProtocolStep> steps, ProtocolPeers peers,
                           Transport& transport, Backend& backend)
    : layout_(layout),
      protocol_(layout, steps, std::move(peers), config_in.peer_timeout, transport,
                [this](int layer) { return name_of_layer(layer); }),
      parts_(config_in, transport.num_ranks()),
      backend_(ops(backend)),
      staged_(config_in, backend_),
      counters_(counters_for(transport.num_ranks())) {
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
  send_tokens(*route, x.dim(0));
  counters_.wait_ns = protocol_.wait_ns();
  counters_.num_dispatches += 1;
  route->batch.expected_m = expected_rows_per_slot(config, x.dim(0), num_ranks);
  return route;
}

WireToken HostExchange::own_token(const HostRoute& route, std::int64_t token_idx) const {
  const auto topk = static_cast<std::size_t>(config.num_topk);
  return {
      .idx = static_cast<std::int32_t>(token_idx),
      .payload = staged_.payload(token_idx),
      .scales = staged_.scales(token_idx),
      .slots = std::span(route.slots).subspan(static_cast<std::size_t>(token_idx) * topk, topk)};
}

void HostExchange::dispatch_receive(Dispatched::Route& base, Stream) {
  auto& route = static_cast<HostRoute&>(base);
  protocol_.require_healthy();
  relay_tokens(route);
  protocol_.wait_for_all(route.use, Flag::kDispatched, "dispatch");
  take_rows(route);
  counters_.wait_ns = protocol_.wait_ns();
  route.rows.add_to(route.routing.row_totals);
}

void HostExchange::take_rows(HostRoute& route) {
  std::byte* const slot = protocol_.local(route.use);
  if (config.mode == Mode::kLowLatency) {
    take_masked_rows(config, layout_, rank, slot, route.rows, route.batch);
  } else {
    take_copies(config, layout_, slot, expanded_[static_cast<std::size_t>(route.use.slot)]->data(),
                route.rows, route.batch);
  }
}

void HostExchange::combine_send(Dispatched::Route& base, TensorView expert_y, Stream) {
  auto& route = static_cast<HostRoute&>(base);
  protocol_.require_healthy();
  route.use.operation = "combine";
  send_rows_home(route, expert_y);
}

void HostExchange::combine_receive(Dispatched::Route& base, MutableTensorView y, Stream) {
  auto& route = static_cast<HostRoute&>(base);
  protocol_.require_healthy();
  relay_rows_home(route);
  protocol_.wait_for_all(route.use, Flag::kCombined, "combine");
  sum_rows(route, y);
  counters_.wait_ns = protocol_.wait_ns();
}

void HostExchange::sum_entries(const HostRoute& route, std::size_t offset, MutableTensorView y) {
  // An entry's row came home to the entry's own place.
  std::vector<std::int32_t> row_of = route.slots;
  for (std::size_t i = 0; i < row_of.size(); ++i) {
    if (row_of[i] >= 0) row_of[i] = static_cast<std::int32_t>(i);
  }
  backend_.sum_entries({.rows = received<std::uint16_t>(route, offset),
                        .row_of = row_of.data(),
                        .weights = route.routing.topk_weights.as<float>(),
                        .num_tokens = y.dim(0),
                        .num_topk = config.num_topk,
                        .width = config.hidden,
                        .factor = config.routed_scaling_factor,
                        .y = y.as<std::uint16_t>()},
                       {});
}

void HostExchange::send(const HostRoute& route, int peer, std::size_t offset,
                        std::span<const std::byte> data) {
  protocol_.put(route.use, peer, offset, data);
  counters_.dispatch_bytes[static_cast<std::size_t>(peer)] += data.size();
}

void HostExchange::send_back(const HostRoute& route, int peer, std::size_t offset,
                             std::span<const std::byte> data) {
  protocol_.put(route.use, peer, offset, data);
  counters_.combine_bytes[static_cast<std::size_t>(peer)] += data.size();
}

std::unique_ptr<Exchange::Impl> make_host_exchange(const ExchangeConfig& config,
                                                   Transport& transport, Backend& backend) {
  if (config.hosts.num_hosts() > 1) {
    return std::make_unique<TwoLevelExchange>(config, transport, backend);
  }
  return std::make_unique<OneHostExchange>(config, transport, backend);
}

}  // namespace sluice
