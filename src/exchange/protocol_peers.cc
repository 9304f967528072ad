#include "exchange/protocol_peers.h"

#include <algorithm>
#include <numeric>

#include "core/fail.h"

namespace sluice {

ProtocolPeers ProtocolPeers::all(int num_ranks) {
  ProtocolPeers p;
  p.peers.resize(static_cast<std::size_t>(num_ranks));
  std::iota(p.peers.begin(), p.peers.end(), 0);
  p.mates = p.relays = p.sources = p.peers;
  return p;
}

ProtocolPeers ProtocolPeers::of(const Hosts& hosts, int rank) {
  ProtocolPeers p;
  p.hosts = hosts;
  const int own = hosts.host_of(rank);
  p.mates.assign(hosts.ranks_of(own).begin(), hosts.ranks_of(own).end());
  for (int h = 0; h < hosts.num_hosts(); ++h) {
    if (h != own) p.relays.push_back(hosts.relay(rank, h));
  }
  std::ranges::sort(p.relays);
  p.sources = hosts.sources_of(rank);
  std::erase(p.sources, rank);
  p.peers = p.mates;
  p.peers.insert(p.peers.end(), p.relays.begin(), p.relays.end());
  p.peers.insert(p.peers.end(), p.sources.begin(), p.sources.end());
  std::ranges::sort(p.peers);
  p.peers.erase(std::ranges::unique(p.peers).begin(), p.peers.end());
  return p;
}

const std::vector<int>& ProtocolPeers::of(Reach reach) const {
  switch (reach) {
    case Reach::kPeers:
      return peers;
    case Reach::kMates:
      return mates;
    case Reach::kRelays:
      return relays;
    case Reach::kSources:
      return sources;
  }
  fail(ErrorCode::kInternal, "reach {} does not exist", static_cast<int>(reach));
}

std::string ProtocolPeers::name(int rank) const {
  return has_hosts() ? fmt::format("{} on host {}", rank, hosts.host_of(rank))
                     : fmt::format("{}", rank);
}

}  // namespace sluice
