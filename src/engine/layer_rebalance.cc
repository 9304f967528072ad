// Experts of a layer in slots: what ranks make sure of when it is made, and how experts move.
#include <fmt/core.h>

#include <cstring>

#include "core/fail.h"
#include "engine/expert_mover.h"
#include "engine/layer_impl.h"
#include "exchange/agreement.h"
#include "sluice/config.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

/// Experts may only move between memories of one layout.
std::string layout_of(PreparedExperts& experts, const ExpertWeights& shapes) {
  const auto parts = experts.expert_bytes(0);
  std::string text = fmt::format("{} + {} bytes", parts[0].size(), parts[1].size());
  const Expert& first = shapes.experts.front();
  for (const MatrixRole role : {MatrixRole::kGate, MatrixRole::kUp, MatrixRole::kDown}) {
    const QuantMatrix& m = first.matrix(role);
    text += fmt::format(", {} scales per {}", to_string(m.scales.dtype), m.group_size);
  }
  return text;
}

void check_alike(const std::string& name, const ExpertWeights& shapes) {
  const Expert& first = shapes.experts.front();
  for (std::size_t i = 0; i < shapes.experts.size(); ++i) {
    for (const MatrixRole role : {MatrixRole::kGate, MatrixRole::kUp, MatrixRole::kDown}) {
      const QuantMatrix &a = first.matrix(role), &b = shapes.experts[i].matrix(role);
      check_argument(
          a.scales.dtype == b.scales.dtype && a.group_size == b.group_size && a.format == b.format,
          "{}: the expert in slot {} of this rank has {} scales per {}, the first one {} "
          "per {}: experts that move must be alike",
          name, i, to_string(b.scales.dtype), b.group_size, to_string(a.scales.dtype),
          a.group_size);
    }
  }
}

/// All but num_rebalances.
void add(RebalanceCounters& sum, const RebalanceStats& one) {
  sum.num_received += static_cast<std::uint64_t>(one.num_received);
  sum.num_sent += static_cast<std::uint64_t>(one.num_sent);
  sum.num_copied += static_cast<std::uint64_t>(one.num_copied);
  sum.num_rounds += static_cast<std::uint64_t>(one.num_rounds);
  sum.received_bytes += one.received_bytes;
  sum.sent_bytes += one.sent_bytes;
  sum.seconds += one.seconds;
}

}  // namespace

void Layer::Impl::settle_slots(const ExpertWeights& shapes) {
  BackendOps& backend = *group->backend;
  Transport& transport = *group->transport;
  const auto timeout = group->config.peer_timeout;
  PreparedExperts& mine = *experts.prepared;
  group->together(name, [&] { check_alike(name, shapes); });
  require_agreement(transport, {{"layout of an expert", layout_of(mine, shapes)}}, timeout);

  const std::byte takes_any{mine.takes_any_expert()};
  bool all_alike = true;
  for (const auto& part : transport.all_gather({&takes_any, 1}, timeout)) {
    all_alike = all_alike && part == std::vector{std::byte{0}};
  }
  // If no rank's experts take any other, all of them are stored in the same narrower way.
  if (!all_alike) backend.take_any_expert(mine, backend.stream());

  const auto count = static_cast<std::size_t>(placement().slots_per_rank());
  std::vector<std::uint64_t> sums(count);
  for (std::size_t i = 0; i < count; ++i) {
    sums[i] = expert_checksum(backend, mine, static_cast<int>(i), backend.stream());
  }
  const auto of_ranks = transport.all_gather(std::as_bytes(std::span(sums)), timeout);
  expert_digests.assign(static_cast<std::size_t>(placement().num_experts()), 0);
  std::vector<std::uint64_t> of_slots;
  for (const auto& part : of_ranks) {
    SLUICE_ASSERT(part.size() == count * sizeof(std::uint64_t));
    std::memcpy(sums.data(), part.data(), part.size());
    of_slots.insert(of_slots.end(), sums.begin(), sums.end());
  }
  for (int e = 0; e < placement().num_experts(); ++e) {
    const std::span<const int> slots_of_expert = placement().slots_of(e);
    const int first = slots_of_expert.front();
    const std::uint64_t sum = of_slots[static_cast<std::size_t>(first)];
    expert_digests[static_cast<std::size_t>(e)] = sum;
    for (const int slot : slots_of_expert) {
      if (of_slots[static_cast<std::size_t>(slot)] == sum) continue;
      const int a = placement().rank_of(first), b = placement().rank_of(slot);
      fail_of_ranks(ErrorCode::kTransport, a == b ? std::vector{a} : std::vector{a, b},
                    "{}: replicas of expert {} differ: slot {} of rank {} has checksum {:016x}, "
                    "slot {} of rank {} {:016x}",
                    name, e, first, a, sum, slot, b, of_slots[static_cast<std::size_t>(slot)]);
    }
  }
}

