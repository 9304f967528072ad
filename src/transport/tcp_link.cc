#include "transport/tcp_link.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "core/fail.h"
#include "sluice/error.h"
#include "transport/handshake.h"
#include "transport/parts.h"
#include "transport/tcp_hub.h"
#include "transport/tcp_join.h"
#include "transport/tcp_socket.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

/// How long a rank waits for rank 0 to say who is missing.
constexpr milliseconds kGrace{1'000};
/// A rank that is alive is heard every 500 ms.
constexpr std::uint32_t kSilentMs = 1'500;

void check_config(const TcpConfig& c) {
  check_argument(c.num_ranks >= 1 && c.num_ranks <= kMaxTcpRanks,
                 "num_ranks {} over tcp is not in [1, {}]", c.num_ranks, int{kMaxTcpRanks});
  check_argument(c.rank >= 0 && c.rank < c.num_ranks, "rank {} is not in [0, {})", c.rank,
                 c.num_ranks);
  check_secret(c.secret, "secret");
  check_argument(!c.addresses.empty() || c.listener >= 0,
                 "addresses: rank {} is told no address of rank 0", c.rank);
  check_argument(c.listener < 0 || c.rank == 0, "listener {} is given to rank {}; rank 0 listens",
                 c.listener, c.rank);
  for (const std::string& address : c.addresses) (void)parse_address(address);
}

/// Rank 0's listener; the other ranks' connection to it.
FileDescriptor first_socket(const TcpConfig& config, milliseconds timeout) {
  FileDescriptor given(config.listener);  // Closed, whatever happens.
  check_config(config);
  if (config.rank != 0) return join_over_tcp(config, timeout);
  if (!given) return listen_over_tcp(config.addresses[0], Clock::now() + timeout);
  (void)port_of_listener(given.get());
  return given;
}

/// Whom to blame for a collective that failed, and in what words.
struct Blame {
  ErrorCode code = ErrorCode::kPeerTimeout;
  std::vector<int> ranks;
  std::string text;
};

/// `gone`: at least one. Whoever fails in a collective gives up before it leaves, so a rank that
/// left is one that others waited for. `self` is never to blame.
Blame blame_for_break(const std::map<int, TcpDeparture>& gone, int self) {
  std::vector<int> ended, left;
  for (const auto& [rank, why] : gone) {
    if (why.presence == Presence::kEnded) ended.push_back(rank);
    if (why.presence == Presence::kLeft) left.push_back(rank);
  }
  if (!ended.empty()) {
    return {ErrorCode::kTransport, ended,
            fmt::format("missing rank(s){}, whose process has ended", list_of(ended))};
  }
  if (!left.empty()) {
    return {ErrorCode::kPeerTimeout, left,
            fmt::format("missing rank(s){}, which left before this collective", list_of(left))};
  }
  // Others may have given up for it since, and know less.
  for (const auto& [rank, why] : gone) {
    if (why.blamed != std::vector<int>{rank}) continue;
    return {ErrorCode::kPeerTimeout,
            {rank},
            fmt::format("missing rank(s) {}, whose call was interrupted", rank)};
  }
  for (const auto& [rank, why] : gone) {
    std::vector<int> blamed = why.blamed;
    std::erase(blamed, self);
    if (blamed.empty()) {
      return {ErrorCode::kPeerTimeout,
              {rank},
              fmt::format("missing rank(s) {}, which gave up this rank", rank)};
    }
    std::string text = fmt::format("rank {} gave up; missing rank(s){}, which did not come in time",
                                   rank, list_of(blamed));
    return {ErrorCode::kPeerTimeout, std::move(blamed), std::move(text)};
  }
  return {};  // Somebody is gone.
}

}  // namespace

struct TcpLink::Impl {
  Impl(const TcpConfig& config_in, FileDescriptor socket)
      : config(config_in),
        listens_at(config.rank == 0 ? reachable_at(socket.get()) : ""),
        hub(config, std::move(socket)) {}

  [[nodiscard]] Blame blame_for_delay(milliseconds timeout);
  [[noreturn]] void give_up(const std::string& place, milliseconds timeout);
  [[noreturn]] void break_off(const std::string& place, const Error& interruption);

  const TcpConfig config;
  const std::string listens_at;  // Rank 0.
  std::optional<Error> failure;  // The first one; all later collectives are refused.
  TcpHub hub;
};

