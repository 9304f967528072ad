// Every order in which GPUs of several hosts can take the steps of an exchange over rails
// (docs/exchange.md#gpus-of-several-hosts), for few ranks and operations: flags and their values as
// exchange/cuda/rail_protocol.cuh has them, without the bytes themselves.
//
//   explore_rails --hosts 2 --mates 2 --slots 2 --operations 3 [--drop 1] [--mutant M]
//
// Between hosts there are no flags: a send and its receive meet, so what arrives is in a buffer
// whose owner has come to that point of its stream. Inside a host ranks write into each other's
// windows. A word or a flag arrives at any time after it was sent, and those of one word in order.
// A put may change the buffer at once, and is sure to be there only with the flag after it. Checked
// in every state that can be reached:
//
//   - who takes rows, counts, outputs or pieces finds those of this use, from every rank
//   - no put reaches rows that are still read;  an operation on a rail meets the same one
//   - no flag of a later use is seen;  some step is possible until all ranks are done
//
// Mutants: no-counts (rows are put where the mates' counts of another use say), rows-early (rows
// are put without any wait for the mates), no-dispatched (experts start at once), no-await (a relay
// adds up at once), flag-before-data, home-early (a relay sends what it has not made yet). And
// no-reuse, which violates nothing: that a slot's last use is over the new counts say, too. Exits
// with 0 if nothing is violated, else with 1 after printing the steps.
#include <fmt/core.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "exchange/cuda/rail_protocol.cuh"

namespace {

using sluice::cuda::awaited_flag, sluice::cuda::newest_flag, sluice::cuda::Operation;
using u8 = std::uint8_t;

constexpr int kMaxRanks = 6, kMaxSlots = 2;
/// Of a buffer into which somebody puts.
constexpr u8 kTorn = 0xff;

enum Word : u8 { kCount, kRows, kOutput, kWords };  // What a rank tells each mate.
enum Step : u8 {
  kPost,
  kArrive,
  kGiveCounts,
  kPut,
  kAwaitRows,
  kExperts,  // Dispatch.
  kDrop,     // Instead of combine.
  kGive,
  kRelay,
  kHome,
  kSum,  // Combine.
  kSteps
};
constexpr const char* kStepName[] = {
    "queues its pieces", "has the pieces",    "gives counts", "puts rows",
    "has all rows",      "runs its experts",  "drops it",     "gives its outputs",
    "adds up",           "has the home rows", "sums"};

struct Model {
  int hosts = 2, mates = 2, slots = 2, operations = 3;
  int dropped = -1;  // The operation that all drop instead of combining it.
  std::string mutant = "none";
  [[nodiscard]] int ranks() const { return hosts * mates; }
  [[nodiscard]] bool is(std::string_view name) const { return mutant == name; }
};

struct State {
  u8 at[kMaxRanks];                                  // Into the program.
  u8 posted[kMaxRanks];                              // Operations on the rail that it has queued.
  u8 sent[kMaxRanks][kMaxRanks][kMaxSlots][kWords];  // [from][to]
  u8 word[kMaxRanks][kMaxRanks][kMaxSlots][kWords];  // [to][from]
  u8 rows[kMaxRanks][kMaxRanks][kMaxSlots];          // [owner][from] the use whose rows are there
  u8 output[kMaxRanks][kMaxSlots];                   // The use whose outputs are there.
  u8 pieces[kMaxRanks][kMaxSlots], made[kMaxRanks][kMaxSlots], home[kMaxRanks][kMaxSlots];
};

struct Violation {
  std::string text;
};

/// A step of an operation, the same on every rank: dispatches while there is a slot, then the
/// oldest combine.
struct Turn {
  u8 operation, slot, use;
  Step step;
};

std::vector<Turn> program_of(const Model& m) {
  std::vector<Turn> program;
  std::vector<Turn> open;  // Dispatched, and not combined.
  std::vector<u8> uses(static_cast<std::size_t>(m.slots));
  std::vector<bool> busy(uses.size());
  const auto add = [&](Turn turn, int first, int end) {
    for (int s = first; s < end; ++s) {
      turn.step = static_cast<Step>(s);
      program.push_back(turn);
    }
  };
  const auto combine_oldest = [&] {
    add(open.front(), kGive, kSteps);
    busy[open.front().slot] = false;
    open.erase(open.begin());
  };
  for (int operation = 0; operation < m.operations; ++operation) {
    if (open.size() == uses.size()) combine_oldest();
    u8 slot = 0;
    while (busy[slot]) ++slot;
    const Turn turn{static_cast<u8>(operation), slot, ++uses[slot], kPost};
    add(turn, kPost, kDrop);
    if (operation == m.dropped) {
      add(turn, kDrop, kGive);
      continue;
    }
    busy[slot] = true;
    open.push_back(turn);
  }
  while (!open.empty()) combine_oldest();
  return program;
}

class Explorer {
 public:
  explicit Explorer(const Model& m) : m_(m), program_(program_of(m)) { seen_.reserve(1 << 20); }

