#include "exchange/host_protocol.h"

#include <numeric>

#include "core/fail.h"

namespace sluice {
namespace {

std::unique_ptr<Window> make_window(Transport& transport, const HostLayout& layout,
                                    std::chrono::milliseconds timeout) {
  try {
    return transport.make_window(layout.window_bytes(), layout.num_flags(), timeout);
  } catch (const Error& error) {
    fail_of_ranks(error.code(), error.ranks(), "creation: {}", error.what());
  }
}

}  // namespace

HostProtocol::HostProtocol(const ExchangeConfig& config, Transport& transport)
    : layout_(config, transport.num_ranks()),
      rank_(transport.rank()),
      timeout_(config.peer_timeout),
      window_(make_window(transport, layout_, timeout_)),
      steps_(protocol_steps(config.mode == Mode::kLowLatency)),
      wait_ns_(static_cast<std::size_t>(layout_.num_ranks)) {
  SLUICE_ASSERT(layout_.num_slots <= kMaxInFlight);
}

HostProtocol::Use HostProtocol::begin() {
  require_healthy();
  const int slot = slots_.free_slot(layout_.num_slots);
  check_argument(slot >= 0,
                 "{} dispatches are in flight, num_in_flight is {}: combine or destroy one first",
                 layout_.num_slots, layout_.num_slots);
  await(slot, steps_[0].awaits, slots_.released_epoch(slot), slots_.last_epoch + 1,
        "dispatch (waiting for a free slot)");
  return {.slot = slot, .epoch = slots_.take(slot)};
}

void HostProtocol::release(Use use) noexcept {
  slots_.release(use.slot);
  try {
    if (failure_) return;
    // From any step: a dispatch may be dropped.
    for (int peer = 0; peer < layout_.num_ranks; ++peer) raise(use, peer, Flag::kReleased);
  } catch (const Error& error) {
    failure_ = error;
  }
}

/// This exchange is of no more use.
void HostProtocol::stop(Error failure) {
  throw failure_.emplace(std::move(failure));
}

template <class Step>
auto HostProtocol::guarded(const char* operation, std::uint64_t epoch, const Step& step) {
  try {
    return step();
  } catch (const Error& error) {
    stop({error.code(),
          fmt::format("{}, epoch {}, rank {}: {}", operation, epoch, rank_, error.what()),
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

void HostProtocol::raise(const Use& use, int peer, Flag kind) {
  guarded(use.operation, use.epoch,
          [&] { window_->signal(peer, layout_.flag(use.slot, kind, rank_), use.epoch); });
}

void HostProtocol::wait_for_all(const Use& use, Flag kind, const char* operation) {
  SLUICE_ASSERT(next_step(use).awaits == kind);
  await(use.slot, kind, use.epoch, use.epoch, operation);
  for (int source = 0; source < layout_.num_ranks; ++source) {
    const std::uint64_t seen = window_->flag(layout_.flag(use.slot, kind, source));
    if (!is_out_of_step(seen, use.epoch)) continue;
    stop({ErrorCode::kTransport,
          fmt::format("{} on rank {}: rank {} is at epoch {}, expected {}: ranks made "
                      "different calls",
                      operation, rank_, source, seen, use.epoch),
          {source}});
  }
}

void HostProtocol::await(int slot, Flag kind, std::uint64_t epoch, std::uint64_t op_epoch,
                         const char* operation) {
  const auto start = std::chrono::steady_clock::now();
  const auto deadline = start + timeout_;
  std::vector<int> flags(static_cast<std::size_t>(layout_.num_ranks));
  std::iota(flags.begin(), flags.end(), layout_.flag(slot, kind, 0));
  // One source after another: the time until each arrived is what it kept us waiting.
  std::string missing;
  std::vector<int> missing_ranks;
  for (int source = 0; source < layout_.num_ranks; ++source) {
    const auto before = std::chrono::steady_clock::now();
    const int flag = flags[static_cast<std::size_t>(source)];
    const bool late = guarded(operation, op_epoch, [&] {
      return !window_->wait_flags(std::span(&flag, 1), epoch, deadline).empty();
    });
    const auto waited = std::chrono::steady_clock::now() - before;
    wait_ns_[static_cast<std::size_t>(source)] += static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(waited).count());
    if (!late) continue;
    missing += fmt::format(" {} (expected {}, seen {})", source, epoch, window_->flag(flag));
    missing_ranks.push_back(source);
  }
  if (missing.empty()) return;
  stop({ErrorCode::kPeerTimeout,
        fmt::format("{}, epoch {}, rank {}: after {} ms still missing rank(s){}", operation,
                    op_epoch, rank_, timeout_.count(), missing),
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
