#include "exchange/two_level_exchange.h"

#include <algorithm>

namespace sluice {

TwoLevelExchange::TwoLevelExchange(const ExchangeConfig& config_in, Transport& transport,
                                   Backend& backend)
    : HostExchange(config_in, TwoLevelLayout(config_in, transport.num_ranks()),
                   two_level_steps(config_in.mode == Mode::kLowLatency),
                   ProtocolPeers::of(config_in.hosts, transport.rank()), transport, backend),
      relay_layout_(config_in, transport.num_ranks()),
      host_(config_in.hosts.host_of(transport.rank())),
      host_of_slot_(
          hosts_of_slots(config_in.hosts, config_in.total_slots(), transport.num_ranks())),
      relayed_(config_in.hosts.sources_of(transport.rank())),
      index_here_(relayed_indices(config_in.hosts, host_)),
      record_(std::max(relay_layout_.record.bytes, relay_layout_.record.header_bytes)),
      host_sum_(parts_.parts_per_host(), config_in.hidden),
      hosts_sum_(config_in.hosts.num_hosts(), config_in.hidden) {
  for (int h = 0; h < config.hosts.num_hosts(); ++h) {
    own_index_.push_back(relayed_indices(config.hosts, h)[static_cast<std::size_t>(rank)]);
  }
}

/// To this rank's relay on every host, its own included; a host that needs no token gets a header.
void TwoLevelExchange::send_tokens(HostRoute& route, std::int64_t) {
  const NetworkRecord& layout = relay_layout_.record;
  const auto* const weights = route.routing.topk_weights.as<float>();
  const std::vector<std::int32_t> rows = layout.num_counts > 0
                                             ? count_entries(route.slots, layout.num_counts)
                                             : std::vector<std::int32_t>();
  const auto tokens =
      tokens_by_host(route.slots, config.num_topk, config.hosts.num_hosts(), host_of_slot_);
  for (int host = 0; host < config.hosts.num_hosts(); ++host) {
    const int relay = config.hosts.relay(rank, host);
    const std::size_t piece = relay_layout_.piece_of(own_index(host));
    std::int64_t n = 0;
    for (const std::int32_t t : tokens[static_cast<std::size_t>(host)]) {
      write_record(layout, own_token(route, t), weights + std::int64_t{t} * config.num_topk, host,
                   host_of_slot_, record_.data());
      send(route, relay, piece + layout.piece_bytes(n++), {record_.data(), layout.bytes});
    }
    write_header(layout, static_cast<std::int32_t>(n), rows, record_.data());
    send(route, relay, piece, {record_.data(), layout.header_bytes});
    count_rows_sent(relay, n);
    if (host != host_) protocol_.signal(route.use, relay, Flag::kSent);
  }
}

PieceView TwoLevelExchange::piece(const HostRoute& route, std::size_t relayed_index) {
  return {relay_layout_.record,
          received<std::byte>(route, relay_layout_.piece_of(static_cast<int>(relayed_index)))};
}

void TwoLevelExchange::relay_tokens(HostRoute& route) {
  protocol_.wait_for_all(route.use, Flag::kSent, "dispatch (from other hosts)");
  std::vector<SpreadTokens> from;
  for (std::size_t i = 0; i < relayed_.size(); ++i) {
    const PieceView sent = piece(route, i);
    from.push_back({.source = relayed_[i],
                    .num_tokens = sent.num_records(),
                    .token = [sent](std::int64_t r) { return sent.record(r).token(); },
                    .counts = sent.counts()});
  }
  spread(route, from);
}

void TwoLevelExchange::send_rows_home(const HostRoute& route, TensorView expert_y) {
  const auto* const rows = static_cast<const std::byte*>(expert_y.data);
  route.rows.for_each([&](const RowOrigin& origin, std::size_t row) {
    const int relay = config.hosts.relay(origin.source, host_);
    const int index = index_here_[static_cast<std::size_t>(origin.source)];
    send_back(route, relay, relay_layout_.gathered(index, origin.token_slot),
              {rows + row * layout_.row_bytes, layout_.row_bytes});
  });
  protocol_.signal_all(route.use, Flag::kGathered);
}

/// What this host made of the tokens of every rank that it relays for, to that rank.
void TwoLevelExchange::relay_rows_home(const HostRoute& route) {
  protocol_.wait_for_all(route.use, Flag::kGathered, "combine (inside the host)");
  for (std::size_t i = 0; i < relayed_.size(); ++i) {
    if (relayed_[i] == rank) continue;
    if (parts_.is_one()) {
      relay_alone(route, i);
    } else {
      relay_sums(route, i);
    }
    protocol_.signal(route.use, relayed_[i], Flag::kCombined);
  }
}

/// Every row to the place that it would have if its expert were on the source's own host.
void TwoLevelExchange::relay_alone(const HostRoute& route, std::size_t relayed_index) {
  const int source = relayed_[relayed_index];
  const int at_home =
      relayed_indices(config.hosts, config.hosts.host_of(source))[static_cast<std::size_t>(source)];
  const int here = static_cast<int>(relayed_index);
  const PieceView from = piece(route, relayed_index);
  for (std::int32_t i = 0; i < from.num_records(); ++i) {
    const WireToken token = from.record(i).token();
    for (int k = 0; k < config.num_topk; ++k) {
      if (token.slots[static_cast<std::size_t>(k)] < 0) continue;
      const std::int64_t token_slot = std::int64_t{token.idx} * config.num_topk + k;
      send_back(route, source, relay_layout_.gathered(at_home, token_slot),
                {received<std::byte>(route, relay_layout_.gathered(here, token_slot)),
                 layout_.row_bytes});
    }
  }
}

/// A sum for each token; of a single row, the row itself, which its home rank multiplies.
void TwoLevelExchange::relay_sums(const HostRoute& route, std::size_t relayed_index) {
  const int here = static_cast<int>(relayed_index);
  const PieceView from = piece(route, relayed_index);
  for (std::int32_t i = 0; i < from.num_records(); ++i) {
    const RecordView record = from.record(i);
    const WireToken token = record.token();
    host_sum_.clear();
    int num_rows = 0;
    const std::uint16_t* row = nullptr;
    for (int k = 0; k < config.num_topk; ++k) {
      const std::int32_t slot = token.slots[static_cast<std::size_t>(k)];
      if (slot < 0) continue;
      const std::int64_t token_slot = std::int64_t{token.idx} * config.num_topk + k;
      row = received<std::uint16_t>(route, relay_layout_.gathered(here, token_slot));
      host_sum_.add_row(part_here(slot), record.weight(k), row);
      ++num_rows;
    }
    const auto* const bytes = num_rows == 1 ? reinterpret_cast<const std::byte*>(row)
                                            : reinterpret_cast<const std::byte*>(host_sum_.total());
    send_back(route, relayed_[relayed_index], relay_layout_.home_of(host_, token.idx),
              {bytes, layout_.row_bytes * (num_rows == 1 ? 1 : 2)});
  }
}

void TwoLevelExchange::sum_rows(const HostRoute& route, MutableTensorView y) {
  if (parts_.is_one()) {
    sum_entries(route, relay_layout_.gathered(own_index(host_), 0), y);
  } else {
    sum_hosts(route, y);
  }
}

void TwoLevelExchange::sum_hosts(const HostRoute& route, MutableTensorView y) {
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

void TwoLevelExchange::add_own_host(const HostRoute& route, std::int64_t token) {
  const auto* const weights = route.routing.topk_weights.as<float>();
  const int own = own_index(host_);
  host_sum_.clear();
  for (std::int64_t i = token * config.num_topk; i < (token + 1) * config.num_topk; ++i) {
    const std::int32_t slot = route.slots[static_cast<std::size_t>(i)];
    if (slot < 0 || host_of_slot_[static_cast<std::size_t>(slot)] != host_) continue;
    host_sum_.add_row(part_here(slot), weights[i],
                      received<std::uint16_t>(route, relay_layout_.gathered(own, i)));
  }
  if (const float* const sum = host_sum_.total()) hosts_sum_.set(host_, sum);
}

void TwoLevelExchange::add_other_host(const HostRoute& route, std::int64_t token, int host) {
  int num_rows = 0;
  float weight = 0;
  for (std::int64_t i = token * config.num_topk; i < (token + 1) * config.num_topk; ++i) {
    const std::int32_t slot = route.slots[static_cast<std::size_t>(i)];
    if (slot < 0 || host_of_slot_[static_cast<std::size_t>(slot)] != host) continue;
    weight = route.routing.topk_weights.as<float>()[i];
    ++num_rows;
  }
  if (num_rows == 0) return;
  const std::size_t at = relay_layout_.home_of(host, token);
  if (num_rows == 1) {
    hosts_sum_.add_row(host, weight, received<std::uint16_t>(route, at));
  } else {
    hosts_sum_.set(host, received<float>(route, at));
  }
}

}  // namespace sluice
