#include "engine/expert_mover.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

/// A flag of a rank that gave up: this, and a bit for each rank that it blames. A rank without a
/// bit is not named to the others; they name the one that gave up instead.
constexpr std::uint64_t kGaveUp = std::uint64_t{1} << 62;
constexpr int kMostBlamed = 62;

std::vector<int> ranks_in(std::uint64_t mask) {
  std::vector<int> ranks;
  for (; mask != 0; mask &= mask - 1) ranks.push_back(std::countr_zero(mask));
  return ranks;
}

}  // namespace

std::size_t expert_bytes(PreparedExperts& experts) {
  std::size_t bytes = 0;
  for (const std::span<std::byte> part : experts.expert_bytes(0)) bytes += part.size();
  return bytes;
}

std::uint64_t expert_checksum(BackendOps& backend, PreparedExperts& experts, int index,
                              Stream stream) {
  std::uint64_t sum = 0, words = 0;
  for (const std::span<std::byte> bytes : experts.expert_bytes(index)) {
    sum += backend.checksum(bytes, words, stream);
    words += bytes.size() / sizeof(std::uint64_t);
  }
  return sum;
}

ExpertMover::ExpertMover(const MovedExperts& what, Stream stream)
    : what_(what),
      stream_(stream),
      rank_(what.transport.rank()),
      num_ranks_(what.transport.num_ranks()),
      rounds_before_(what.memory.num_rounds) {
  const auto parts = what.experts.expert_bytes(0);
  for (std::size_t i = 0; i < parts.size(); ++i) part_bytes_[i] = parts[i].size();
  expert_bytes_ = part_bytes_[0] + part_bytes_[1];
  stats_.extra_bytes = what.memory.bytes();
}

void ExpertMover::run(const MovePlan& plan) {
  try {
    signal(kReady, rounds_before_ + 1);
    for (const std::vector<ExpertMove>& moves : plan.rounds) {
      ++round_;
      run_round(plan, moves);
    }
    ++round_;
    await(kReady);  // Nobody uses the layer before everybody has all of it.
    what_.memory.num_rounds += round_;
  } catch (const Error& e) {
    give_up(e.ranks());
    throw;
  }
  stats_.num_rounds = static_cast<int>(plan.rounds.size());
}

void ExpertMover::run_round(const MovePlan& plan, const std::vector<ExpertMove>& moves) {
  await(kReady);
  send(plan, moves);
  copy(plan, moves);
  what_.backend.synchronize(stream_);
  signal(kSent, rounds_before_ + round_);
  await(kSent);
  receive(plan, moves);
  what_.backend.synchronize(stream_);
  signal(kReady, rounds_before_ + round_ + 1);
}

std::array<std::span<std::byte>, 2> ExpertMover::part(std::byte* memory, int index) const {
  std::byte* const at = memory + static_cast<std::size_t>(index) * expert_bytes_;
  return {std::span(at, part_bytes_[0]), std::span(at + part_bytes_[0], part_bytes_[1])};
}

std::array<std::span<std::byte>, 2> ExpertMover::bytes_of(const MovePlan& plan, int place) {
  if (!plan.is_aside(place)) return what_.experts.expert_bytes(place % plan.slots_per_rank);
  return part(what_.memory.local(), 0);
}

void ExpertMover::copy_bytes(const std::array<std::span<std::byte>, 2>& from,
                             const std::array<std::span<std::byte>, 2>& to) {
  for (std::size_t i = 0; i < from.size(); ++i) {
    what_.backend.copy_on_device(to[i].data(), from[i].data(), from[i].size(), stream_);
  }
}

/// To part `index` of a peer's memory: 0 is what it keeps aside.
void ExpertMover::put(int peer, int index, const std::array<std::span<std::byte>, 2>& bytes) {
  stats_.num_sent += 1;
  stats_.sent_bytes += expert_bytes_;
  if (std::byte* const theirs = what_.memory.of_rank(peer); theirs != nullptr) {
    copy_bytes(bytes, part(theirs, index));
    return;
  }
  const std::size_t at = static_cast<std::size_t>(index) * expert_bytes_;
  what_.memory.window().put(peer, at, bytes[0]);
  what_.memory.window().put(peer, at + part_bytes_[0], bytes[1]);
}

