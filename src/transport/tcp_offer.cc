// A meeting place over TCP for processes that have a group: rank 0 listens, and says where.
#include <array>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>
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
    const std::vector<std::string> addresses = own_addresses();
    if (addresses.empty()) fail(ErrorCode::kTransport, "getifaddrs: {}", std::strerror(errno));
    for (const std::string& address : addresses) {
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
