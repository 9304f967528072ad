// tcp_departure.h - why a rank takes part no more, as all ranks of a TcpLink are told.
#pragma once

#include <cstddef>
#include <vector>

#include "transport/tcp_link.h"

namespace sluice {

struct TcpDeparture {
  Presence presence = Presence::kEnded;
  std::vector<int> blamed = {};  ///< Of one that gave up: the ranks that it gave up for.
};

/// As the payload of a message: presence, then the blamed ranks, int32 each.
[[nodiscard]] std::vector<std::byte> encode(const TcpDeparture& why);
[[nodiscard]] TcpDeparture decode_departure(const std::vector<std::byte>& bytes);

}  // namespace sluice