  void run() { visit(State{}, "start"); }
  [[nodiscard]] std::size_t num_states() const { return seen_.size(); }
  [[nodiscard]] const std::vector<std::string>& path() const { return path_; }

 private:
  void visit(const State& s, const std::string& step) {
    const std::string key(reinterpret_cast<const char*>(&s), sizeof(s));
    if (!seen_.insert(std::hash<std::string>{}(key) ^ mixed(s)).second) return;
    path_.push_back(step);
    bool any = false, done = true;
    for (int r = 0; r < m_.ranks(); ++r) {
      done &= s.at[r] == program_.size();
      if (s.at[r] < program_.size()) any |= advance(s, r, program_[s.at[r]]);
    }
    for (int from = 0; from < m_.ranks(); ++from) any |= deliver(s, from);
    if (!any && !done) throw Violation{"deadlock: no step is possible"};
    path_.pop_back();
  }
  /// A second hash: two states are taken for one with a chance of 2^-40 for millions of them.
  static std::size_t mixed(const State& s) {
    std::size_t h = 0x13198a2e03707344;
    for (std::size_t i = 0; i < sizeof(s); ++i) {
      h = (h ^ reinterpret_cast<const u8*>(&s)[i]) * 0xd1342543de82ef95;
      h ^= h >> 31;
    }
    return h;
  }

  [[nodiscard]] std::vector<int> mates_of(int r) const {
    std::vector<int> mates;
    for (int m = 0; m < m_.mates; ++m) mates.push_back(r / m_.mates * m_.mates + m);
    return mates;
  }

  void expect(u8 there, u8 use, int r, const char* what, int from) const {
    if (there == use) return;
    throw Violation{fmt::format("rank {} takes the {} of use {} from rank {} for those of use {}",
                                r, what, there, from, use)};
  }

  /// All mates' words have the awaited value.
  [[nodiscard]] bool have_come(const State& s, int r, u8 slot, Word word, Operation op,
                               u8 use) const {
    for (const int m : mates_of(r)) {
      const u8 seen = s.word[r][m][slot][word];
      if (seen < awaited_flag(op, use)) return false;
      if (seen > newest_flag(op, use)) {
        throw Violation{fmt::format("rank {} sees {} of rank {} in slot {} where it awaits {}", r,
                                    seen, m, slot, awaited_flag(op, use))};
      }
    }
    return true;
  }

  void tell_mates(State& n, int r, u8 slot, Word word, u8 value) const {
    for (const int m : mates_of(r)) {
      n.sent[r][m][slot][word] = value;
      if (m == r) n.word[r][r][slot][word] = value;
    }
  }

  /// All ranks of the rail have queued as many operations.
  [[nodiscard]] bool meets(const State& s, int r) const {
    for (int other = r % m_.mates; other < m_.ranks(); other += m_.mates) {
      if (s.posted[other] < s.posted[r]) return false;
    }
    return true;
  }

  [[nodiscard]] bool is_ready(const State& s, int r, const Turn& t) const {
    switch (t.step) {
      case kArrive:
      case kHome:
        return meets(s, r);
      case kGiveCounts:
        return m_.is("no-reuse") || m_.is("rows-early") ||
               have_come(s, r, t.slot, kOutput, sluice::cuda::kReuse, t.use);
      case kPut:  // Words of counts are tagged: one of another use is not taken.
        if (m_.is("no-counts") || m_.is("rows-early")) return true;
        for (const int m : mates_of(r)) {
          if (s.word[r][m][t.slot][kCount] != t.use) return false;
        }
        return true;
      case kAwaitRows:
        return m_.is("no-dispatched") ||
               have_come(s, r, t.slot, kRows, sluice::cuda::kDispatchRows, t.use);
      case kRelay:
        return m_.is("no-await") ||
               have_come(s, r, t.slot, kOutput, sluice::cuda::kCombineRows, t.use);
      default:
        return true;
    }
  }

  bool advance(const State& s, int r, const Turn& t) {
    if (!is_ready(s, r, t)) return false;
    State n = s;
    n.at[r] += 1;
    take(n, r, t);
    visit(n, fmt::format("rank {} {}, operation {}", r, kStepName[t.step], t.operation));
    return true;
  }

