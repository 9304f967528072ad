// Every order in which the ranks of a host exchange and their signals can run, for few ranks and
// operations: the slots, flags, epochs and steps of src/exchange/slot_rules.h, which the exchange
// follows, without the bytes themselves.
//
//   explore --ranks 2 --operations 6 [--mode normal] [--split] [--mutant M]
//   explore --hosts 0,0,1 --operations 3 [...]      three ranks: two on host 0, one on host 1
//   explore ... --skip 1     rank 1 leaves out its third operation, where layers take turns
//
// Two slots, two operations in flight (docs/exchange.md). Signals on their way arrive in
// any order, also those of one pair of ranks; one signal arrives a second time, arbitrarily late (a
// stale write). Puts arrive before their signal; with --split at any moment before it, else at the
// worst one for each check: for overwriting, when they are sent, for reading, with their signal.
// Checked in every state that can be reached:
//
//   - whoever takes a buffer for complete finds there the bytes of this use, from every rank
//   - no put reaches a buffer that its owner still reads for an earlier use
//   - no flag of a later use is seen;  some step is possible until all ranks are done
//
// With hosts, what a relay passes on is what lies in its own buffers when it does, so bytes of
// another use travel on, and whoever takes them in the end finds them.
//
// With a rank that skips, nobody takes bytes of another layer for its own, and all ranks stop (with
// hosts at least one does; that the others hear of it is HostProtocol's).
//
// Mutants: no-epoch (a flag is a mere "ready"), parity (one bit of the use), flag-before-data,
// no-release (slots are reused without asking); with hosts also relay-early (a relay passes on
// before the pieces came) and missed-rank (a relay adds up without waiting for its last mate); with
// a rank that skips also no-layer (flags say only the epoch).
// Exits with 0 if nothing is violated, else with 1 after printing the steps that lead there.
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "explore_model.h"

namespace {

using namespace sluice::protocol;
using sluice::Flag, sluice::ProtocolStep, sluice::Reach;

struct Violation {
  std::string text;
};

class Explorer {
 public:
  explicit Explorer(const Model& model)
      : m_(model),
        steps_(model.has_hosts() ? sluice::two_level_steps(model.low_latency)
                                 : sluice::protocol_steps(model.low_latency)) {
    seen_.reserve(1 << 22);
  }

  /// Explores everything; throws Violation with path() leading to it.
  void run() {
    const State start = {};
    visit(start, [] { return std::string("start"); });
  }
  [[nodiscard]] std::size_t num_states() const { return seen_.size(); }
  [[nodiscard]] std::string path() const {
    std::string text;
    for (const std::string& step : path_) text += "  " + step + "\n";
    return text;
  }

 private:
  /// `describe()`: the step that led here.
  template <class Describe>
  void visit(const State& s, const Describe& describe) {
    if (!seen_.insert(digest_of(s)).second) return;
    path_.push_back(describe());
    bool any = false;
    for (int r = 0; r < m_.ranks; ++r) any |= !has_stopped(s, r) && advance(s, r);
    for (int i = 0; i < s.num_signals; ++i) any |= deliver(s, i);
    if (!any) check_end(s);
    path_.pop_back();
  }

  [[nodiscard]] static bool has_stopped(const State& s, int r) { return s.stopped >> r & 1; }
  void check_end(const State& s) const {
    const int all = (1 << m_.ranks) - 1;
    if (m_.skips < 0 ? all_done(s) : m_.has_hosts() ? s.stopped != 0 : s.stopped == all) return;
    throw Violation{m_.skips < 0 ? "deadlock: no step is possible"
                                 : fmt::format("ranks {:b} stopped, not all of them", s.stopped)};
  }

  [[nodiscard]] bool all_done(const State& s) const {
    for (int r = 0; r < m_.ranks; ++r) {
      if (s.slots[r].last_epoch < m_.operations) return false;
      for (const bool busy : s.slots[r].busy) {
        if (busy) return false;
      }
    }
    return true;
  }

  [[nodiscard]] bool arrived(u8 flag, u8 epoch) const {
    const auto use = [](u8 e) { return (e - 1) / kSlots; };
    const u8 seen = sluice::epoch_of<kLayerBit>(flag);
    if (m_.parity) return flag != 0 && use(seen) % 2 == use(epoch) % 2;
    return m_.epochs ? sluice::has_arrived<kLayerBit>(flag, epoch) : flag != 0;
  }

