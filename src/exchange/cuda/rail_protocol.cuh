// rail_protocol.cuh - flags between the mates of a host, bounded waits, and how the exchange over
// hosts stops. Flags and epochs are those of protocol.cuh.
//
// Whom a wait depends on in the end, the rail's thread finds out (transport/rails.h): it looks at
// `begun` and `done`, ends what waits on the network, and sets `stop`, which ends what waits here.
// So the timeout of these waits is longer than the rail's, and says only what flags cannot mean.
#pragma once

#include "exchange/cuda/rail_params.h"
#include "exchange/cuda/team.cuh"

namespace sluice::cuda {

SLUICE_STEP bool is_stopped(const RailSlot& p) {
  return look(&p.state->failed) != 0;
}

/// A fault after which ranks may be out of step: the exchange stops for good, for `lost`. Where
/// several threads find one at a time, the first fault noted is reported and the last `lost` set is
/// passed on. They may differ: any one of the lost will do.
SLUICE_STEP void stop_exchange(const RailSlot& p, int lost, const DeviceFault& fault) {
  note_fault(p.state, p.faults, kFailure, fault);
  set(&p.state->failed, 1 + lost);
}

/// The rail has failed, and says why itself.
SLUICE_STEP bool rail_has_failed(const RailSlot& p) {
  const std::uint64_t word = load_relaxed(p.stop);
  if (word == 0) return false;
  set(&p.state->failed, static_cast<int>(word));
  return true;
}

/// The relay on host `h` has stopped, and says so in what it sent.
SLUICE_STEP void stop_for_relay(const RailSlot& p, int h, int stop_word, Operation op,
                                std::uint64_t epoch) {
  stop_exchange(p, stop_word - 1,
                {.kind = kGaveUp,
                 .operation = op,
                 .epoch = epoch,
                 .missing = 0,
                 .expected = 0,
                 .seen = 0,
                 .where = stop_word - 1,
                 .count = 0,
                 .value = p.rail[h]});
}

/// One thread: the rail's thread counts time from here on, until end_operation().
SLUICE_STEP void begin_operation(const RailSlot& p) {
  p.slot->begun += 1;
  store_release(p.begun, p.slot->begun);
}
SLUICE_STEP void end_operation(const RailSlot& p) {
  p.slot->done += 1;
  store_release(p.done, p.slot->done);
}

template <class T>
SLUICE_STEP T* in_window(const RailSlot& p, int mate, std::size_t offset) {
  return reinterpret_cast<T*>(p.window.base[mate] + offset);
}
SLUICE_STEP int num_mates(const RailSlot& p) {
  return p.window.num_ranks;
}
/// Of the slots of this host: ordered by mate, then by local expert.
SLUICE_STEP int slots_of_host(const RailSlot& p) {
  return p.placement.num_local() * num_mates(p);
}
/// An expert slot's index among those of its host.
SLUICE_STEP int index_on_host(const RailSlot& p, int slot) {
  return p.local_of[p.placement.rank_of(slot)] * p.placement.num_local() +
         p.placement.local_of(slot);
}

/// This rank's flag at every mate, after everything that the team did before its last sync().
SLUICE_STEP void signal_mates(const Team& team, const RailSlot& p, std::size_t flags,
                              std::uint64_t value) {
  for (int m = team.index; m < num_mates(p); m += team.size) {
    store_release(in_window<std::uint64_t>(p, m, flags) + p.window.rank, value);
  }
}

/// What a mate's flag says when it has come to this point of the slot's dispatch `epoch`: its rows
/// are here, it may be read, or, before the dispatch, the one before it may be forgotten.
SLUICE_STEP std::uint64_t awaited_flag(Operation op, std::uint64_t epoch) {
  return op == kCombineRows ? 2 * epoch : op == kReuse ? 2 * (epoch - 1) : epoch;
}
/// Of a mate that has gone on as far as it can without this rank: where it dropped its dispatch.
SLUICE_STEP std::uint64_t newest_flag(Operation op, std::uint64_t epoch) {
  return awaited_flag(op, epoch) + (op == kReuse ? 1 : 0);
}

/// Until every mate's flag says awaited_flag(), or newest_flag() instead. All of the team get the
/// same answer; false: the exchange has stopped.
SLUICE_STEP bool wait_for_mates(const Team& team, const RailSlot& p, std::size_t flags,
                                Operation op, std::uint64_t epoch) {
  const std::uint64_t want = awaited_flag(op, epoch), newest = newest_flag(op, epoch);
  bool ok = true;
  for (int m = team.index; m < num_mates(p); m += team.size) {
    const std::uint64_t* const flag = in_window<std::uint64_t>(p, p.window.rank, flags) + m;
    const std::uint64_t begin = now_ns();
    std::uint64_t seen = load_acquire(flag), waited = 0;
    while (seen < want) {
      waited = now_ns() - begin;
      if (waited > p.timeout_ns || is_stopped(p) || rail_has_failed(p)) break;
      rest();
      seen = load_acquire(flag);
    }
    if (waited != 0 && team.is_first) add_to(&p.state->stats.wait_ns[m], waited);
    if (seen >= want && seen <= newest) continue;
    ok = false;
    const bool dropped = op == kCombineRows && seen == want + 1;
    const int kind = seen < want ? kPeerMissing : dropped ? kDropped : kOutOfStep;
    if (is_stopped(p)) continue;  // Somebody has said why.
    stop_exchange(p, p.mates[m],
                  {.kind = kind,
                   .operation = op,
                   .epoch = epoch,
                   .missing = std::uint64_t{1} << m,
                   .expected = want,
                   .seen = seen,
                   .where = -1,
                   .count = 0,
                   .value = 0});
  }
  return !team.any(!ok);
}

// --- Headers and records -------------------------------------------------------------------------

/// What goes to host `h`; the own host's is where it is to arrive.
SLUICE_STEP std::byte* outgoing(const RailSlot& p, int h) {
  return (h == p.host ? p.pieces : p.send) + static_cast<std::size_t>(h) * p.piece_stride;
}
SLUICE_STEP const std::byte* incoming(const RailSlot& p, int h) {
  return p.pieces + static_cast<std::size_t>(h) * p.piece_stride;
}
/// Records of a piece; none if its sender has stopped, whose header begins with -stop word.
SLUICE_STEP int num_records(const RailSlot& p, int h) {
  const std::int32_t n = *reinterpret_cast<const std::int32_t*>(incoming(p, h));
  return n < 0 ? 0 : n > p.max_tokens ? p.max_tokens : n;
}
SLUICE_STEP std::size_t offset_of_record(const RailSlot& p, int i) {
  return static_cast<std::size_t>(p.record.header_bytes) +
         static_cast<std::size_t>(i) * static_cast<std::size_t>(p.record.bytes);
}
SLUICE_STEP const std::byte* record_at(const RailSlot& p, int h, int i) {
  return incoming(p, h) + offset_of_record(p, i);
}
/// [k] of a record; -1: not on this host.
SLUICE_STEP const std::int32_t* slots_of_record(const RailSlot& p, const std::byte* record) {
  return reinterpret_cast<const std::int32_t*>(record + p.record.slots);
}
SLUICE_STEP int token_of_record(const RailSlot& p, const std::byte* record) {
  return *reinterpret_cast<const std::int32_t*>(record + p.record.token);
}
/// Rows of bf16 that go home for so many entries on a host: network_combine_bytes().
SLUICE_STEP int home_rows_of(const RailSlot& p, int entries) {
  return p.num_parts == 0 || entries < 2 ? entries : 2;
}
/// The stop word of the home piece from or to host `h`.
SLUICE_STEP int* home_stop_word(const RailSlot& p, std::byte* pieces, int h) {
  return reinterpret_cast<int*>(pieces + static_cast<std::size_t>(h) * p.home_stride);
}
/// The first record, or token, of a chunk of `count`.
SLUICE_STEP int begin_of_chunk(const RailSlot& p, int count, int chunk) {
  return static_cast<int>(std::int64_t{count} * chunk / p.num_chunks);
}

}  // namespace sluice::cuda
