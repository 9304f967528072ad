// explore_model.h - what the explorer explores: ranks, where they are, and one state of them all.
#pragma once

#include <cstddef>
#include <cstdint>
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

struct Model {
  int ranks = 2, operations = 6;
  std::vector<int> host_of = {};  // [ranks], or empty: one host, in one level
  bool low_latency = true, split = false, epochs = true, parity = false;
  bool flag_before_data = false, asks_for_release = true;
  bool relays_wait = true, sums_all = true;

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
  u8 from, to, slot, kind, epoch;  // kind: a Flag
  u8 uses[kMaxRanks];              // Of the bytes, by the rank that they are from; or kNothing.
  u8 parts;  // 1: the bytes are on their way, 2: the signal is, 4: it is a second copy
};

struct State {
  // A wait and the put that follows it are one step: nobody else can see what lies between.
  SlotTable<u8, kSlots> slots[kMaxRanks];
  u8 flag[kMaxRanks][kSlots][kKinds][kMaxRanks];   // [owner][slot][kind][source]
  u8 bytes[kMaxRanks][kSlots][kKinds][kMaxRanks];  // The use whose bytes lie there.
  u8 copied, num_signals;
  Signal signals[kMaxSignals];
};

}  // namespace sluice::protocol