MoverMemory& LayerGroup::Impl::memory_for_moves(const std::string& name, std::size_t bytes) {
  if (mover_memory && mover_memory->bytes() >= bytes) return *mover_memory;
  mover_memory.reset();
  together(name, [&] { mover_memory = std::make_unique<MoverMemory>(*backend, bytes); });
  mover_memory->connect(*transport, config.peer_timeout);
  return *mover_memory;
}

void LayerGroup::Impl::free_memory_for_moves() {
  mover_memory.reset();
  // That waits for the device, so no rank may queue a call before all have done it.
  (void)transport->all_gather({}, config.peer_timeout);
}

RebalanceStats Layer::Impl::move_experts(const Placement& to, Stream stream,
                                         const RebalanceOptions& options) {
  PreparedExperts& mine = *experts.prepared;
  const std::size_t bytes = expert_bytes(mine) * static_cast<std::size_t>(options.max_experts_held);
  RebalanceStats moved;
  try {
    MoverMemory& memory = group->memory_for_moves(name, bytes);
    half_moved = Error(ErrorCode::kInternal, "its last rebalance did not end");
    ExpertMover mover({.layer = name,
                       .transport = *group->transport,
                       .backend = *group->backend,
                       .experts = mine,
                       .memory = memory,
                       .checksums = expert_digests,
                       .timeout = group->config.peer_timeout},
                      stream);
    mover.run(plan_moves(placement(), to, options.max_experts_held - 1));
    slots->assign(to, stream);
    moved = mover.stats();
  } catch (const Error& e) {
    if (half_moved) half_moved = e;
    group->mover_memory.reset();  // Its flags may say that a rank gave up.
    throw;
  }
  half_moved.reset();
  return moved;
}

RebalanceStats Layer::rebalance(const Placement& to, Stream stream,
                                const RebalanceOptions& options) {
  Impl& self = *impl_;
  LayerGroup::Impl& group = *self.group;
  (void)self.placed({});
  check_argument(self.slots.has_value(),
                 "{}: rebalance needs slots: its group was made without num_slots", self.name);
  check_argument(options.max_experts_held >= 2, "max_experts_held {} is less than 2",
                 options.max_experts_held);
  const long num_in_flight = self.in_flight.use_count() - 1;
  check_argument(num_in_flight == 0,
                 "{}: {} call(s) are between dispatch_send() and finish(), with rows for experts "
                 "where they are now: finish or destroy them before rebalance()",
                 self.name, num_in_flight);
  const Placement from = self.placement(), wanted = group.placement_or_default(to);
  const auto start = std::chrono::steady_clock::now();
  // This rank's calls have ended, and so have those of every rank that agrees.
  group.order->before(stream);
  group.backend->synchronize(stream);
  require_agreement(*group.transport,
                    {{"version", version()},
                     {kCall, "rebalance of " + group.name_of_layer(self.number)},
                     group.group_of(self.name),
                     {"placement", fmt::format("{:016x}", from.digest())},
                     {"new placement", fmt::format("{:016x}", wanted.digest())},
                     {"max_experts_held", std::to_string(options.max_experts_held)},
                     {"keep_memory", options.keep_memory ? "true" : "false"}},
                    group.config.peer_timeout, "rebalance of " + self.name);
  RebalanceStats stats;
  if (!(from == wanted)) {
    stats = self.move_experts(wanted, stream, options);
    reset_counted_rows(stream);  // They were of what the slots held before.
    ++self.moves.num_rebalances;
  }
  if (!options.keep_memory && group.mover_memory) group.free_memory_for_moves();
  group.order->after(stream);
  stats.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (!(from == wanted)) add(self.moves, stats);
  return stats;
}

const RebalanceCounters& Layer::rebalance_counters() const noexcept {
  return impl_->moves;
}

}  // namespace sluice