  /// Once all have arrived: whether one of them is for another layer.
  [[nodiscard]] bool sees_another_layer(const State& s, int r, int slot, Flag kind) const {
    if (kind == Flag::kNone || !m_.names_layer) return false;
    const u8 epoch = s.slots[r].epoch[slot];
    bool all = true, differs = false;
    for (int source = 0; source < m_.ranks; ++source) {
      if (!m_.awaits(r, kind, source)) continue;
      const u8 flag = s.flag[r][slot][static_cast<int>(kind)][source];
      all &= arrived(flag, epoch);
      differs |= sluice::is_for_another_layer<kLayerBit>(flag, epoch, m_.layer(r, epoch));
    }
    return all && differs;
  }

  /// All who are awaited have raised `kind`; then what they announced must be there.
  [[nodiscard]] bool all_arrived(const State& s, int r, int slot, int kind) const {
    const u8 epoch = s.slots[r].epoch[slot];
    const auto flag_kind = static_cast<Flag>(kind);
    for (int source = 0; source < m_.ranks; ++source) {
      if (!m_.awaits(r, flag_kind, source)) continue;
      if (!arrived(s.flag[r][slot][kind][source], epoch)) return false;
    }
    for (int source = 0; source < m_.ranks; ++source) {
      if (!m_.awaits(r, flag_kind, source)) continue;
      const u8 flag = s.flag[r][slot][kind][source];
      if (m_.epochs && !m_.parity && sluice::is_out_of_step<kLayerBit>(flag, epoch)) {
        throw Violation{fmt::format("rank {} sees epoch {} of rank {} during {}", r,
                                    sluice::epoch_of<kLayerBit>(flag), source, epoch)};
      }
    }
    if (kind != kReleased) expect_all_bytes(s, r, slot, flag_kind);
    return true;
  }

  /// Counts and rows come from every rank, the others from those who are awaited. A relay that
  /// adds up does not look: who gets the sum finds what is missing.
  void expect_all_bytes(const State& s, int r, int slot, Flag kind) const {
    const bool is_of_all = kind == Flag::kCounts || kind == Flag::kDispatched;
    for (int source = 0; source < m_.ranks; ++source) {
      if (is_of_all || m_.awaits(r, kind, source)) {
        expect_bytes(s, r, slot, static_cast<int>(kind), source);
      }
    }
  }

  void expect_bytes(const State& s, int r, int slot, int kind, int source) const {
    const u8 there = s.bytes[r][slot][kind][source];
    const u8 own = m_.use(r, s.slots[r].epoch[slot]);
    if (there == own) return;
    const auto name = [this](u8 use) {
      const u8 epoch = sluice::epoch_of<kLayerBit>(use);
      return m_.skips < 0 ? fmt::format("{}", epoch)
                          : fmt::format("{} of layer {}", epoch, sluice::layer_of<kLayerBit>(use));
    };
    throw Violation{fmt::format("rank {} takes the {} of use {} from rank {} for those of use {}",
                                r, kKindName[kind], name(there), source, name(own))};
  }

  /// The slot at which the program of rank r is: it finishes a dispatch or combine it is in, then
  /// begins operations while there is a free slot, then combines the oldest.
  [[nodiscard]] int current_slot(const State& s, int r) const {
    const auto& slots = s.slots[r];
    int oldest = -1;
    for (int slot = 0; slot < kSlots; ++slot) {
      if (!slots.busy[slot]) continue;
      if (steps_[slots.step[slot]].awaits != Flag::kNone) return slot;
      if (oldest < 0 || slots.epoch[slot] < slots.epoch[oldest]) oldest = slot;
    }
    const int free = slots.free_slot(kSlots);
    return free >= 0 && slots.last_epoch < m_.operations ? free : oldest;
  }

