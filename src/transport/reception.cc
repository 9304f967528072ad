#include "transport/reception.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <span>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;

/// How long a connection may take to say who it is.
constexpr std::chrono::milliseconds kPatience{2'000};

}  // namespace

Reception::Reception(FileDescriptor listener, Rules rules)
    : listener_(std::move(listener)), rules_(std::move(rules)) {}

Deadline Reception::add_to(std::vector<pollfd>& entries, Deadline deadline) const {
  entries.push_back({listener_.get(), POLLIN, 0});
  for (const Newcomer& newcomer : newcomers_) {
    entries.push_back({newcomer.guest.socket.get(), POLLIN, 0});
    deadline = std::min(deadline, newcomer.until);
  }
  return deadline;
}

void Reception::hear_all(const TakeIn& take_in) {
  for (auto newcomer = newcomers_.begin(); newcomer != newcomers_.end();) {
    newcomer = hear(*newcomer, take_in) ? std::next(newcomer) : newcomers_.erase(newcomer);
  }
  while (accept_one()) {
  }
}

bool Reception::accept_one() {
  FileDescriptor socket(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!socket) {
    // These do not go away by themselves, and poll() would report the connection for ever.
    if (errno == EMFILE || errno == ENFILE || errno == ENOMEM) {
      fail(ErrorCode::kTransport, "accepting a connection: {} (see ulimit -n)",
           std::strerror(errno));
    }
    return false;
  }
  if ((rules_.is_same_user && !is_same_user(socket.get())) ||
      newcomers_.size() >= rules_.max_guests) {
    ++num_strangers_;
    return true;
  }
  Newcomer newcomer{{std::move(socket), new_nonce(), {}, {}}, Clock::now() + kPatience, 0};
  const Hello hello{rules_.greeting, newcomer.guest.nonce};
  if (send_all(newcomer.guest.socket.get(), std::as_bytes(std::span(&hello, 1)), Clock::now()) ==
      Io::kDone) {
    newcomers_.push_back(std::move(newcomer));
  } else {
    ++num_strangers_;  // Gone again before a word.
  }
  return true;
}

/// False once there is nothing more to hear from this connection.
bool Reception::hear(Newcomer& newcomer, const TakeIn& take_in) {
  Guest& guest = newcomer.guest;
  const std::ptrdiff_t received =
      receive_some(guest.socket.get(),
                   std::as_writable_bytes(std::span(&guest.join, 1)).subspan(newcomer.num_received),
                   &guest.files);
  if (received > 0) newcomer.num_received += static_cast<std::size_t>(received);
  if (received >= 0 && newcomer.num_received < sizeof(Join) && Clock::now() < newcomer.until) {
    return true;
  }
  const Join& join = guest.join;
  const bool is_ours = newcomer.num_received == sizeof(Join) &&
                       guest.files.size() == rules_.num_files && join.greeting == rules_.greeting &&
                       same(join.proof, prove(rules_.secret, rules_.guest, guest.nonce, join.nonce,
                                              join.rank, join.num_ranks));
  if (is_ours) {
    take_in(guest);
  } else {
    ++num_strangers_;
  }
  return false;
}

}  // namespace sluice
