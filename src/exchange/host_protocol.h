// host_protocol.h - slots, epochs and bounded waits of a host exchange; moves no rows itself.
//
// Epoch n is the n-th dispatch of this exchange, on every rank alike. A slot's flags carry the
// epoch of their last use, so a flag of an earlier use is never taken for this one's, and one of a
// later use is an error that is named. A rank writes into a peer's slot for epoch n only after that
// peer released the slot's use before n. The rules themselves are in slot_rules.h; calls that do
// not follow its steps are refused as bugs.
//
// With several hosts a rank often waits for one that itself waits for a lost rank. So a rank that
// has waited for a while tells its peers whom its wait depends on in the end, by a flag of its own,
// until the wait ends. Whoever runs out of time blames that rank, and not the one in between. By
// the same flag a rank that stops because another one dispatches for another layer says so, and
// those who wait for it stop as well.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "exchange/host_layout.h"
#include "exchange/limits.h"
#include "exchange/protocol_peers.h"
#include "sluice/error.h"
#include "sluice/transport.h"

namespace sluice {

class HostProtocol {
 public:
  /// Makes the window, which is collective: layouts and steps are the same on every rank.
  /// name_of_layer: of a Routing::layer, for messages.
  HostProtocol(const SlotLayout& layout, std::span<const ProtocolStep> steps, ProtocolPeers peers,
               std::chrono::milliseconds timeout, Transport& transport,
               std::function<std::string(int)> name_of_layer);

  [[nodiscard]] int rank() const noexcept { return rank_; }
  /// Of the window there is, which the layout asked for.
  [[nodiscard]] std::size_t window_bytes() const noexcept { return window_->bytes(); }

  /// A slot in use for one epoch.
  struct Use {
    int slot = -1;
    std::uint64_t epoch = 0;
    std::uint64_t layer = 0;             ///< Routing::layer
    const char* operation = "dispatch";  ///< For messages.
  };

  /// With whom this rank exchanges flags.
  [[nodiscard]] const ProtocolPeers& peers() const noexcept { return peers_; }

  /// Takes the lowest free slot for the next epoch and waits until every peer has released its own.
  /// Throws: kInvalidArgument if all are in flight; kPeerTimeout.
  [[nodiscard]] Use begin(int layer);
  /// Tells every peer that this rank's slot may be written again. Never throws: a failed exchange
  /// stays failed, and peers find out by their own bounded waits.
  void release(Use use) noexcept;

  /// Throws: what the transport throws, with operation, epoch and rank.
  void put(const Use& use, int peer, std::size_t offset, std::span<const std::byte> data);
  /// Raises `kind` of this rank at `peer`, after everything put so far.
  void signal(const Use& use, int peer, Flag kind);
  /// Raises `kind` at every rank that awaits it.
  void signal_all(const Use& use, Flag kind);
  /// Waits for `kind` of every rank that raises it here: on one host, of every rank.
  /// Throws: kPeerTimeout naming operation, epoch and ranks; kTransport if a flag is from a later
  /// epoch, or for another layer.
  void wait_for_all(const Use& use, Flag kind, const char* operation);

  /// This rank's own bytes of a slot.
  [[nodiscard]] std::byte* local(const Use& use) noexcept;

  /// Throws: kTransport if an earlier operation failed half-way, with that one's ranks: they may be
  /// out of step.
  void require_healthy() const;

  [[nodiscard]] const std::vector<std::uint64_t>& wait_ns() const noexcept { return wait_ns_; }
  /// Exchange::Impl::layer_ahead()
  [[nodiscard]] std::optional<int> layer_ahead(int source) const;

 private:
  /// Runs `step`; what the transport throws becomes this operation's failure, for good.
  template <class Step>
  auto guarded(const char* operation, std::uint64_t epoch, const Step& step);
  [[noreturn]] void stop(Error failure);
  /// The layers that other ranks dispatch for, by rank: not for this rank's.
  using OtherLayers = std::map<int, std::uint64_t>;
  [[noreturn]] void stop_for(const OtherLayers& others, const Use& use, const char* operation);
  [[nodiscard]] const ProtocolStep& next_step(const Use& use);
  void raise(const Use& use, int peer, Flag kind);
  /// Waits for `kind` of an `epoch` of the use's slot.
  void await(const Use& use, Flag kind, std::uint64_t epoch, const char* operation);
  /// Waits for `flag` of `source`; false at the deadline.
  [[nodiscard]] bool arrives(int source, int flag, std::uint64_t epoch, const Use& use,
                             const char* operation, std::chrono::steady_clock::time_point deadline);
  /// Throws if `source` has said that it stopped for another layer.
  void heed_stop_of(int source, const Use& use, const char* operation);
  /// Whom a wait for `source` depends on: whom it says that it waits for, else itself.
  [[nodiscard]] int blamed_for(int source) const;
  /// Tells the peers; -1: nobody any more.
  void say_waits_for(int other);

  SlotLayout layout_;
  ProtocolPeers peers_;
  int rank_;
  std::chrono::milliseconds timeout_;
  std::unique_ptr<Window> window_;
  std::span<const ProtocolStep> steps_;
  SlotTable<std::uint64_t, kMaxInFlight> slots_;
  std::function<std::string(int)> name_of_layer_;
  std::vector<std::uint64_t> wait_ns_;  // [num_ranks]
  int said_waits_for_ = -1;
  std::uint64_t num_said_ = 0;
  std::optional<Error> failure_;  // The first fatal one.
};

}  // namespace sluice
