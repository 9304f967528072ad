// explore_model.h - what the explorer explores: ranks, where they are, and one state of them all.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "exchange/slot_rules.h"

namespace sluice::protocol {

using u8 = std::uint8_t;
inline constexpr int kMaxRanks = 3, kSlots = 2, kMaxSignals = 28;

inline constexpr int kReleased = static_cast<int>(Flag::kReleased);
inline constexpr int kKinds = static_cast<int>(Flag::kGathered) + 1;
inline constexpr const char* kKindName[] = {"counts",  "rows",   "outputs",
                                            "release", "pieces", "own rows"};
inline constexpr u8 kNothing = 0xff;
inline constexpr int kLayerBit = 1;  // Of a flag: two layers.

struct Model {
  int ranks = 2, operations = 6;
  std::vector<int> host_of = {};  // [ranks], or empty: one host, in one level
  bool low_latency = true, split = false, epochs = true, parity = false;
  bool flag_before_data = false, asks_for_release = true;
  bool relays_wait = true, sums_all = true;
  /// Operations are for two layers in turn. This rank leaves its third one out, so from then on its
  /// layers are the other ones; -1: nobody does.
  int skips = -1;
  bool names_layer = true;  // Flags do.

  [[nodiscard]] bool has_hosts() const { return !host_of.empty(); }
  [[nodiscard]] int host(int rank) const { return host_of[static_cast<std::size_t>(rank)]; }
  [[nodiscard]] int relay(int source, int of_host) const {
    std::vector<int> there;
    int local = 0;
    for (int r = 0; r < ranks; ++r) {
      if (host(r) == of_host) there.push_back(r);
      local += r < source && host(r) == host(source);
    }
    return there[static_cast<std::size_t>(local) % there.size()];
  }
  [[nodiscard]] bool relays_for(int rank, int source) const {
    return relay(source, host(rank)) == rank;
  }
  [[nodiscard]] u8 layer(int rank, u8 epoch) const {
    return skips < 0 ? u8{0} : static_cast<u8>((epoch + (rank == skips && epoch >= 3)) % 2);
  }
  /// Of a use: what its flags hold, and what its bytes are.
  [[nodiscard]] u8 use(int rank, u8 epoch) const {
    return flag_value<kLayerBit>(epoch, layer(rank, epoch));
  }
  /// Whether `other` is one of them for `rank`.
  [[nodiscard]] bool is_in(Reach reach, int rank, int other) const {
    if (!has_hosts()) return true;
    const bool is_mate = host(other) == host(rank);
    const bool is_relay = !is_mate && relays_for(other, rank);
    const bool is_source = !is_mate && relays_for(rank, other);
    if (reach == Reach::kMates) return is_mate;
    if (reach == Reach::kRelays) return is_relay;
    if (reach == Reach::kSources) return is_source;
    return is_mate || is_relay || is_source;
  }
  [[nodiscard]] bool awaits(int rank, Flag kind, int source) const {
    if (!sums_all && kind == Flag::kGathered && source != rank) return false;
    return is_in(awaited_from(kind), rank, source);
  }
};

/// A signal on its way, and the bytes put before it.
struct Signal {
  u8 from, to, slot, kind, use;  // kind: a Flag; use: Model::use()
  u8 uses[kMaxRanks];            // Of the bytes, by the rank that they are from; or kNothing.
  u8 parts;  // 1: the bytes are on their way, 2: the signal is, 4: it is a second copy
};

struct State {
  // A wait and the put that follows it are one step: nobody else can see what lies between.
  SlotTable<u8, kSlots> slots[kMaxRanks];
  u8 flag[kMaxRanks][kSlots][kKinds][kMaxRanks];   // [owner][slot][kind][source]
  u8 bytes[kMaxRanks][kSlots][kKinds][kMaxRanks];  // The use whose bytes lie there.
  u8 stopped;  // Ranks that have seen another layer's flag, a bit each.
  u8 copied, num_signals;
  Signal signals[kMaxSignals];
};

struct Digest {
  std::uint64_t a, b;
  bool operator==(const Digest&) const = default;
};
struct DigestHash {
  std::size_t operator()(const Digest& d) const { return d.a; }
};

/// Equal states only, for all that matters: 2^-80 for the millions of states here.
inline Digest digest_of(const State& s) {
  Digest d{0x243f6a8885a308d3, 0x13198a2e03707344};
  const auto* p = reinterpret_cast<const u8*>(&s);
  const std::size_t used = offsetof(State, signals) + s.num_signals * sizeof(Signal);
  for (std::size_t at = 0; at < used; at += sizeof(std::uint64_t)) {
    std::uint64_t word = 0;
    std::memcpy(&word, p + at, std::min(sizeof(word), used - at));
    d.a = (d.a ^ word) * 0x9e3779b97f4a7c15;
    d.a ^= d.a >> 29;
    d.b = (d.b + word + at + 1) * 0xd1342543de82ef95;
    d.b ^= d.b >> 31;
  }
  return d;
}

}  // namespace sluice::protocol
