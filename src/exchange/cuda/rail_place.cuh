// rail_place.cuh - the steps of dispatch behind the network: which row of this host each entry of
// the records gets that came.
//
//   count    a team for each host: rows of its source's records for each slot; counts to the mates
//   place    a team for each host, when all counts are here: the row of every entry
//
// rail_spread.cuh puts the rows there.
#pragma once

#include "exchange/cuda/rail_protocol.cuh"

namespace sluice::cuda {

/// What a team shares from count to place.
struct PlaceSpace {
  std::int32_t* rows;           // [num_chunks, slots of a host]
  std::int32_t* home;           // [num_chunks] rows of bf16 that go home
  std::int32_t *total, *first;  // [count_width] rows; then the source's first row
};
SLUICE_STEP int words_of_place(const RailSlot& p) {
  return p.num_chunks * (slots_of_host(p) + 1) + 2 * p.count_width;
}
SLUICE_STEP PlaceSpace place_space(const RailSlot& p, std::int32_t* words) {
  std::int32_t* const home = words + p.num_chunks * slots_of_host(p);
  std::int32_t* const total = home + p.num_chunks;
  return {words, home, total, total + p.count_width};
}

/// Counts the rows of the records from host `h`, and gives the counts to the mates.
SLUICE_STEP void count_step(const Team& team, const RailSlot& p, int h, const PlaceSpace& space) {
  if (h == p.host && team.index == 0) {  // What dispatch_send() began.
    end_operation(p);
    begin_operation(p);
  }
  if (team.any(is_stopped(p) || (team.index == 0 && rail_has_failed(p)))) return;
  const std::int32_t header = *reinterpret_cast<const std::int32_t*>(incoming(p, h));
  if (header < 0) {
    if (team.index == 0) stop_for_relay(p, h, -header, kDispatchCounts, p.slot->epoch + 1);
    return;
  }
  const std::uint64_t epoch = p.slot->epoch + 1;
  const int width = slots_of_host(p), records = num_records(p, h);
  std::int32_t* const rows = space.rows;
  for (int i = team.index; i < p.num_chunks * width; i += team.size) rows[i] = 0;
  team.sync();
  for (int chunk = team.index; chunk < p.num_chunks; chunk += team.size) {
    int home = 0;
    const int end = begin_of_chunk(p, records, chunk + 1);
    for (int i = begin_of_chunk(p, records, chunk); i < end; ++i) {
      const std::int32_t* const slots = slots_of_record(p, record_at(p, h, i));
      int entries = 0;
      for (int k = 0; k < p.num_topk; ++k) {
        if (slots[k] < 0) continue;
        rows[chunk * width + index_on_host(p, slots[k])] += 1;
        ++entries;
      }
      home += home_rows_of(p, entries);
    }
    space.home[chunk] = home;
  }
  team.sync();
  if (!wait_for_mates(team, p, p.returned, kReuse, epoch)) return;
  const auto* const counts =
      reinterpret_cast<const std::int32_t*>(incoming(p, h) + p.record.counts);
  const std::int64_t base = std::int64_t{p.rail[h]} * p.count_width;
  // For the source's layer, whatever this rank's is: so all mates see whose differs.
  const std::uint32_t stamp =
      count_stamp(epoch, *reinterpret_cast<const std::int32_t*>(incoming(p, h) + p.record.layer));
  for (int e = team.index; e < p.count_width; e += team.size) {
    std::int32_t sum = 0;
    if (p.record.has_counts) {
      sum = counts[e];
    } else {
      for (int chunk = 0; chunk < p.num_chunks; ++chunk) sum += rows[chunk * width + e];
    }
    const std::uint64_t word = std::uint64_t{stamp} << 32 | static_cast<std::uint32_t>(sum);
    for (int m = 0; m < num_mates(p); ++m) {
      store_relaxed(in_window<std::uint64_t>(p, m, p.counts) + base + e, word);
    }
  }
}

/// Waits for every rank's counts: total[e] over all ranks, first[e] over those before `source`.
SLUICE_STEP bool gather_counts(const Team& team, const RailSlot& p, std::uint64_t epoch, int source,
                               std::int32_t* total, std::int32_t* first) {
  const std::uint64_t* const counts = in_window<std::uint64_t>(p, p.window.rank, p.counts);
  const std::uint64_t begin = now_ns();
  const std::uint32_t stamp = count_stamp(epoch, p.layer);
  bool ok = true;
  for (int e = team.index; ok && e < p.count_width; e += team.size) {
    std::int32_t all = 0, below = 0;
    for (int r = 0; ok && r < p.num_ranks; ++r) {
      const std::uint64_t* const word = counts + std::int64_t{r} * p.count_width + e;
      std::uint64_t seen = load_relaxed(word);
      while (static_cast<std::uint32_t>(seen >> 32) != stamp) {
        ok = !is_for_another_layer(seen, stamp) && now_ns() - begin <= p.timeout_ns &&
             !is_stopped(p) && !rail_has_failed(p);
        if (!ok) break;
        rest();
        seen = load_relaxed(word);
      }
      if (!ok && is_for_another_layer(seen, stamp)) {
        stop_exchange(p, r,
                      {.kind = kOtherLayer,
                       .operation = kDispatchCounts,
                       .epoch = epoch,
                       .missing = 0,
                       .expected = static_cast<std::uint64_t>(p.layer),
                       .seen = layer_of_count(seen),
                       .where = r,
                       .count = 0,
                       .value = 0});
      } else if (!ok && !is_stopped(p)) {
        stop_exchange(p, p.mates[p.local_of[r]],
                      {.kind = kPeerMissing,
                       .operation = kDispatchCounts,
                       .epoch = epoch,
                       .missing = std::uint64_t{1} << p.local_of[r],
                       .expected = epoch,
                       .seen = seen >> 32,
                       .where = -1,
                       .count = 0,
                       .value = 0});
      }
      all += static_cast<std::int32_t>(seen & 0xffffffffu);
      if (r < source) below += static_cast<std::int32_t>(seen & 0xffffffffu);
    }
    total[e] = all, first[e] = below;
  }
  return !team.any(!ok);
}

/// Low-latency mode: true on every rank of every host if a slot would get more rows than max_m.
SLUICE_STEP bool exceeds_capacity(const Team& team, const RailSlot& p, int h,
                                  const std::int32_t* total) {
  bool over = false;
  for (int e = team.index; p.max_m > 0 && e < p.count_width; e += team.size) {
    if (total[e] <= p.max_m) continue;
    over = true;
    if (h != p.host) continue;
    const int slots = p.placement.num_experts();
    const int expert =
        p.placed == nullptr ? e : static_cast<int>(p.placed[p.num_experts + 1 + slots + e]);
    note_fault(p.state, p.faults, kRefusal,
               {.kind = kOverCapacity,
                .operation = kDispatchCounts,
                .epoch = 0,
                .missing = 0,
                .expected = 0,
                .seen = 0,
                .where = expert,
                .count = total[e],
                .value = p.max_m});
  }
  return team.any(over);
}

/// Adds to first[e] where the slot's rows begin, and tells what this rank's experts receive.
SLUICE_STEP void add_begins(const Team& team, const RailSlot& p, const RailTokens& d, int h,
                            bool refused, const std::int32_t* total, std::int32_t* first) {
  const int num_local = p.placement.num_local();
  const bool tells = h == p.host;
  if (p.max_m > 0) {
    for (int e = team.index; e < p.count_width; e += team.size) {
      first[e] += p.placement.local_of(e) * p.max_m;
    }
  }
  for (int m = team.index; m < num_mates(p); m += team.size) {
    std::int32_t begin = 0;
    for (int l = 0; p.max_m == 0 && l < num_local; ++l) {
      const int e = m * num_local + l;
      first[e] += begin;
      if (tells && m == p.window.rank) p.row_begin[l] = begin;
      begin += total[e];
    }
  }
  for (int l = team.index; tells && l < num_local; l += team.size) {
    const int e = p.max_m > 0 ? p.placement.expert_of(p.rank, l) : p.window.rank * num_local + l;
    if (p.max_m > 0) p.row_begin[l] = std::int64_t{l} * p.max_m;
    const int rows = refused ? 0 : total[e];
    p.num_rows[l] = rows;
    if (d.row_totals != nullptr) d.row_totals[l] += rows;
  }
}

/// Gives every entry of the records from host `h` its row: ordered by source, token and entry.
SLUICE_STEP void place_step(const Team& team, const RailSlot& p, const RailTokens& d, int h,
                            const PlaceSpace& space) {
  if (team.any(is_stopped(p))) return;
  const std::uint64_t epoch = p.slot->epoch + 1;
  std::int32_t* const total = space.total;
  std::int32_t* const first = space.first;
  if (!gather_counts(team, p, epoch, p.rail[h], total, first)) return;
  const bool refused = exceeds_capacity(team, p, h, total);
  if (h == p.host && team.index == 0) p.slot->refused = refused;
  add_begins(team, p, d, h, refused, total, first);
  team.sync();

  // From here on by index on the host, chunk by chunk.
  const int width = slots_of_host(p), num_local = p.placement.num_local();
  std::int32_t* const rows = space.rows;
  for (int e = team.index; e < width; e += team.size) {
    const int m = e / num_local;
    const int slot = p.max_m > 0 ? p.placement.expert_of(p.mates[m], e - m * num_local) : e;
    std::int32_t next = first[slot];
    for (int chunk = 0; chunk < p.num_chunks; ++chunk) {
      const std::int32_t more = rows[chunk * width + e];
      rows[chunk * width + e] = next;
      next += more;
    }
  }
  team.sync();
  const int records = num_records(p, h);
  for (int chunk = team.index; chunk < p.num_chunks; chunk += team.size) {
    int home = 0;
    for (int c = 0; c < chunk; ++c) home += space.home[c];
    const int end = begin_of_chunk(p, records, chunk + 1);
    for (int i = begin_of_chunk(p, records, chunk); i < end; ++i) {
      const std::byte* const record = record_at(p, h, i);
      const std::int32_t* const slots = slots_of_record(p, record);
      std::int64_t* const place = p.place + (std::int64_t{h} * p.max_tokens + i) * p.num_topk;
      int entries = 0;
      for (int k = 0; k < p.num_topk; ++k) {
        place[k] = -1;
        if (slots[k] < 0) continue;
        ++entries;
        const int e = index_on_host(p, slots[k]);
        const std::int32_t row = rows[chunk * width + e]++;
        if (!refused) place[k] = std::int64_t{e / num_local} << 32 | row;
      }
      p.relay_at[h * p.max_tokens + i] =
          p.max_m > 0 ? token_of_record(p, record) * p.home_rows : home;
      home += home_rows_of(p, entries);
    }
  }
}

}  // namespace sluice::cuda
