// protocol_peers.h - with which ranks one rank of an exchange exchanges flags and bytes.
#pragma once

#include <string>
#include <vector>

#include "exchange/slot_rules.h"
#include "sluice/hosts.h"

namespace sluice {

struct ProtocolPeers {
  /// An exchange on one host: every rank is everybody's peer.
  [[nodiscard]] static ProtocolPeers all(int num_ranks);
  /// Of rank `rank`, with more than one host.
  [[nodiscard]] static ProtocolPeers of(const Hosts& hosts, int rank);

  [[nodiscard]] bool has_hosts() const noexcept { return hosts.num_hosts() > 1; }
  [[nodiscard]] const std::vector<int>& of(Reach reach) const;
  /// "3", or with hosts "3 on host 1".
  [[nodiscard]] std::string name(int rank) const;

  Hosts hosts;
  std::vector<int> peers, mates, relays, sources;  ///< Ascending; see Reach.
};

}  // namespace sluice
