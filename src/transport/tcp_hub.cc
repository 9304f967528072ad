#include "transport/tcp_hub.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/fail.h"
#include "core/interruption.h"
#include "transport/parts.h"
#include "transport/tcp_join.h"
#include "transport/tcp_socket.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kBeat{500};
/// What a link that goes may take until the others have heard its last words.
constexpr milliseconds kLastWords{500};
/// What the thread may take to look at everything once more.
constexpr milliseconds kTurn{500};

static_assert(sizeof(TcpMember) == 32, "sent as it lies in memory");

}  // namespace

TcpHub::TcpHub(const TcpConfig& config, FileDescriptor listener_or_socket)
    : config_(config), bell_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!bell_) fail(ErrorCode::kTransport, "eventfd: {}", std::strerror(errno));
  if (config.rank == 0) {
    peers_.resize(static_cast<std::size_t>(config.num_ranks));
    peers_[0].member.presence = Presence::kHere;
    // All ranks may come at once, and strangers must not keep them out.
    const std::size_t max_guests = peers_.size() + 64;
    reception_ = std::make_unique<Reception>(std::move(listener_or_socket),
                                             Reception::Rules{.greeting = kTcpGreeting,
                                                              .secret = config.secret,
                                                              .guest = kTcpGuest,
                                                              .max_guests = max_guests});
  } else {
    peers_.resize(1);
    peers_[0].channel = TcpChannel(std::move(listener_or_socket));
  }
  thread_ = std::thread([this] { run(); });
}

TcpHub::~TcpHub() {
  {
    const Lock lock(mutex_);
    is_ending_ = true;
    if (config_.rank == 0) {
      tell_all(TcpMessage::kGone, 0, encode({.presence = Presence::kLeft}));
    } else {
      peers_[0].channel.post(TcpMessage::kBye, 0);
    }
    wake();
  }
  thread_.join();
}

void TcpHub::give(std::span<const std::byte> mine) {
  const Lock lock(mutex_);
  number_ += 1;
  all_.reset();
  if (config_.rank == 0) {
    peers_[0].part.emplace(mine.begin(), mine.end());
    peers_[0].member.arrived = number_;
    complete();
  } else {
    peers_[0].channel.post(TcpMessage::kPart, number_, mine);
  }
  wake();
}

std::optional<std::vector<std::byte>> TcpHub::take_all(Deadline deadline) {
  Lock lock(mutex_);
  const auto is_done = [this] { return is_over(); };
  // Who came while this process had no CPU has come in time.
  if (!Interruption::wait_until(changed_, lock, deadline, is_done)) wait_a_turn(lock);
  return std::exchange(all_, std::nullopt);
}

void TcpHub::give_up(const TcpDeparture& why) {
  const Lock lock(mutex_);
  if (config_.rank == 0) {
    tell_all(TcpMessage::kGone, 0, encode(why));
  } else {
    peers_[0].channel.post(TcpMessage::kGaveUp, number_, encode(why));
  }
  wake();
}

std::optional<std::vector<TcpMember>> TcpHub::ask(Deadline deadline) {
  const std::lock_guard one_question(asking_);
  Lock lock(mutex_);
  if (config_.rank == 0) {
    wait_a_turn(lock);
    return table();
  }
  answer_.reset();
  peers_[0].channel.post(TcpMessage::kWho, ++question_);
  wake();
  changed_.wait_until(lock, deadline, [this] { return answer_ || !peers_[0].channel.is_open(); });
  return std::exchange(answer_, std::nullopt);
}

std::map<int, TcpDeparture> TcpHub::gone() const {
  const Lock lock(mutex_);
  return gone_;
}

std::optional<Error> TcpHub::refusal() const {
  const Lock lock(mutex_);
  return refusal_;
}

int TcpHub::num_strangers() const {
  const Lock lock(mutex_);
  return reception_ ? reception_->num_strangers() : 0;
}

void TcpHub::set_progress(std::uint64_t progress) noexcept {
  const Lock lock(mutex_);
  if (progress <= progress_) return;
  progress_ = progress, has_news_ = true;
  wake();
}

void TcpHub::set_stop_word(std::uint64_t word) noexcept {
  const Lock lock(mutex_);
  if (stop_word_ != 0) return;
  stop_word_ = word, has_news_ = true;
  wake();
}

void TcpHub::wake() const {
  const std::uint64_t one = 1;
  (void)!write(bell_.get(), &one, sizeof(one));
}

/// Lets the thread look at every connection once more.
void TcpHub::wait_a_turn(Lock& lock) {
  // The turn under way may have looked already.
  const std::uint64_t until = turns_ + 2;
  turns_wanted_ = std::max(turns_wanted_, until);
  wake();
  changed_.wait_for(lock, kTurn, [&] { return turns_ >= until; });
}

void TcpHub::tell_all(TcpMessage kind, std::uint64_t number, std::span<const std::byte> payload) {
  const auto message = TcpChannel::make_message(kind, number, payload);
  for (std::size_t r = 1; r < peers_.size(); ++r) peers_[r].channel.post(message);
}