  /// One step of rank r, if its program can go on.
  bool advance(const State& s, int r) {
    const int slot = current_slot(s, r);
    if (slot < 0) return false;
    State n = s;
    auto& mine = n.slots[r];
    if (!mine.busy[slot]) {
      const bool is_used = mine.released_epoch(slot) != 0;
      if (is_used && m_.asks_for_release && !all_arrived(s, r, slot, kReleased)) return false;
      mine.take(slot);
    }
    const ProtocolStep step = steps_[mine.step[slot]];
    const u8 epoch = mine.epoch[slot];
    if (step.awaits != Flag::kReleased && sees_another_layer(s, r, slot, step.awaits)) {
      n.stopped = static_cast<u8>(n.stopped | 1 << r);
      visit(n, [&] { return fmt::format("rank {} sees another layer in {}", r, epoch); });
      return true;
    }
    if (step.awaits == Flag::kNone) {  // The experts have read the rows until now.
      expect_all_bytes(s, r, slot, Flag::kDispatched);
    } else if (step.awaits == Flag::kSent && !m_.relays_wait) {
      // The mutant goes on.
    } else if (step.awaits != Flag::kReleased &&
               !all_arrived(s, r, slot, static_cast<int>(step.awaits))) {
      return false;
    }
    if (step.raises == Flag::kCombined && m_.has_hosts()) {  // A relay reads weights once more.
      expect_all_bytes(s, r, slot, Flag::kSent);
    }
    mine.step[slot] += 1;
    if (step.raises == Flag::kReleased) mine.release(slot);
    if (step.raises != Flag::kNone) return put(n, r, slot, static_cast<u8>(step.raises));
    visit(n, [&] { return fmt::format("rank {} has all rows of {}", r, epoch); });
    return true;
  }

  /// The uses of what rank r puts, by the rank that it is from.
  void set_uses(const State& s, int r, Signal& p) const {
    const auto kind = static_cast<Flag>(p.kind);
    std::fill(std::begin(p.uses), std::end(p.uses), kNothing);
    p.uses[r] = p.use;
    if (!m_.has_hosts()) return;
    const auto& own = s.bytes[r][p.slot];
    for (int other = 0; other < m_.ranks; ++other) {
      if (kind == Flag::kCounts || kind == Flag::kDispatched) {  // A relay passes on its pieces.
        if (other != r && m_.relays_for(r, other)) {
          p.uses[other] = own[static_cast<int>(Flag::kSent)][other];
        }
      } else if (kind == Flag::kCombined && m_.is_in(Reach::kMates, r, other)) {  // It adds up.
        const u8 use = own[static_cast<int>(Flag::kGathered)][other];
        if (use != p.use) p.uses[r] = use;
      }
    }
  }

  static void store(State& s, const Signal& p) {
    for (int source = 0; source < kMaxRanks; ++source) {
      if (p.uses[source] != kNothing) s.bytes[p.to][p.slot][p.kind][source] = p.uses[source];
    }
  }

  /// Rank r puts and raises `kind` at every rank that awaits it; at itself at once.
  bool put(State& n, int r, int slot, u8 kind) {
    const u8 epoch = n.slots[r].epoch[slot];
    for (int to = 0; to < m_.ranks; ++to) {
      if (!m_.is_in(sluice::raised_at(static_cast<Flag>(kind)), r, to)) continue;
      Signal signal{.from = static_cast<u8>(r),
                    .to = static_cast<u8>(to),
                    .slot = static_cast<u8>(slot),
                    .kind = kind,
                    .use = m_.use(r, epoch),
                    .uses = {},
                    .parts = 2};
      set_uses(n, r, signal);
      if (kind != kReleased) check_overwrite(n, signal);
      if (to == r) {
        if (kind != kReleased) store(n, signal);
        n.flag[r][slot][kind][r] = signal.use;
        continue;
      }
      if (kind != kReleased && (m_.split || m_.flag_before_data)) signal.parts |= 1;
      if (n.num_signals == kMaxSignals)
        throw Violation{"more signals on their way than the model holds"};
      n.signals[n.num_signals++] = signal;
    }
    sort(n);
    visit(n, [&] {
      return fmt::format("rank {} sends the {} of {} in slot {}", r, kKindName[kind], epoch, slot);
    });
    return true;
  }

  void check_overwrite(const State& s, const Signal& p) const {
    const auto& slots = s.slots[p.to];
    const u8 epoch = sluice::epoch_of<kLayerBit>(p.use);
    if (!slots.busy[p.slot] || slots.epoch[p.slot] >= epoch) return;
    throw Violation{
        fmt::format("the {} of use {} from rank {} overwrite use {}, which rank {} still reads",
                    kKindName[p.kind], epoch, p.from, slots.epoch[p.slot], p.to)};
  }

