// A meeting place over TCP for processes that have a group: rank 0 listens, and says where.
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/fail.h"
#include "core/random_bytes.h"
#include "core/sha256.h"
#include "sluice/network.h"
#include "transport/tcp_socket.h"

namespace sluice {
namespace {

/// Room for an offer: every rank gives as many bytes.
constexpr std::size_t kOfferBytes = 4096;

/// Of the interfaces that are up: those that other hosts can reach, and then loopback ones.
std::vector<std::string> own_addresses() {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) {
    fail(ErrorCode::kTransport, "getifaddrs: {}", std::strerror(errno));
  }
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(list, freeifaddrs);
  std::vector<std::string> near, far;
  for (const ifaddrs* i = list; i != nullptr; i = i->ifa_next) {
    if (i->ifa_addr == nullptr || (i->ifa_flags & IFF_UP) == 0) continue;
    const int family = i->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    char text[NI_MAXHOST] = {};
    const socklen_t size = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    if (getnameinfo(i->ifa_addr, size, text, sizeof(text), nullptr, 0, NI_NUMERICHOST) != 0) {
      continue;
    }
    // An address with a scope means something on its own host alone.
    if (std::strchr(text, '%') != nullptr) continue;
    const std::string address = family == AF_INET ? text : "[" + std::string(text) + "]";
    ((i->ifa_flags & IFF_LOOPBACK) != 0 ? near : far).push_back(address);
  }
  far.insert(far.end(), near.begin(), near.end());
  return far;
}

}  // namespace

TcpConfig agree_on_meeting(const ProcessGroup& group) {
  FileDescriptor listener;
  std::string offer;  // The secret, then addresses, a line each.
  if (group.rank == 0) {
    std::array<std::byte, 32> secret;
    draw_random(secret);
    offer = to_hex(secret) + "\n";
    listener = listen_everywhere(0);
    const int port = port_of_listener(listener.get());
    for (const std::string& address : own_addresses()) {
      const std::string line = fmt::format("{}:{}\n", address, port);
      if (offer.size() + line.size() <= kOfferBytes) offer += line;
    }
  }
  offer.resize(kOfferBytes, '\0');
  const auto all = group.all_gather(std::as_bytes(std::span(offer)));
  check_argument(all.size() == static_cast<std::size_t>(group.num_ranks),
                 "group: all_gather gave {} parts for {} ranks", all.size(), group.num_ranks);
  check_argument(all[0].size() == kOfferBytes, "group: all_gather gave {} bytes of rank 0's {}",
                 all[0].size(), kOfferBytes);
  TcpConfig config{.rank = group.rank, .num_ranks = group.num_ranks};
  std::string line;
  for (const std::byte b : all[0]) {
    const char c = static_cast<char>(b);
    if (c == '\0') break;
    if (c != '\n') {
      line += c;
      continue;
    }
    if (config.secret.empty()) {
      config.secret = std::exchange(line, {});
    } else {
      config.addresses.push_back(std::exchange(line, {}));
    }
  }
  if (listener) config.listener = listener.release();
  return config;
}

}  // namespace sluice
