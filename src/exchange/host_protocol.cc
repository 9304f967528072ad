#include "exchange/host_protocol.h"

#include <algorithm>
#include <utility>

#include "core/fail.h"
#include "exchange/impl.h"

namespace sluice {
namespace {

using namespace std::chrono_literals;

/// How often a wait with several hosts looks whom the other rank waits for.
constexpr std::chrono::milliseconds kLookEvery = 20ms;
// Flag::kWaitsFor: how often something was said, since flags only grow; then the rank plus one. The
// last word of a rank that stops for another layer: kStopped, its own layer, the other rank's
// layer, and that rank plus one.
constexpr int kRankBits = 24;
constexpr std::uint64_t kStopped = std::uint64_t{1} << 63;
constexpr int rank_of(std::uint64_t word) {
  return static_cast<int>(word & ((1u << kRankBits) - 1)) - 1;
}

std::unique_ptr<Window> make_window(Transport& transport, const SlotLayout& layout,
                                    std::chrono::milliseconds timeout) {
  try {
    return transport.make_window(layout.window_bytes(), layout.num_flags(), timeout);
  } catch (const Error& error) {
    fail_of_ranks(error.code(), error.ranks(), "creation: {}", error.what());
  }
}

}  // namespace

HostProtocol::HostProtocol(const SlotLayout& layout, std::span<const ProtocolStep> steps,
                           ProtocolPeers peers, std::chrono::milliseconds timeout,
                           Transport& transport, std::function<std::string(int)> name_of_layer)
    : layout_(layout),
      peers_(std::move(peers)),
      rank_(transport.rank()),
      timeout_(timeout),
      window_(make_window(transport, layout_, timeout_)),
      steps_(steps),
      name_of_layer_(std::move(name_of_layer)),
      wait_ns_(static_cast<std::size_t>(layout_.num_ranks)) {
  SLUICE_ASSERT(layout_.num_slots <= kMaxInFlight);
}

HostProtocol::Use HostProtocol::begin(int layer) {
  require_healthy();
  const int slot = slots_.free_slot(layout_.num_slots);
  check_argument(slot >= 0,
                 "{} dispatches are in flight, num_in_flight is {}: combine or destroy one first",
                 layout_.num_slots, layout_.num_slots);
  const Use next{
      .slot = slot, .epoch = slots_.last_epoch + 1, .layer = static_cast<std::uint64_t>(layer)};
  await(next, steps_[0].awaits, slots_.released_epoch(slot), "dispatch (waiting for a free slot)");
  const std::uint64_t taken = slots_.take(slot);
  SLUICE_ASSERT(taken == next.epoch);
  return next;
}

void HostProtocol::release(Use use) noexcept {
  slots_.release(use.slot);
  try {
    if (failure_) return;
    // From any step: a dispatch may be dropped.
    for (const int peer : peers_.peers) raise(use, peer, Flag::kReleased);
  } catch (const Error& error) {
    failure_ = error;
  }
}

/// This exchange is of no more use.
void HostProtocol::stop(Error failure) {
  throw failure_.emplace(std::move(failure));
}

int HostProtocol::blamed_for(int source) const {
  if (!peers_.has_hosts()) return source;
  const std::uint64_t said = window_->flag(layout_.flag(0, Flag::kWaitsFor, source));
  const int other = rank_of(said);
  return other < 0 || other == rank_ ? source : other;
}

void HostProtocol::say_waits_for(int other) {
  if (other == said_waits_for_) return;
  said_waits_for_ = other;
  const std::uint64_t value = ++num_said_ << kRankBits | static_cast<std::uint64_t>(other + 1);
  for (const int peer : peers_.of(raised_at(Flag::kWaitsFor))) {
    if (peer != rank_) window_->signal(peer, layout_.flag(0, Flag::kWaitsFor, rank_), value);
  }
}

template <class Step>
auto HostProtocol::guarded(const char* operation, std::uint64_t epoch, const Step& step) {
  try {
    return step();
  } catch (const Error& error) {
    // A transport knows ranks, and not on which hosts they are.
    std::string text = error.what();
    for (const int lost : error.ranks()) {
      if (peers_.has_hosts()) text += fmt::format("; rank {}", peers_.name(lost));
    }
    stop({error.code(),
          fmt::format("{}, epoch {}, rank {}: {}", operation, epoch, peers_.name(rank_), text),
          error.ranks()});
  }
}

void HostProtocol::put(const Use& use, int peer, std::size_t offset,
                       std::span<const std::byte> data) {
  guarded(use.operation, use.epoch, [&] {
    window_->put(peer, static_cast<std::size_t>(use.slot) * layout_.slot_bytes + offset, data);
  });
}

const ProtocolStep& HostProtocol::next_step(const Use& use) {
  const std::size_t step = ++slots_.step[use.slot];
  SLUICE_ASSERT(step < steps_.size());
  return steps_[step];
}

void HostProtocol::signal(const Use& use, int peer, Flag kind) {
  if (steps_[slots_.step[use.slot]].raises != kind) {
    const ProtocolStep& step = next_step(use);
    SLUICE_ASSERT(step.awaits == Flag::kNone && step.raises == kind);
  }
  raise(use, peer, kind);
}

void HostProtocol::signal_all(const Use& use, Flag kind) {
  for (const int peer : peers_.of(raised_at(kind))) signal(use, peer, kind);
}

void HostProtocol::raise(const Use& use, int peer, Flag kind) {
  guarded(use.operation, use.epoch, [&] {
    window_->signal(peer, layout_.flag(use.slot, kind, rank_), flag_value(use.epoch, use.layer));
  });
}

void HostProtocol::wait_for_all(const Use& use, Flag kind, const char* operation) {
  SLUICE_ASSERT(next_step(use).awaits == kind);
  await(use, kind, use.epoch, operation);
  OtherLayers others;
  for (const int source : peers_.of(awaited_from(kind))) {
    const std::uint64_t seen = window_->flag(layout_.flag(use.slot, kind, source));
    if (is_for_another_layer(seen, use.epoch, use.layer)) others.emplace(source, layer_of(seen));
    if (!is_out_of_step(seen, use.epoch)) continue;
    stop(
        {ErrorCode::kTransport,
         fmt::format("{} on rank {}: rank {} is at epoch {}, expected {}: ranks made "
                     "different calls",
                     operation, peers_.name(rank_), peers_.name(source), epoch_of(seen), use.epoch),
         {source}});
  }
  if (!others.empty()) stop_for(others, use, operation);
}

void HostProtocol::stop_for(const OtherLayers& others, const Use& use, const char* operation) {
  if (peers_.has_hosts()) {  // On one host everybody has seen everybody's flag.
    const auto& [rank, layer] = *others.begin();
    const std::uint64_t word = kStopped | use.layer << (kRankBits + kLayerBits) |
                               layer << kRankBits | static_cast<std::uint64_t>(rank + 1);
    guarded(operation, use.epoch, [&] {
      for (const int peer : peers_.of(raised_at(Flag::kWaitsFor))) {
        if (peer != rank_) window_->signal(peer, layout_.flag(0, Flag::kWaitsFor, rank_), word);
      }
    });
  }
  std::map<std::uint64_t, std::string> ranks_of_layer;
  std::vector<int> ranks;
  for (const auto& [rank, layer] : others) {
    std::string& names = ranks_of_layer[layer];
    names += (names.empty() ? "" : ", ") + peers_.name(rank);
    ranks.push_back(rank);
  }
  std::vector<std::pair<std::string, std::string>> named;
  for (const auto& [layer, names] : ranks_of_layer) {
    named.emplace_back(names, name_of_layer_(static_cast<int>(layer)));
  }
  const std::string own = name_of_layer_(static_cast<int>(use.layer));
  stop({ErrorCode::kTransport,
        fmt::format("{}, epoch {}, rank {}: {}", operation, use.epoch, peers_.name(rank_),
                    different_calls(named, peers_.name(rank_), own)),
        std::move(ranks)});
}

void HostProtocol::heed_stop_of(int source, const Use& use, const char* operation) {
  const std::uint64_t word = window_->flag(layout_.flag(0, Flag::kWaitsFor, source));
  if ((word & kStopped) == 0) return;
  const std::uint64_t theirs = layer_of((word & ~kStopped) >> (kRankBits + kLayerBits));
  const std::uint64_t others = layer_of(word >> kRankBits);
  // Of two layers that differ, one at least is not this rank's.
  if (others != use.layer) stop_for({{rank_of(word), others}}, use, operation);
  stop_for({{source, theirs}}, use, operation);
}

std::optional<int> HostProtocol::layer_ahead(int source) const {
  for (int slot = 0; slot < layout_.num_slots; ++slot) {
    for (const ProtocolStep& step : steps_) {
      if (step.raises == Flag::kNone || step.raises == Flag::kReleased) continue;
      const std::uint64_t seen = window_->flag(layout_.flag(slot, step.raises, source));
      if (epoch_of(seen) > slots_.last_epoch) return static_cast<int>(layer_of(seen));
    }
  }
  return {};
}

bool HostProtocol::arrives(int source, int flag, std::uint64_t epoch, const Use& use,
                           const char* operation, std::chrono::steady_clock::time_point deadline) {
  const auto wait_until = [&](std::chrono::steady_clock::time_point until) {
    return guarded(operation, use.epoch, [&] {
      const std::uint64_t least = flag_value(epoch, std::uint64_t{0});
      return window_->wait_flags(std::span(&flag, 1), least, until).empty();
    });
  };
  if (!peers_.has_hosts()) return wait_until(deadline);
  while (!wait_until(std::min(deadline, std::chrono::steady_clock::now() + kLookEvery))) {
    heed_stop_of(source, use, operation);
    if (std::chrono::steady_clock::now() >= deadline) return false;
    guarded(operation, use.epoch, [&] { say_waits_for(blamed_for(source)); });
  }
  return true;
}

void HostProtocol::await(const Use& use, Flag kind, std::uint64_t epoch, const char* operation) {
  const auto start = std::chrono::steady_clock::now();
  const auto deadline = start + timeout_;
  // One source after another: the time until each arrived is what it kept us waiting.
  std::string missing;
  std::vector<int> missing_ranks;
  for (const int source : peers_.of(awaited_from(kind))) {
    const auto before = std::chrono::steady_clock::now();
    const int flag = layout_.flag(use.slot, kind, source);
    const bool late = !arrives(source, flag, epoch, use, operation, deadline);
    const auto waited = std::chrono::steady_clock::now() - before;
    wait_ns_[static_cast<std::size_t>(source)] += static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count());
    if (!late) {
      // Whom this rank gives up for stays said.
      if (missing.empty()) guarded(operation, use.epoch, [&] { say_waits_for(-1); });
      continue;
    }
    const int lost = blamed_for(source);
    missing += lost == source ? fmt::format(" {} (expected {}, seen {})", peers_.name(source),
                                            epoch, epoch_of(window_->flag(flag)))
                              : fmt::format(" {} (for which rank {} waits)", peers_.name(lost),
                                            peers_.name(source));
    missing_ranks.push_back(lost);
  }
  if (missing.empty()) return;
  std::ranges::sort(missing_ranks);
  missing_ranks.erase(std::ranges::unique(missing_ranks).begin(), missing_ranks.end());
  stop({ErrorCode::kPeerTimeout,
        fmt::format("{}, epoch {}, rank {}: after {} ms still missing rank(s){}", operation,
                    use.epoch, peers_.name(rank_), timeout_.count(), missing),
        std::move(missing_ranks)});
}

std::byte* HostProtocol::local(const Use& use) noexcept {
  return window_->local() + static_cast<std::size_t>(use.slot) * layout_.slot_bytes;
}

void HostProtocol::require_healthy() const {
  if (!failure_) return;
  fail_of_ranks(ErrorCode::kTransport, failure_->ranks(),
                "this exchange failed earlier and its ranks may be out of step: {}",
                failure_->what());
}

}  // namespace sluice