/// `rank` takes part no more; rank 0 tells the others.
void TcpHub::depart(int rank, TcpDeparture why) {
  if (!gone_.emplace(rank, why).second) return;  // The first word counts.
  if (config_.rank != 0) return;
  peers_[static_cast<std::size_t>(rank)].member.presence = why.presence;
  tell_all(TcpMessage::kGone, static_cast<std::uint64_t>(rank), encode(why));
}

/// The meeting is off, for a reason that all ranks are told.
void TcpHub::refuse(const Error& why) {
  if (!refusal_) refusal_ = why;
  const std::string text = why.what();
  if (config_.rank != 0) return;
  tell_all(TcpMessage::kRefusal, 0, std::as_bytes(std::span(text)));
  for (TcpChannel& channel : refused_) {
    channel.post(TcpMessage::kRefusal, 0, std::as_bytes(std::span(text)));
  }
}

std::vector<TcpMember> TcpHub::table() const {
  std::vector<TcpMember> members;
  const auto now = Clock::now();
  for (const Peer& peer : peers_) {
    TcpMember& member = members.emplace_back(peer.member);
    const auto silent = std::chrono::duration_cast<milliseconds>(now - peer.last_heard);
    if (member.presence != Presence::kAway && &peer != &peers_[0]) {
      member.silent_ms = static_cast<std::uint32_t>(silent.count());
    }
  }
  members[0].progress = progress_, members[0].stop_word = stop_word_;
  return members;
}

// --- The thread -------------------------------------------------------------------------------

void TcpHub::run() {
  Lock lock(mutex_);
  for (Deadline end = Deadline::max();;) {
    if (is_ending_) {
      end = std::min(end, Clock::now() + kLastWords);
      if (!finish() || Clock::now() >= end) return;
    }
    try {
      turn(lock);
    } catch (const Error& error) {
      // This process is short of something. The others learn why, and this rank hears no more.
      refuse(error);
      send_some();
      changed_.notify_all();
      return;
    }
    turns_ += 1;
    changed_.notify_all();
  }
}

/// This link goes: ends every connection whose last words are out. False once all the others have
/// heard theirs and closed.
bool TcpHub::finish() {
  bool is_any_open = false;
  const auto finish_one = [&](TcpChannel& channel) {
    if (!channel.has_output()) channel.finish();
    is_any_open |= channel.is_open();
  };
  for (Peer& peer : peers_) finish_one(peer.channel);
  std::ranges::for_each(refused_, finish_one);
  return is_any_open;
}

void TcpHub::send_some() {
  for (Peer& peer : peers_) {
    if (peer.channel.is_open()) (void)peer.channel.send_some();
  }
  for (TcpChannel& channel : refused_) (void)channel.send_some();
}

/// Sleeps until there is something to do, and does it.
void TcpHub::turn(Lock& lock) {
  Deadline until = std::min(next_beat_, Clock::now() + kBeat);
  if (is_ending_) until = std::min(until, Clock::now() + milliseconds(5));
  if (turns_ < turns_wanted_) until = Clock::now();
  std::vector<pollfd> entries = {{bell_.get(), POLLIN, 0}};
  const auto add = [&entries](const TcpChannel& channel) {
    const short out = channel.has_output() ? POLLOUT : 0;
    entries.push_back({channel.socket(), static_cast<short>(POLLIN | out), 0});
  };
  for (const Peer& peer : peers_) add(peer.channel);
  std::ranges::for_each(refused_, add);
  if (reception_) until = reception_->add_to(entries, until);
  lock.unlock();
  const int num_ready = poll(entries.data(), entries.size(), ms_until(until));
  const int reason = errno;
  lock.lock();
  if (num_ready < 0 && reason != EINTR) {
    fail(ErrorCode::kTransport, "poll: {}", std::strerror(reason));
  }
  std::uint64_t rings = 0;
  (void)!read(bell_.get(), &rings, sizeof(rings));
  for (std::size_t i = 0; i < peers_.size(); ++i) serve(static_cast<int>(i));
  for (TcpChannel& channel : refused_) {
    if (!channel.receive_some([](TcpMessage, std::uint64_t, const auto&) {})) channel.close();
  }
  if (reception_) {
    reception_->hear_all([this](Reception::Guest& guest) { take_in(guest); });
    // Whoever joined and has not said a word yet may have to join again.
    const auto is_silent = [](const Peer& p) { return p.member.arrived == 0; };
    if (std::ranges::none_of(peers_, is_silent)) reception_.reset();
  }
  // After all that had come was heard, so that nobody seems silent who was not.
  for (const auto& [rank, question] : std::exchange(questions_, {})) {
    const auto members = table();
    peers_[static_cast<std::size_t>(rank)].channel.post(TcpMessage::kTable, question,
                                                        std::as_bytes(std::span(members)));
  }
  beat();
  send_some();
}

