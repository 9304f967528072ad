// host_protocol.h - slots, epochs and bounded waits of a host exchange; moves no rows itself.
//
// Epoch n is the n-th dispatch of this exchange, on every rank alike. A slot's flags carry the
// epoch of their last use, so a flag of an earlier use is never taken for this one's, and one of a
// later use is an error that is named. A rank writes into a peer's slot for epoch n only after that
// peer released the slot's use before n. The rules themselves are in slot_rules.h; calls that do
// not follow its steps are refused as bugs.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "exchange/host_layout.h"
#include "exchange/limits.h"
#include "sluice/error.h"
#include "sluice/transport.h"

namespace sluice {

class HostProtocol {
 public:
  HostProtocol(const ExchangeConfig& config, Transport& transport);

  [[nodiscard]] const HostLayout& layout() const noexcept { return layout_; }
  [[nodiscard]] int rank() const noexcept { return rank_; }
  /// Of the window there is, which the layout asked for.
  [[nodiscard]] std::size_t window_bytes() const noexcept { return window_->bytes(); }

  /// A slot in use for one epoch.
  struct Use {
    int slot = -1;
    std::uint64_t epoch = 0;
    const char* operation = "dispatch";  ///< For messages.
  };

  /// Takes the lowest free slot for the next epoch and waits until every peer has released its own.
  /// Throws: kInvalidArgument if all are in flight; kPeerTimeout.
  [[nodiscard]] Use begin();
  /// Tells every peer that this rank's slot may be written again. Never throws: a failed exchange
  /// stays failed, and peers find out by their own bounded waits.
  void release(Use use) noexcept;

  /// Throws: what the transport throws, with operation, epoch and rank.
  void put(const Use& use, int peer, std::size_t offset, std::span<const std::byte> data);
  /// Raises `kind` of this rank at `peer`, after everything put so far.
  void signal(const Use& use, int peer, Flag kind);
  /// Waits for `kind` of every rank. Throws: kPeerTimeout naming operation, epoch and ranks;
  /// kTransport if a flag is from a later epoch.
  void wait_for_all(const Use& use, Flag kind, const char* operation);

  /// This rank's own bytes of a slot.
  [[nodiscard]] std::byte* local(const Use& use) noexcept;

  /// Throws: kTransport if an earlier operation failed half-way, with that one's ranks: they may be
  /// out of step.
  void require_healthy() const;

  [[nodiscard]] const std::vector<std::uint64_t>& wait_ns() const noexcept { return wait_ns_; }
  [[nodiscard]] std::uint64_t last_epoch() const noexcept { return slots_.last_epoch; }

 private:
  /// Runs `step`; what the transport throws becomes this operation's failure, for good.
  template <class Step>
  auto guarded(const char* operation, std::uint64_t epoch, const Step& step);
  [[noreturn]] void stop(Error failure);
  [[nodiscard]] const ProtocolStep& next_step(const Use& use);
  void raise(const Use& use, int peer, Flag kind);
  void await(int slot, Flag kind, std::uint64_t epoch, std::uint64_t op_epoch,
             const char* operation);

  HostLayout layout_;
  int rank_;
  std::chrono::milliseconds timeout_;
  std::unique_ptr<Window> window_;
  std::span<const ProtocolStep> steps_;
  SlotTable<std::uint64_t, kMaxInFlight> slots_;
  std::vector<std::uint64_t> wait_ns_;  // [num_ranks]
  std::optional<Error> failure_;        // The first fatal one.
};

}  // namespace sluice
