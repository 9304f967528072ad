#include "transport/tcp_join.h"

#include <algorithm>
#include <chrono>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/fail.h"
#include "core/interruption.h"
#include "transport/tcp_socket.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

/// How long one address may keep this rank from trying the next.
constexpr milliseconds kPatience{2'000};
constexpr milliseconds kBetweenTries{20};

/// What trying one address gave.
struct Attempt {
  FileDescriptor socket;    // Rank 0 has accepted this rank.
  std::string reason;       // Otherwise.
  bool is_final = false;    // Trying again would give the same.
  bool was_closed = false;  // In the middle of a handshake: by rank 0's will, or by its end.
};

template <class T>
std::span<std::byte> bytes_of(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}

Attempt try_address(const TcpConfig& config, const std::string& address, Deadline deadline) {
  Connected connected = connect_over_tcp(address, deadline);
  if (!connected.socket) return {{}, connected.reason, false};
  const int socket = connected.socket.get();
  Hello hello{};
  if (receive_all(socket, bytes_of(hello), deadline) != Io::kDone) {
    return {{}, "who listens there says nothing", false};
  }
  if (hello.greeting != kTcpGreeting) return {{}, "another program listens there", true};
  Join join = answer_to(hello, config.secret, kTcpGuest, config.rank, config.num_ranks);
  Answer answer{};
  Io io = send_all(socket, bytes_of(join), deadline);
  if (io == Io::kDone) io = receive_all(socket, bytes_of(answer), deadline);
  if (io == Io::kClosed) {
    return {{}, "rank 0 does not take this process for one of its job", false, true};
  }
  if (io == Io::kLate) return {{}, "rank 0 does not answer", false};
  if (answer.kind != AnswerKind::kAccept ||
      !same(answer.proof,
            prove(config.secret, kTcpHost, hello.nonce, join.nonce, join.rank, join.num_ranks))) {
    return {{}, "who listens there does not know the job's secret", true};
  }
  return {std::move(connected.socket), "", true};
}

}  // namespace

std::string tcp_start_of(int rank) {
  return fmt::format("start of the tcp group on rank {}", rank);
}

FileDescriptor join_over_tcp(const TcpConfig& config, milliseconds timeout) {
  const Deadline deadline = Clock::now() + timeout;
  struct Place {
    std::string reason = "not tried";
    bool is_final = false;
    bool was_closed = false;  // At the last handshake there was.
  };
  std::vector<Place> places(config.addresses.size());
  const auto found = [&] {
    std::string text;
    for (std::size_t i = 0; i < places.size(); ++i) {
      text += fmt::format("{}{}: {}", i == 0 ? "" : "; ", config.addresses[i], places[i].reason);
    }
    return text;
  };
  for (;;) {
    for (std::size_t i = 0; i < places.size(); ++i) {
      if (places[i].is_final || Clock::now() >= deadline) continue;
      Attempt attempt =
          try_address(config, config.addresses[i], std::min(deadline, Clock::now() + kPatience));
      if (attempt.socket) return std::move(attempt.socket);
      Place& place = places[i];
      // Whom rank 0 does not want it sends away twice. One that ended is not there any more.
      place.is_final = attempt.is_final || (place.was_closed && attempt.was_closed);
      place.was_closed |= attempt.was_closed;
      const bool has_left = place.was_closed && !attempt.was_closed && !attempt.is_final;
      place.reason =
          has_left ? fmt::format("{}, after rank 0 broke off: it ended or gave up", attempt.reason)
                   : std::move(attempt.reason);
    }
    if (std::ranges::all_of(places, &Place::is_final)) {
      fail(ErrorCode::kTransport, "{}: {}", tcp_start_of(config.rank), found());
    }
    if (Clock::now() >= deadline) {
      fail_of_ranks(ErrorCode::kPeerTimeout, {0}, "{}: after {} ms still missing rank(s) 0 ({})",
                    tcp_start_of(config.rank), timeout.count(), found());
    }
    std::this_thread::sleep_for(kBetweenTries);
    Interruption::look();
  }
}

}  // namespace sluice
