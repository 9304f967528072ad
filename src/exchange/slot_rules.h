// slot_rules.h - the rules of slots, epochs and flags, without bytes, waits or peers.
//
// HostProtocol follows them, and tests/protocol explores every order of events under them: the same
// code, so that what is proven is what runs.
#pragma once

#include <cstdint>
#include <span>

namespace sluice {

/// What a flag says; each source rank has one of each in every slot. Values are those of
/// flag_value(): the epoch, and for which layer the source's dispatch of that epoch is.
enum class Flag : std::uint8_t {
  kCounts,      ///< Low-latency: the source's row counts have arrived.
  kDispatched,  ///< All rows of the source have arrived.
  kCombined,    ///< All expert outputs the source owed this rank have arrived.
  kReleased,    ///< The source is done with its own slot: it may be written for a later epoch.
  // With several hosts:
  kSent,      ///< The source's token copies for this host have arrived at their relay.
  kGathered,  ///< All expert outputs that the source owes this rank's tokens and sources are here.
  kWaitsFor,  ///< Whom a wait of the source depends on, as HostProtocol encodes it; no epoch.
  kNone,      ///< No flag.
};
inline constexpr int kFlagKinds = 4;          ///< Of an exchange on one host: the first ones.
inline constexpr int kTwoLevelFlagKinds = 7;  ///< With several hosts.

/// A part of an operation: a rank waits for a flag of every rank, then puts its bytes and raises
/// one at every rank.
struct ProtocolStep {
  Flag awaits, raises;
};

inline constexpr ProtocolStep kLowLatencySteps[] = {{Flag::kReleased, Flag::kCounts},
                                                    {Flag::kCounts, Flag::kDispatched},
                                                    {Flag::kDispatched, Flag::kNone},
                                                    {Flag::kNone, Flag::kCombined},
                                                    {Flag::kCombined, Flag::kReleased}};
inline constexpr ProtocolStep kNormalSteps[] = {{Flag::kReleased, Flag::kDispatched},
                                                {Flag::kDispatched, Flag::kNone},
                                                {Flag::kNone, Flag::kCombined},
                                                {Flag::kCombined, Flag::kReleased}};
/// From the taking of a slot to its release. Where nothing is awaited, between dispatch and
/// combine, the experts run and other operations may begin.
[[nodiscard]] constexpr std::span<const ProtocolStep> protocol_steps(bool low_latency) {
  return low_latency ? std::span<const ProtocolStep>(kLowLatencySteps) : kNormalSteps;
}

// With several hosts: over the network to the relays, then inside the host; back the other way.
inline constexpr ProtocolStep kTwoLevelLowLatencySteps[] = {
    {Flag::kReleased, Flag::kSent},     {Flag::kSent, Flag::kCounts},
    {Flag::kCounts, Flag::kDispatched}, {Flag::kDispatched, Flag::kNone},
    {Flag::kNone, Flag::kGathered},     {Flag::kGathered, Flag::kCombined},
    {Flag::kCombined, Flag::kReleased}};
inline constexpr ProtocolStep kTwoLevelNormalSteps[] = {
    {Flag::kReleased, Flag::kSent},     {Flag::kSent, Flag::kDispatched},
    {Flag::kDispatched, Flag::kNone},   {Flag::kNone, Flag::kGathered},
    {Flag::kGathered, Flag::kCombined}, {Flag::kCombined, Flag::kReleased}};
[[nodiscard]] constexpr std::span<const ProtocolStep> two_level_steps(bool low_latency) {
  return low_latency ? std::span<const ProtocolStep>(kTwoLevelLowLatencySteps)
                     : kTwoLevelNormalSteps;
}

/// Whose flag a rank awaits, and at whom it raises its own.
enum class Reach : std::uint8_t {
  kPeers,    ///< All ranks that write into this rank's slot, or it into theirs: the three below.
  kMates,    ///< The ranks of its host, itself included.
  kRelays,   ///< Its relay on every other host.
  kSources,  ///< The ranks of other hosts whose relay it is.
};
/// With several hosts. On one host all ranks are peers and mates.
[[nodiscard]] constexpr Reach awaited_from(Flag kind) {
  if (kind == Flag::kSent) return Reach::kSources;
  if (kind == Flag::kCombined) return Reach::kRelays;
  return kind == Flag::kReleased || kind == Flag::kWaitsFor ? Reach::kPeers : Reach::kMates;
}
[[nodiscard]] constexpr Reach raised_at(Flag kind) {
  if (kind == Flag::kSent) return Reach::kRelays;
  if (kind == Flag::kCombined) return Reach::kSources;
  return kind == Flag::kReleased || kind == Flag::kWaitsFor ? Reach::kPeers : Reach::kMates;
}

inline constexpr int kLayerBits = 16;  ///< Of a flag, for Routing::layer.

/// What a flag of `epoch` holds. It grows with the epoch, whatever the layers are.
template <int kBits = kLayerBits, class Value>
[[nodiscard]] constexpr Value flag_value(Value epoch, Value layer) {
  return static_cast<Value>(static_cast<Value>(epoch << kBits) | layer);
}
template <int kBits = kLayerBits, class Value>
[[nodiscard]] constexpr Value epoch_of(Value flag) {
  return static_cast<Value>(flag >> kBits);
}
template <int kBits = kLayerBits, class Value>
[[nodiscard]] constexpr Value layer_of(Value flag) {
  return static_cast<Value>(flag & ((Value{1} << kBits) - 1));
}

/// A flag of epoch n or later says that epoch n is there: an earlier use's cannot.
template <int kBits = kLayerBits, class Value>
[[nodiscard]] constexpr bool has_arrived(Value flag, Value epoch) {
  return flag >= flag_value<kBits>(epoch, Value{0});
}
/// A flag that has gone past means that ranks made different calls.
template <int kBits = kLayerBits, class Value>
[[nodiscard]] constexpr bool is_out_of_step(Value flag, Value epoch) {
  return epoch_of<kBits>(flag) > epoch;
}
/// So does a flag of the same epoch for another layer: what it announces is not this call's.
template <int kBits = kLayerBits, class Value>
[[nodiscard]] constexpr bool is_for_another_layer(Value flag, Value epoch, Value layer) {
  return epoch_of<kBits>(flag) == epoch && layer_of<kBits>(flag) != layer;
}

/// A rank's own slots. Epoch n is its n-th operation, on every rank alike.
template <class Epoch, int kMaxSlots>
struct SlotTable {
  Epoch last_epoch = 0;
  Epoch epoch[kMaxSlots] = {};        ///< Of each slot's last use; 0: never used.
  std::uint8_t step[kMaxSlots] = {};  ///< Into protocol_steps(), while busy.
  bool busy[kMaxSlots] = {};

  /// The lowest free one, on every rank the same; -1 if all are in flight.
  [[nodiscard]] constexpr int free_slot(int num_slots) const {
    for (int slot = 0; slot < num_slots; ++slot) {
      if (!busy[slot]) return slot;
    }
    return -1;
  }
  /// Before a slot's next use every peer's kReleased must say its last.
  [[nodiscard]] constexpr Epoch released_epoch(int slot) const { return epoch[slot]; }
  /// After every peer released it. Returns the epoch of this use.
  constexpr Epoch take(int slot) {
    busy[slot] = true, step[slot] = 0;
    return epoch[slot] = ++last_epoch;
  }
  constexpr void release(int slot) { busy[slot] = false; }
};

}  // namespace sluice