  void take(State& n, int r, const Turn& t) const {
    const auto mates = mates_of(r);
    switch (t.step) {
      case kPost:
        n.posted[r] += 1;
        break;
      case kArrive:
        n.pieces[r][t.slot] = t.use;
        break;
      case kGiveCounts:
        tell_mates(n, r, t.slot, kCount, t.use);
        break;
      case kPut:
        expect(n.pieces[r][t.slot], t.use, r, "pieces", r);
        for (const int m : mates) {
          if (!m_.is("rows-early")) expect(n.word[r][m][t.slot][kCount], t.use, r, "counts", m);
        }
        if (m_.is("flag-before-data")) tell_mates(n, r, t.slot, kRows, t.use);
        for (const int m : mates) n.rows[m][r][t.slot] = m == r ? t.use : kTorn;
        if (!m_.is("flag-before-data")) tell_mates(n, r, t.slot, kRows, t.use);
        break;
      case kAwaitRows:
      case kExperts:
        for (const int m : mates) expect(n.rows[r][m][t.slot], t.use, r, "rows", m);
        if (t.step == kExperts) n.output[r][t.slot] = t.use;
        break;
      case kDrop:
        tell_mates(n, r, t.slot, kOutput, static_cast<u8>(2 * t.use + 1));
        break;
      case kGive:
        tell_mates(n, r, t.slot, kOutput, static_cast<u8>(2 * t.use));
        if (m_.is("home-early")) n.posted[r] += 1;
        break;
      case kRelay:
        expect(n.pieces[r][t.slot], t.use, r, "pieces", r);
        for (const int m : mates) expect(n.output[m][t.slot], t.use, r, "outputs", m);
        n.made[r][t.slot] = t.use;
        if (!m_.is("home-early")) n.posted[r] += 1;
        break;
      case kHome:
        for (int other = r % m_.mates; other < m_.ranks(); other += m_.mates) {
          expect(n.made[other][t.slot], t.use, r, "home rows", other);
        }
        n.home[r][t.slot] = t.use;
        break;
      case kSum:
        expect(n.home[r][t.slot], t.use, r, "home rows", r);
        for (const int m : mates) expect(n.output[m][t.slot], t.use, r, "outputs", m);
        break;
      case kSteps:
        break;
    }
  }

  /// A word arrives, and with a flag of rows what was put before it.
  bool deliver(const State& s, int from) {
    bool any = false;
    for (const int to : mates_of(from)) {
      for (int slot = 0; slot < m_.slots; ++slot) {
        for (int w = 0; w < kWords; ++w) {
          const u8 sent = s.sent[from][to][slot][w];
          if (s.word[to][from][slot][w] == sent) continue;
          State n = s;
          n.word[to][from][slot][w] = sent;
          if (w == kRows && !m_.is("flag-before-data")) n.rows[to][from][slot] = sent;
          visit(n, fmt::format("word {} of rank {} arrives at rank {}: {}", w, from, to, sent));
          any = true;
        }
      }
    }
    return any;
  }

  Model m_;
  std::vector<Turn> program_;
  std::unordered_set<std::size_t> seen_;
  std::vector<std::string> path_;
};

}  // namespace

int main(int argc, char** argv) {
  Model m;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view name = argv[i];
    if (name == "--hosts") m.hosts = std::stoi(argv[i + 1]);
    if (name == "--mates") m.mates = std::stoi(argv[i + 1]);
    if (name == "--slots") m.slots = std::stoi(argv[i + 1]);
    if (name == "--operations") m.operations = std::stoi(argv[i + 1]);
    if (name == "--drop") m.dropped = std::stoi(argv[i + 1]);
    if (name == "--mutant") m.mutant = argv[i + 1];
  }
  if (m.hosts < 1 || m.mates < 1 || m.ranks() > kMaxRanks || m.slots < 1 || m.slots > kMaxSlots ||
      m.operations < 1 || m.operations > 20) {
    fmt::print("hosts * mates not in [1, {}], slots not in [1, {}] or operations not in [1, 20]\n",
               kMaxRanks, kMaxSlots);
    return 2;
  }
  fmt::print("{} hosts of {} ranks, {} slots, {} operations, mutant {}: ", m.hosts, m.mates,
             m.slots, m.operations, m.mutant);
  std::fflush(stdout);
  Explorer explorer(m);
  try {
    explorer.run();
  } catch (const Violation& violation) {
    fmt::print("VIOLATION after {} states: {}\n", explorer.num_states(), violation.text);
    for (const std::string& step : explorer.path()) fmt::print("  {}\n", step);
    return 1;
  }
  fmt::print("{} states, nothing violated\n", explorer.num_states());
  return 0;
}
