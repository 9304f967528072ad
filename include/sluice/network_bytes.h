// network_bytes.h - what an exchange over several hosts sends over the network, by formula.
//
//   one rank --dispatch--> one other host:   header + records        a record: one token, once
//   one host --combine---> one rank:         rows                    of the tokens that it had
//
// All functions take a configuration with `hosts`, and sizes in bytes. Payload alone is counted:
// what a transport adds of its own is not. docs/exchange.md#several-hosts explains the parts; a
// record's and header's own layout is in src/exchange/network_record.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sluice/exchange.h"

namespace sluice {

/// One token on its way to a host: the row and its scales, the token's index, for each top-k entry
/// its expert slot or none, and its weight if the host adds up; a multiple of 16.
///   align16(wire_bytes_per_token + 4 + 4 k + (sum_parts == 1 ? 0 : 4 k))
[[nodiscard]] std::size_t network_record_bytes(const ExchangeConfig& config);

/// What precedes the records of one rank for one host: how many there are and, in low-latency mode,
/// this rank's rows for every expert slot.
///   align16(4 + (low-latency ? 4 total_slots : 0))
[[nodiscard]] std::size_t network_header_bytes(const ExchangeConfig& config);

/// Dispatch from one rank to one other host, `num_tokens` of whose tokens have an expert there.
[[nodiscard]] std::size_t network_dispatch_bytes(const ExchangeConfig& config,
                                                 std::int64_t num_tokens);

/// Combine of one token from one host that had `num_entries` of its top-k entries:
///   2 hidden * (sum_parts == 1 ? num_entries : min(num_entries, 2))
[[nodiscard]] std::size_t network_combine_bytes(const ExchangeConfig& config, int num_entries);

/// What precedes the rows of one host for one rank between GPUs, where there are any: whether the
/// relay had stopped, and for whom. Flags say it over CPU transports, which send nothing of it.
inline constexpr std::size_t kNetworkHomeHeaderBytes = 16;

// Where sizes must be known before the routing is, as for sends that are captured in a graph: the
// same for max_tokens_per_rank tokens, each with as many entries on the host as it can have.
/// Of one rank to one other host.
[[nodiscard]] std::size_t network_dispatch_piece_bytes(const ExchangeConfig& config);
/// Of one host to one rank, its header included.
[[nodiscard]] std::size_t network_combine_piece_bytes(const ExchangeConfig& config);

}  // namespace sluice
