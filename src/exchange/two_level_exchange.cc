#include "exchange/two_level_exchange.h"

#include <algorithm>
#include <utility>

#include "core/fail.h"

namespace sluice {

TwoLevelExchange::TwoLevelExchange(const ExchangeConfig& config_in, Transport& transport,
                                   Backend& backend)
    : layout_(config_in, transport.num_ranks()),
      backend_(ops(backend)),
      protocol_(layout_, two_level_steps(config_in.mode == Mode::kLowLatency),
                ProtocolPeers::of(config_in.hosts, transport.rank()), config_in.peer_timeout,
                transport, [this](int layer) { return name_of_layer(layer); }),
      host_(config_in.hosts.host_of(transport.rank())),
      staged_(config_in, backend_),
      parts_(config_in, transport.num_ranks()),
      host_of_slot_(
          hosts_of_slots(config_in.hosts, config_in.total_slots(), transport.num_ranks())),
      relayed_(config_in.hosts.sources_of(transport.rank())),
      index_here_(relayed_indices(config_in.hosts, host_)),
      record_(std::max(layout_.record.bytes, layout_.record.header_bytes)),
      host_sum_(parts_.parts_per_host(), config_in.hidden),
      hosts_sum_(config_in.hosts.num_hosts(), config_in.hidden) {
  config = config_in;
  rank = transport.rank();
  num_ranks = transport.num_ranks();
  placement = layout_.placement;
  max_rows = layout_.max_rows();
  for (int h = 0; h < config.hosts.num_hosts(); ++h) {
    own_index_.push_back(relayed_indices(config.hosts, h)[static_cast<std::size_t>(rank)]);
  }
  if (layout_.expanded_rows > 0) {
    for (int slot = 0; slot < layout_.num_slots; ++slot) {
      expanded_.push_back(backend_.allocate(layout_.rows_x_bytes + layout_.rows_scale_bytes));
    }
  }
  held_bytes = protocol_.window_bytes() + staged_.bytes();
  for (const auto& buffer : expanded_) held_bytes += buffer->bytes();
  counters_ = counters_for(num_ranks);
}

TwoLevelExchange::~TwoLevelExchange() = default;

TwoLevelExchange::TwoLevelRoute::~TwoLevelRoute() {
  exchange.protocol_.release(use);
}

std::unique_ptr<Dispatched::Route> TwoLevelExchange::dispatch_send(TensorView x,
                                                                   const Routing& routing,
                                                                   float static_scale,
                                                                   Stream stream) {
  std::vector<std::int32_t> slots = slots_of_entries(config, routing, rank);
  auto route = std::make_unique<TwoLevelRoute>(*this, protocol_.begin(routing.layer));
  route->routing = routing;
  route->slots = std::move(slots);
  counters_.saturated_values += staged_.stage(x, static_scale, stream);
  send_pieces(*route);
  counters_.wait_ns = protocol_.wait_ns();
  counters_.num_dispatches += 1;
  route->batch.expected_m = expected_rows_per_slot(config, x.dim(0), num_ranks);
  return route;
}

/// To this rank's relay on every host, its own included; a host that needs no token gets a header.
void TwoLevelExchange::send_pieces(const TwoLevelRoute& route) {
  const NetworkRecord& layout = layout_.record;
  const auto topk = static_cast<std::size_t>(config.num_topk);
  const auto* const weights = route.routing.topk_weights.as<float>();
  const std::vector<std::int32_t> rows = layout.num_counts > 0
                                             ? count_entries(route.slots, layout.num_counts)
                                             : std::vector<std::int32_t>();
  const auto tokens =
      tokens_by_host(route.slots, config.num_topk, config.hosts.num_hosts(), host_of_slot_);
  for (int host = 0; host < config.hosts.num_hosts(); ++host) {
    const auto h = static_cast<std::size_t>(host);
    const int relay = config.hosts.relay(rank, host);
    const std::size_t piece = layout_.piece_of(own_index_[h]);
    std::int64_t n = 0;
    for (const std::int32_t token : tokens[h]) {
      const auto first = static_cast<std::size_t>(token) * topk;
      write_record(layout, staged_.payload(token), staged_.scales(token), token,
                   std::span(route.slots).subspan(first, topk), weights + first, host,
                   host_of_slot_, record_.data());
      send(route, relay, piece + layout.piece_bytes(n++), {record_.data(), layout.bytes});
    }
    write_header(layout, static_cast<std::int32_t>(n), rows, record_.data());
    send(route, relay, piece, {record_.data(), layout.header_bytes});
    count_rows_sent(relay, static_cast<std::uint64_t>(n));
    if (host != host_) protocol_.signal(route.use, relay, Flag::kSent);
  }
}

PieceView TwoLevelExchange::piece(const TwoLevelRoute& route, std::size_t relayed_index) {
  return {layout_.record,
          protocol_.local(route.use) + layout_.piece_of(static_cast<int>(relayed_index))};
}

void TwoLevelExchange::send(const TwoLevelRoute& route, int peer, std::size_t offset,
                            std::span<const std::byte> data) {
  protocol_.put(route.use, peer, offset, data);
  counters_.dispatch_bytes[static_cast<std::size_t>(peer)] += data.size();
}

void TwoLevelExchange::dispatch_receive(Dispatched::Route& base, Stream) {
  auto& route = static_cast<TwoLevelRoute&>(base);
  protocol_.require_healthy();
  protocol_.wait_for_all(route.use, Flag::kSent, "dispatch (from other hosts)");
  spread(route);
  protocol_.wait_for_all(route.use, Flag::kDispatched, "dispatch");
  receive_rows(route);
  counters_.wait_ns = protocol_.wait_ns();
  route.rows.add_to(route.routing.row_totals);
}

void TwoLevelExchange::combine_send(Dispatched::Route& base, TensorView expert_y, Stream) {
  auto& route = static_cast<TwoLevelRoute&>(base);
  protocol_.require_healthy();
  route.use.operation = "combine";
  const auto* rows = static_cast<const std::byte*>(expert_y.data);
  route.rows.for_each([&](const RowOrigin& origin, std::size_t row) {
    const int relay = config.hosts.relay(origin.source, host_);
    const int index = index_here_[static_cast<std::size_t>(origin.source)];
    send_back(route, relay, layout_.gathered(index, origin.token_slot),
              {rows + row * layout_.row_bytes, layout_.row_bytes});
  });
  protocol_.signal_all(route.use, Flag::kGathered);
}

void TwoLevelExchange::send_back(const TwoLevelRoute& route, int peer, std::size_t offset,
                                 std::span<const std::byte> data) {
  protocol_.put(route.use, peer, offset, data);
  counters_.combine_bytes[static_cast<std::size_t>(peer)] += data.size();
}

void TwoLevelExchange::combine_receive(Dispatched::Route& base, MutableTensorView y, Stream) {
  auto& route = static_cast<TwoLevelRoute&>(base);
  protocol_.require_healthy();
  protocol_.wait_for_all(route.use, Flag::kGathered, "combine (inside the host)");
  send_home(route);
  protocol_.wait_for_all(route.use, Flag::kCombined, "combine");
  if (parts_.is_one()) {
    sum_entries(route, y);
  } else {
    sum_hosts(route, y);
  }
  counters_.wait_ns = protocol_.wait_ns();
}

/// What this host made of the tokens of every rank that it relays for, to that rank.
void TwoLevelExchange::send_home(const TwoLevelRoute& route) {
  for (std::size_t i = 0; i < relayed_.size(); ++i) {
    if (relayed_[i] == rank) continue;
    if (parts_.is_one()) {
      send_home_alone(route, i);
    } else {
      send_home_sums(route, i);
    }
    protocol_.signal(route.use, relayed_[i], Flag::kCombined);
  }
}

/// Every row to the place that it would have if its expert were on the source's own host.
void TwoLevelExchange::send_home_alone(const TwoLevelRoute& route, std::size_t relayed_index) {
  const int source = relayed_[relayed_index];
  const int at_home =
      relayed_indices(config.hosts, config.hosts.host_of(source))[static_cast<std::size_t>(source)];
  const PieceView from = piece(route, relayed_index);
  for (std::int32_t i = 0; i < from.num_records(); ++i) {
    const RecordView record = from.record(i);
    for (int k = 0; k < config.num_topk; ++k) {
      if (record.slot(k) < 0) continue;
      const std::int64_t token_slot = std::int64_t{record.token()} * config.num_topk + k;
      send_back(route, source, layout_.gathered(at_home, token_slot),
                {received<std::byte>(route,
                                     layout_.gathered(static_cast<int>(relayed_index), token_slot)),
                 layout_.row_bytes});
    }
  }
}

/// A sum for each token; of a single row, the row itself, which its home rank multiplies.
void TwoLevelExchange::send_home_sums(const TwoLevelRoute& route, std::size_t relayed_index) {
  const PieceView from = piece(route, relayed_index);
  for (std::int32_t i = 0; i < from.num_records(); ++i) {
    const RecordView record = from.record(i);
    host_sum_.clear();
    int num_rows = 0;
    const std::uint16_t* row = nullptr;
    for (int k = 0; k < config.num_topk; ++k) {
      if (record.slot(k) < 0) continue;
      const std::int64_t token_slot = std::int64_t{record.token()} * config.num_topk + k;
      row = received<std::uint16_t>(route,
                                    layout_.gathered(static_cast<int>(relayed_index), token_slot));
      host_sum_.add_row(part_here(record.slot(k)), record.weight(k), row);
      ++num_rows;
    }
    const auto* const bytes = num_rows == 1 ? reinterpret_cast<const std::byte*>(row)
                                            : reinterpret_cast<const std::byte*>(host_sum_.total());
    send_back(route, relayed_[relayed_index], layout_.home_of(host_, record.token()),
              {bytes, layout_.row_bytes * (num_rows == 1 ? 1 : 2)});
  }
}

/// All rows are here, in order of their entries: the sum of an exchange on one host.
void TwoLevelExchange::sum_entries(const TwoLevelRoute& route, MutableTensorView y) {
  std::vector<std::int32_t> row_of = route.slots;
  for (std::size_t i = 0; i < row_of.size(); ++i) {
    if (row_of[i] >= 0) row_of[i] = static_cast<std::int32_t>(i);
  }
  const int own = own_index_[static_cast<std::size_t>(host_)];
  backend_.sum_entries({.rows = received<std::uint16_t>(route, layout_.gathered(own, 0)),
                        .row_of = row_of.data(),
                        .weights = route.routing.topk_weights.as<float>(),
                        .num_tokens = y.dim(0),
                        .num_topk = config.num_topk,
                        .width = config.hidden,
                        .factor = config.routed_scaling_factor,
                        .y = y.as<std::uint16_t>()},
                       {});
}

void TwoLevelExchange::sum_hosts(const TwoLevelRoute& route, MutableTensorView y) {
  for (std::int64_t t = 0; t < y.dim(0); ++t) {
    hosts_sum_.clear();
    for (int host = 0; host < config.hosts.num_hosts(); ++host) {
      if (host == host_) {
        add_own_host(route, t);
      } else {
        add_other_host(route, t, host);
      }
    }
    round_sum(hosts_sum_.total(), config.hidden, config.routed_scaling_factor,
              y.as<std::uint16_t>() + t * config.hidden);
  }
}

void TwoLevelExchange::add_own_host(const TwoLevelRoute& route, std::int64_t token) {
  const auto* const weights = route.routing.topk_weights.as<float>();
  const int own = own_index_[static_cast<std::size_t>(host_)];
  host_sum_.clear();
  for (std::int64_t i = token * config.num_topk; i < (token + 1) * config.num_topk; ++i) {
    const std::int32_t slot = route.slots[static_cast<std::size_t>(i)];
    if (slot < 0 || host_of_slot_[static_cast<std::size_t>(slot)] != host_) continue;
    host_sum_.add_row(part_here(slot), weights[i],
                      received<std::uint16_t>(route, layout_.gathered(own, i)));
  }
  if (const float* const sum = host_sum_.total()) hosts_sum_.set(host_, sum);
}

void TwoLevelExchange::add_other_host(const TwoLevelRoute& route, std::int64_t token, int host) {
  int num_rows = 0;
  float weight = 0;
  for (std::int64_t i = token * config.num_topk; i < (token + 1) * config.num_topk; ++i) {
    const std::int32_t slot = route.slots[static_cast<std::size_t>(i)];
    if (slot < 0 || host_of_slot_[static_cast<std::size_t>(slot)] != host) continue;
    weight = route.routing.topk_weights.as<float>()[i];
    ++num_rows;
  }
  if (num_rows == 0) return;
  const std::size_t at = layout_.home_of(host, token);
  if (num_rows == 1) {
    hosts_sum_.add_row(host, weight, received<std::uint16_t>(route, at));
  } else {
    hosts_sum_.set(host, received<float>(route, at));
  }
}

std::unique_ptr<Exchange::Impl> make_two_level_exchange(const ExchangeConfig& config,
                                                        Transport& transport, Backend& backend) {
  if (config.mode == Mode::kLowLatency) {
    return make_two_level_low_latency(config, transport, backend);
  }
  return make_two_level_normal(config, transport, backend);
}

}  // namespace sluice