  bool deliver(const State& s, int i) {
    const Signal& p = s.signals[i];
    const auto say = [&p](const char* what) {
      return [&p, what] {
        return fmt::format("{}: {} of {}, rank {} to {}", what, kKindName[p.kind],
                           sluice::epoch_of<kLayerBit>(p.use), p.from, p.to);
      };
    };
    if (p.parts & 1) {
      State n = s;
      check_overwrite(n, p);
      store(n, p);
      take(n, i, 1);
      visit(n, say("bytes arrive"));
      if (!m_.flag_before_data) return true;
    }
    if (!(p.parts & 6)) return true;
    State n = s;
    if ((p.parts & 2) && p.kind != kReleased && !m_.split && !m_.flag_before_data) {
      store(n, p);
    }
    u8& flag = n.flag[p.to][p.slot][p.kind][p.from];
    // Flags only grow; a flag without an epoch is just set again.
    if (!m_.epochs || m_.parity || p.use > flag) flag = p.use;
    if ((p.parts & 2) && !s.copied) {
      State twice = n;
      twice.copied = 1;
      twice.signals[i].parts = static_cast<u8>((p.parts & ~2) | 4);
      sort(twice);
      visit(twice, say("signal arrives, and will once more"));
    }
    take(n, i, p.parts & 6);
    visit(n, say(p.parts & 4 ? "stale signal arrives" : "signal arrives"));
    return true;
  }

  static void take(State& n, int i, int part) {
    Signal& p = n.signals[i];
    p.parts = static_cast<u8>(p.parts & ~part);
    if (p.parts == 0) p = n.signals[--n.num_signals];
    sort(n);
  }
  /// What is on its way is a set: states that differ in order only are one.
  static void sort(State& s) {
    std::sort(s.signals, s.signals + s.num_signals, [](const Signal& a, const Signal& b) {
      return std::memcmp(&a, &b, sizeof(Signal)) < 0;
    });
  }

  Model m_;
  std::span<const ProtocolStep> steps_;
  std::unordered_set<Digest, DigestHash> seen_;
  std::vector<std::string> path_;
};

}  // namespace

int main(int argc, char** argv) {
  Model m;
  std::string mutant = "none";
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    const std::string value = i + 1 < argc ? argv[i + 1] : "";
    if (name == "--split") {
      m.split = true;
      continue;
    }
    if (name == "--ranks") m.ranks = std::stoi(value);
    if (name == "--operations") m.operations = std::stoi(value);
    if (name == "--hosts") {
      for (const char c : value) {
        if (c != ',') m.host_of.push_back(c - '0');
      }
      m.ranks = static_cast<int>(m.host_of.size());
    }
    if (name == "--mode") m.low_latency = value == "low-latency";
    if (name == "--skip") m.skips = std::stoi(value);
    if (name == "--mutant") mutant = value;
    ++i;
  }
  if (mutant == "no-epoch") m.epochs = false;
  if (mutant == "parity") m.parity = true;
  if (mutant == "flag-before-data") m.flag_before_data = true;
  if (mutant == "no-release") m.asks_for_release = false;
  if (mutant == "relay-early") m.relays_wait = false;
  if (mutant == "missed-rank") m.sums_all = false;
  if (mutant == "no-layer") m.names_layer = false;
  if (m.ranks < 1 || m.ranks > kMaxRanks || m.operations < 1 || m.operations > 100) {
    fmt::print("ranks {} not in [1, {}] or operations {} not in [1, 100]\n", m.ranks, kMaxRanks,
               m.operations);
    return 2;
  }
  Explorer explorer(m);
  fmt::print("{} ranks{}, {} operations, two in flight, {}, mutant {}: ", m.ranks,
             m.has_hosts() ? " on several hosts" : "", m.operations,
             m.low_latency ? "low-latency" : "normal", mutant);
  std::fflush(stdout);
  try {
    explorer.run();
  } catch (const Violation& violation) {
    fmt::print("VIOLATION after {} states: {}\n{}", explorer.num_states(), violation.text,
               explorer.path());
    return 1;
  }
  fmt::print("{} states, nothing violated\n", explorer.num_states());
  return 0;
}