/// Hears one connection. `rank`: index in peers_.
void TcpHub::serve(int rank) {
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  if (!peer.channel.is_open()) return;
  const auto hear_one = [&](TcpMessage kind, std::uint64_t number, std::vector<std::byte> bytes) {
    peer.last_heard = Clock::now();
    if (config_.rank == 0) {
      hear(rank, kind, number, std::move(bytes));
    } else {
      hear_rank_0(kind, number, std::move(bytes));
    }
  };
  if (peer.channel.receive_some(hear_one)) return;
  peer.channel.close();
  if (config_.rank == 0 && peer.member.arrived == 0 && !gone_.contains(rank)) {
    // It joined, and did not learn in time that it was accepted. It may come again.
    peer = Peer{};
    return;
  }
  depart(rank, {.presence = Presence::kEnded});
}

/// Rank 0 hears `rank`.
void TcpHub::hear(int rank, TcpMessage kind, std::uint64_t number, std::vector<std::byte> bytes) {
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  if (kind == TcpMessage::kPart) {
    peer.member.arrived = number;
    peer.part = std::move(bytes);
    complete();
  } else if (kind == TcpMessage::kBeat) {
    peer.member.progress = std::max(peer.member.progress, number);
    if (bytes.size() == sizeof(peer.member.stop_word)) {
      std::memcpy(&peer.member.stop_word, bytes.data(), bytes.size());
    }
  } else if (kind == TcpMessage::kWho) {
    questions_.emplace_back(rank, number);
  } else if (kind == TcpMessage::kGaveUp) {
    depart(rank, decode_departure(bytes));
  } else if (kind == TcpMessage::kBye) {
    depart(rank, {.presence = Presence::kLeft});
  }
}

void TcpHub::hear_rank_0(TcpMessage kind, std::uint64_t number, std::vector<std::byte> bytes) {
  if (kind == TcpMessage::kAll) {
    if (number == number_) all_ = std::move(bytes);
  } else if (kind == TcpMessage::kTable) {
    std::vector<TcpMember> members(static_cast<std::size_t>(config_.num_ranks));
    if (number != question_ || bytes.size() != members.size() * sizeof(TcpMember)) return;
    std::memcpy(members.data(), bytes.data(), bytes.size());
    answer_ = std::move(members);
  } else if (kind == TcpMessage::kGone) {
    const auto ranks = static_cast<std::uint64_t>(config_.num_ranks);
    const auto own = static_cast<std::uint64_t>(config_.rank);
    if (number < ranks && number != own) depart(static_cast<int>(number), decode_departure(bytes));
  } else if (kind == TcpMessage::kRefusal) {
    refuse({ErrorCode::kTransport,
            std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size())});
  }
}

/// Rank 0: has every part of the collective under way come? Then they go to everybody.
void TcpHub::complete() {
  const auto has_part = [this](const Peer& p) { return p.part && p.member.arrived == number_; };
  if (!std::ranges::all_of(peers_, has_part)) return;
  std::vector<std::vector<std::byte>> parts;
  for (Peer& peer : peers_) parts.push_back(std::move(*std::exchange(peer.part, std::nullopt)));
  auto all = pack(parts);
  if (all.size() > TcpChannel::kMaxBytes) {
    refuse({ErrorCode::kInvalidArgument,
            fmt::format("collective {} brings {} bytes of all ranks; at most {}", number_,
                        all.size(), TcpChannel::kMaxBytes)});
    return;
  }
  all_ = std::move(all);
  tell_all(TcpMessage::kAll, number_, *all_);
}

void TcpHub::take_in(Reception::Guest& guest) {
  const Join& join = guest.join;
  const auto r = static_cast<std::size_t>(join.rank);
  if (r > 0 && r < peers_.size()) serve(join.rank);  // The end of an attempt that it gave up.
  const bool is_taken = r < peers_.size() && peers_[r].member.presence != Presence::kAway;
  const std::string difference = difference_of(join, config_.num_ranks, is_taken);
  Answer answer{};
  answer.kind = AnswerKind::kAccept;
  answer.proof =
      prove(config_.secret, kTcpHost, guest.nonce, join.nonce, join.rank, join.num_ranks);
  // A new connection takes this much at once, or it is gone again, and will be missed.
  if (send_all(guest.socket.get(), std::as_bytes(std::span(&answer, 1)), Clock::now()) !=
      Io::kDone) {
    return;
  }
  if (!difference.empty()) {
    refused_.emplace_back(std::move(guest.socket));
    refuse({ErrorCode::kTransport, difference});
    return;
  }
  send_at_once(guest.socket.get());
  Peer& peer = peers_[r];
  peer.channel = TcpChannel(std::move(guest.socket));
  peer.member.presence = Presence::kHere;
  peer.last_heard = Clock::now();
  if (refusal_) refuse(*refusal_);
  if (is_ending_) {
    peer.channel.post(TcpMessage::kGone, 0, encode({.presence = Presence::kLeft}));
  }
}

/// Tells rank 0 that this rank is alive, and its news.
void TcpHub::beat() {
  const auto now = Clock::now();
  if (now < next_beat_ && !has_news_) return;
  next_beat_ = now + kBeat;
  has_news_ = false;
  if (config_.rank == 0) return;
  peers_[0].channel.post(TcpMessage::kBeat, progress_, std::as_bytes(std::span(&stop_word_, 1)));
}

}  // namespace sluice
