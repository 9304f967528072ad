// expert_mover.h - carries out a move plan: one rank's part, over the transport.
//
//   memory of a rank (mover_memory.h):   [ aside | arriving 1 | arriving 2 ... ]
//
//   round i:  wait until every rank is ready for it         flag ready  = i, from every rank
//             send to the arriving parts of other ranks
//             copy within this rank
//             tell every rank that all has been sent        flag sent   = i
//             wait for every rank's; compare checksums; write slots
//             say that this rank is ready for round i + 1
//
// A rank that fails raises its flags to a value that no round has, with the ranks that it blames.
// So nobody waits for it, and everybody names the rank that failed first.
#pragma once

#include <chrono>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/ops.h"
#include "engine/mover_memory.h"
#include "exchange/move_plan.h"
#include "sluice/rebalance.h"
#include "sluice/transport.h"

namespace sluice {

/// What a mover works on; all of it outlives the mover.
struct MovedExperts {
  std::string layer;  ///< For messages.
  Transport& transport;
  BackendOps& backend;
  PreparedExperts& experts;
  MoverMemory& memory;  ///< Connected; of expert_bytes() times max_experts_held at least.
  std::span<const std::uint64_t> checksums;  ///< [num_experts] of each logical expert.
  std::chrono::milliseconds timeout;
};

/// Of one expert as the backend holds it.
[[nodiscard]] std::size_t expert_bytes(PreparedExperts& experts);

/// Of expert `index` of `experts`, where it lies.
[[nodiscard]] std::uint64_t expert_checksum(BackendOps& backend, PreparedExperts& experts,
                                            int index, Stream stream);

class ExpertMover {
 public:
  ExpertMover(const MovedExperts& what, Stream stream);

  /// Collective. After an error experts lie in wrong places.
  /// Throws: kPeerTimeout or kTransport naming round, rank and the ranks to blame; kTransport
  ///   naming sender, slot and expert if what arrived is not the expert.
  void run(const MovePlan& plan);
  [[nodiscard]] const RebalanceStats& stats() const noexcept { return stats_; }

 private:
  enum Flag : int { kReady, kSent };

  void run_round(const MovePlan& plan, const std::vector<ExpertMove>& moves);
  void send(const MovePlan& plan, const std::vector<ExpertMove>& moves);
  void copy(const MovePlan& plan, const std::vector<ExpertMove>& moves);
  void receive(const MovePlan& plan, const std::vector<ExpertMove>& moves);
  /// The two parts of the contents of a slot, or of what is kept aside, on this rank.
  [[nodiscard]] std::array<std::span<std::byte>, 2> bytes_of(const MovePlan& plan, int place);
  [[nodiscard]] std::array<std::span<std::byte>, 2> part(std::byte* memory, int index) const;
  void put(int peer, int index, const std::array<std::span<std::byte>, 2>& bytes);
  void copy_bytes(const std::array<std::span<std::byte>, 2>& from,
                  const std::array<std::span<std::byte>, 2>& to);
  void signal(Flag kind, std::uint64_t value);
  void await(Flag kind);
  void give_up(const std::vector<int>& blamed) noexcept;

  MovedExperts what_;
  Stream stream_;
  int rank_, num_ranks_;
  std::array<std::size_t, 2> part_bytes_{};
  std::size_t expert_bytes_ = 0;
  std::uint64_t rounds_before_;  // Of the moves before: flags have these numbers.
  std::uint64_t round_ = 0;
  RebalanceStats stats_;
};

}  // namespace sluice
