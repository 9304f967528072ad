// rail_route.cuh - the first steps of dispatch over hosts: which record goes where.
//
//   route    one team: slots of the own entries, record numbers, headers
//   pack     a team for each own token: its records, in the piece of every host that needs it
//   sizes    one team: what the host must know to send pieces of exact sizes
//
// What the quantities mean is in rail_params.h; rail_place.cuh goes on behind the network.
#pragma once

#include "exchange/cuda/rail_protocol.cuh"

namespace sluice::cuda {

/// Slot of one own top-k entry, or -1 for an empty one. One out of range is noted and left empty.
SLUICE_STEP int slot_of_own_entry(const RailSlot& p, const RailTokens& d, int entry) {
  const long long e = d.wide_idx ? static_cast<const std::int64_t*>(d.topk_idx)[entry]
                                 : static_cast<const std::int32_t*>(d.topk_idx)[entry];
  if (e < -1 || e >= p.num_experts) {
    note_fault(p.state, p.faults, kRefusal,
               {.kind = kBadIndex,
                .operation = kDispatchCounts,
                .epoch = 0,
                .missing = 0,
                .expected = 0,
                .seen = 0,
                .where = entry,
                .count = 0,
                .value = e});
    return -1;
  }
  if (p.placed == nullptr || e < 0) return static_cast<int>(e);
  const int begin = static_cast<int>(p.placed[e]);
  const int num_replicas = static_cast<int>(p.placed[e + 1]) - begin;
  const int token = entry / p.num_topk;
  const int replica = num_replicas == 1
                          ? 0
                          : replica_of_row(num_replicas, p.rank, token, entry - token * p.num_topk);
  return static_cast<int>(p.placed[p.num_experts + 1 + begin + replica]);
}

/// Of an own token, on host `h`.
SLUICE_STEP int entries_on_host(const RailSlot& p, int token, int h) {
  int entries = 0;
  for (int k = 0; k < p.num_topk; ++k) {
    const int slot = p.slots[token * p.num_topk + k];
    entries += slot >= 0 && p.host_of[p.placement.rank_of(slot)] == h;
  }
  return entries;
}

/// Numbers the own tokens that have an entry on each host, and the rows that come home for them.
SLUICE_STEP void number_records(const Team& team, const RailSlot& p, int num_tokens) {
  for (int j = team.index; j < p.num_hosts * p.num_chunks; j += team.size) {
    const int h = j / p.num_chunks, chunk = j - h * p.num_chunks;
    int records = 0, home = 0;
    const int end = begin_of_chunk(p, num_tokens, chunk + 1);
    for (int t = begin_of_chunk(p, num_tokens, chunk); t < end; ++t) {
      const int entries = entries_on_host(p, t, h);
      records += entries > 0;
      home += home_rows_of(p, entries);
    }
    p.chunk_records[2 * j] = records;
    p.chunk_records[2 * j + 1] = home;
  }
  team.sync();
  for (int h = team.index; h < p.num_hosts; h += team.size) {
    int records = 0, home = 0;
    for (int j = h * p.num_chunks; j < (h + 1) * p.num_chunks; ++j) {
      const int more_records = p.chunk_records[2 * j], more_home = p.chunk_records[2 * j + 1];
      p.chunk_records[2 * j] = records, p.chunk_records[2 * j + 1] = home;
      records += more_records, home += more_home;
    }
    std::int32_t* const header = reinterpret_cast<std::int32_t*>(outgoing(p, h));
    header[0] = records;
    header[p.record.layer / 4] = p.layer;
    if (!p.record.has_counts) header[1] = home;
  }
  team.sync();
  for (int j = team.index; j < p.num_hosts * p.num_chunks; j += team.size) {
    const int h = j / p.num_chunks, chunk = j - h * p.num_chunks;
    int record = p.chunk_records[2 * j], home = p.chunk_records[2 * j + 1];
    const int end = begin_of_chunk(p, num_tokens, chunk + 1);
    for (int t = begin_of_chunk(p, num_tokens, chunk); t < end; ++t) {
      const int entries = entries_on_host(p, t, h), at = h * p.max_tokens + t;
      p.record_of[at] = entries > 0 ? record++ : -1;
      p.home_at[at] = p.max_m > 0 ? t * p.home_rows : home;
      home += home_rows_of(p, entries);
    }
  }
}

SLUICE_STEP void route_step(const Team& team, const RailSlot& p, const RailTokens& d) {
  if (team.index == 0) begin_operation(p);
  if (team.any(is_stopped(p))) {
    // Whoever reads these headers stops, too.
    for (int h = team.index; h < p.num_hosts; h += team.size) {
      *reinterpret_cast<std::int32_t*>(outgoing(p, h)) = -look(&p.state->failed);
    }
    return;
  }
  const int num_slots = p.placement.num_experts(), entries = d.num_tokens * p.num_topk;
  for (int s = team.index; s < num_slots; s += team.size) p.slot_rows[s] = 0;
  team.sync();
  for (int i = team.index; i < entries; i += team.size) {
    const int slot = slot_of_own_entry(p, d, i);
    p.slots[i] = slot;
    if (slot >= 0) add_to(&p.slot_rows[slot], 1);
  }
  team.sync();
  number_records(team, p, d.num_tokens);
  if (!p.record.has_counts) return;
  for (int i = team.index; i < num_slots; i += team.size) {
    const int rows = p.slot_rows[i];
    for (int h = 0; h < p.num_hosts; ++h) {
      reinterpret_cast<std::int32_t*>(outgoing(p, h) + p.record.counts)[i] = rows;
    }
  }
}

SLUICE_STEP void copy_vectors(const Team& team, std::byte* to, const std::byte* from, int bytes) {
  for (int v = team.index; v < bytes / 16; v += team.size) {
    reinterpret_cast<Vector*>(to)[v] = reinterpret_cast<const Vector*>(from)[v];
  }
}

/// An own token, quantized, to every host that needs it. payload and scales: of this token alone.
SLUICE_STEP void pack_step(const Team& team, const RailSlot& p, const RailTokens& d, int token,
                           const std::byte* payload, const float* scales) {
  for (int h = 0; h < p.num_hosts; ++h) {
    const int record = p.record_of[h * p.max_tokens + token];
    if (record < 0) continue;
    std::byte* const to = outgoing(p, h) + offset_of_record(p, record);
    copy_vectors(team, to, payload, p.record.payload_bytes);
    for (int g = team.index; g < p.record.num_scales; g += team.size) {
      reinterpret_cast<float*>(to + p.record.payload_bytes)[g] = scales[g];
    }
    // The words behind the scales: token, slots, weights, zeros.
    auto* const words = reinterpret_cast<std::int32_t*>(to + p.record.token);
    const int num_words = (p.record.bytes - p.record.token) / 4;
    for (int w = team.index; w < num_words; w += team.size) {
      const bool is_slot = w >= 1 && w <= p.num_topk;
      const bool is_weight = p.record.has_weights && w > p.num_topk && w <= 2 * p.num_topk;
      const int k = is_slot ? w - 1 : w - 1 - p.num_topk;
      const int slot = is_slot || is_weight ? p.slots[token * p.num_topk + k] : -1;
      const bool is_there = slot >= 0 && p.host_of[p.placement.rank_of(slot)] == h;
      std::int32_t value = w == 0 ? token : is_slot ? (is_there ? slot : -1) : 0;
      if (is_weight && is_there) {
        value = reinterpret_cast<const std::int32_t*>(d.weights)[token * p.num_topk + k];
      }
      words[w] = value;
    }
  }
}

/// What the host must know of each host: RailSizes.
SLUICE_STEP void sizes_step(const Team& team, const RailSlot& p) {
  for (int h = team.index; h < p.num_hosts; h += team.size) {
    const auto* const out = reinterpret_cast<const std::int32_t*>(outgoing(p, h));
    const auto* const in = reinterpret_cast<const std::int32_t*>(incoming(p, h));
    std::int32_t* const sizes = p.sizes + 4 * h;
    const bool sends = out[0] > 0, receives = in[0] > 0;
    sizes[0] = sends ? out[0] : 0, sizes[1] = sends ? out[1] : 0;
    sizes[2] = receives ? in[0] : 0, sizes[3] = receives ? in[1] : 0;
  }
}

}  // namespace sluice::cuda