/// The timeout has passed: missing is who has not come.
Blame TcpLink::Impl::blame_for_delay(milliseconds timeout) {
  std::vector<int> late, silent, lost;
  std::string what;
  const auto members = hub.ask(Clock::now() + kGrace);
  for (int r = 0; members && r < static_cast<int>(members->size()); ++r) {
    const TcpMember& member = (*members)[static_cast<std::size_t>(r)];
    if (r == config.rank) continue;
    const bool is_late = member.arrived<hub.number(), is_silent = member.silent_ms> kSilentMs;
    if (is_late) late.push_back(r);
    if (is_silent) silent.push_back(r);
    if (is_late && (is_silent || member.presence == Presence::kAway)) lost.push_back(r);
  }
  if (!lost.empty()) late = lost;  // The others may be waiting for them.
  if (!members) {
    // Rank 0 may have given up at the same moment, and have said why.
    if (const auto gone = hub.gone(); !gone.empty()) return blame_for_break(gone, config.rank);
    late = {0};
  } else if (late.empty() && !silent.empty()) {
    late = silent, what = ", which came but does not answer any more";
  } else if (late.empty()) {
    late = {0}, what = ", which has not passed on what all ranks gave";
  }
  std::string text =
      fmt::format("after {} ms still missing rank(s){}{}", timeout.count(), list_of(late), what);
  return {ErrorCode::kPeerTimeout, std::move(late), std::move(text)};
}

void TcpLink::Impl::give_up(const std::string& place, milliseconds timeout) {
  Blame blame;
  if (const auto refusal = hub.refusal()) {
    blame = {ErrorCode::kTransport, {}, refusal->what()};
  } else if (const auto gone = hub.gone(); !gone.empty()) {
    blame = blame_for_break(gone, config.rank);
  } else {
    blame = blame_for_delay(timeout);
    if (config.rank == 0 && hub.number() == 1) {  // The start: they may look for it elsewhere.
      const std::string told =
          config.addresses.empty() ? "" : fmt::format(", told {},", config.addresses[0]);
      blame.text += fmt::format("; rank 0{} listens at {}", told, listens_at);
    }
  }
  hub.give_up({.presence = Presence::kGaveUp, .blamed = blame.ranks});
  if (const int strangers = hub.num_strangers(); strangers > 0) {
    blame.text += fmt::format("; {} connections of other programs were refused", strangers);
  }
  failure.emplace(blame.code, fmt::format("{}: {}", place, blame.text), blame.ranks);
  throw *failure;
}

void TcpLink::Impl::break_off(const std::string& place, const Error& interruption) {
  // Of itself: that it came too late for nobody.
  hub.give_up({.presence = Presence::kGaveUp, .blamed = {config.rank}});
  failure.emplace(interruption.code(), fmt::format("{}: {}", place, interruption.what()));
  throw *failure;
}

TcpLink::TcpLink(const TcpConfig& config, milliseconds timeout) {
  const Deadline deadline = Clock::now() + timeout;
  impl_.reset(new Impl(config, first_socket(config, timeout)));
  impl_->hub.give({});
  if (!impl_->hub.take_all(deadline)) impl_->give_up(tcp_start_of(config.rank), timeout);
}

TcpLink::~TcpLink() = default;

int TcpLink::rank() const noexcept {
  return impl_->config.rank;
}
int TcpLink::num_ranks() const noexcept {
  return impl_->config.num_ranks;
}

std::vector<std::vector<std::byte>> TcpLink::gather(std::span<const std::byte> mine,
                                                    const char* operation, milliseconds timeout) {
  if (impl_->failure) {
    fail_of_ranks(ErrorCode::kTransport, impl_->failure->ranks(),
                  "this transport failed earlier: {}", impl_->failure->what());
  }
  impl_.get_deleter().home().require("connection over tcp");
  const Deadline deadline = Clock::now() + timeout;
  impl_->hub.give(mine);
  // The first collective was the start.
  const std::string place = fmt::format("{} number {} on rank {}", operation,
                                        impl_->hub.number() - 2, impl_->config.rank);
  try {
    const auto all = impl_->hub.take_all(deadline);
    if (all) return unpack(*all, impl_->config.num_ranks);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kInterrupted) impl_->break_off(place, error);
    throw;
  }
  impl_->give_up(place, timeout);
}

std::optional<std::vector<TcpMember>> TcpLink::ask(milliseconds timeout) {
  return impl_->hub.ask(Clock::now() + timeout);
}

std::vector<int> TcpLink::gone() const {
  std::vector<int> ended, gave_up;
  std::set<int> blamed;
  for (const auto& [rank, why] : impl_->hub.gone()) {
    if (why.presence == Presence::kEnded) ended.push_back(rank);
    if (why.presence != Presence::kGaveUp) continue;
    gave_up.push_back(rank);
    blamed.insert(why.blamed.begin(), why.blamed.end());
  }
  if (!ended.empty()) return ended;
  blamed.erase(impl_->config.rank);
  return blamed.empty() ? gave_up : std::vector<int>(blamed.begin(), blamed.end());
}

std::vector<int> TcpLink::left() const {
  std::vector<int> ranks;
  for (const auto& [rank, why] : impl_->hub.gone()) {
    if (why.presence == Presence::kLeft) ranks.push_back(rank);
  }
  return ranks;
}

void TcpLink::set_progress(std::uint64_t progress) noexcept {
  impl_->hub.set_progress(progress);
}

void TcpLink::set_stopped_for(int lost) noexcept {
  impl_->hub.set_stop_word(1 + static_cast<std::uint64_t>(lost));
}

}  // namespace sluice