void ExpertMover::send(const MovePlan& plan, const std::vector<ExpertMove>& moves) {
  std::vector<int> arriving(static_cast<std::size_t>(num_ranks_));
  for (const ExpertMove& move : moves) {
    const int source = plan.rank_of(move.from), target = plan.rank_of(move.to);
    if (source == target) continue;
    const int index = plan.is_aside(move.to) ? 0 : ++arriving[static_cast<std::size_t>(target)];
    if (source == rank_) put(target, index, bytes_of(plan, move.from));
  }
}

void ExpertMover::copy(const MovePlan& plan, const std::vector<ExpertMove>& moves) {
  for (const ExpertMove& move : moves) {
    if (plan.rank_of(move.from) != rank_ || plan.rank_of(move.to) != rank_) continue;
    copy_bytes(bytes_of(plan, move.from), bytes_of(plan, move.to));
    stats_.num_copied += 1;
  }
}

void ExpertMover::receive(const MovePlan& plan, const std::vector<ExpertMove>& moves) {
  int arriving = 0;
  for (const ExpertMove& move : moves) {
    const int source = plan.rank_of(move.from);
    if (plan.rank_of(move.to) != rank_ || source == rank_) continue;
    const auto here = part(what_.memory.local(), plan.is_aside(move.to) ? 0 : ++arriving);
    const std::uint64_t sum = what_.backend.checksum({here[0].data(), expert_bytes_}, 0, stream_);
    const std::uint64_t wanted = what_.checksums[static_cast<std::size_t>(move.expert)];
    if (sum != wanted) {
      fail_of_ranks(
          ErrorCode::kTransport, {source},
          "rebalance of {}, round {}, rank {}: slot {} of rank {} was to bring expert {}, "
          "but what arrived has checksum {:016x}, the expert {:016x}",
          what_.layer, round_, rank_, move.from, source, move.expert, sum, wanted);
    }
    if (!plan.is_aside(move.to)) copy_bytes(here, bytes_of(plan, move.to));
    stats_.num_received += 1;
    stats_.received_bytes += expert_bytes_;
  }
}

void ExpertMover::signal(Flag kind, std::uint64_t value) {
  for (int peer = 0; peer < num_ranks_; ++peer) {
    what_.memory.window().signal(peer, kind * num_ranks_ + rank_, value);
  }
}

/// Of every rank, for this round.
void ExpertMover::await(Flag kind) {
  const char* const what = kind == kReady ? "begin" : "arrival";
  const auto deadline = std::chrono::steady_clock::now() + what_.timeout;
  std::vector<int> missing;
  for (int source = 0; source < num_ranks_; ++source) {
    const int flag = kind * num_ranks_ + source;
    bool late = false;
    try {
      late =
          !what_.memory.window().wait_flags({&flag, 1}, rounds_before_ + round_, deadline).empty();
    } catch (const Error& e) {
      fail_of_ranks(e.code(), e.ranks(), "rebalance of {}, {} of round {}, rank {}: {}",
                    what_.layer, what, round_, rank_, e.what());
    }
    if (late) missing.push_back(source);
    const std::uint64_t seen = what_.memory.window().flag(flag);
    if (seen < kGaveUp) continue;
    std::vector<int> blamed = ranks_in(seen & (kGaveUp - 1));
    if (blamed.empty()) blamed.push_back(source);
    fail_of_ranks(ErrorCode::kTransport, blamed,
                  "rebalance of {}, {} of round {}, rank {}: rank {} gave up because of rank(s){}",
                  what_.layer, what, round_, rank_, source, list_of(blamed));
  }
  if (missing.empty()) return;
  fail_of_ranks(ErrorCode::kPeerTimeout, missing,
                "rebalance of {}, {} of round {}, rank {}: after {} ms still missing rank(s){}",
                what_.layer, what, round_, rank_, what_.timeout.count(), list_of(missing));
}

void ExpertMover::give_up(const std::vector<int>& blamed) noexcept {
  std::uint64_t value = kGaveUp;
  for (const int rank : blamed) {
    if (rank < kMostBlamed) value |= std::uint64_t{1} << rank;
  }
  for (const Flag kind : {kReady, kSent}) {
    for (int peer = 0; peer < num_ranks_; ++peer) {
      try {
        what_.memory.window().signal(peer, kind * num_ranks_ + rank_, value);
      } catch (const Error&) {
        // That peer finds out by its own bounded wait.
      }
    }
  }
}

}  // namespace sluice
