// rail_spread.cuh - the last steps of dispatch: the rows of the records go to the rows that
// rail_place.cuh has chosen.
//
//   spread   a team for each record: rows to the mates
//   finish   one team, when all records are spread: flags to the mates and theirs
#pragma once

#include "exchange/cuda/rail_protocol.cuh"

namespace sluice::cuda {

/// Puts a record's rows where the mates' experts read them.
SLUICE_STEP void spread_step(const Team& team, const RailSlot& p, int h, int i) {
  if (i >= num_records(p, h)) return;
  const std::byte* const record = record_at(p, h, i);
  const std::int64_t* const place = p.place + (std::int64_t{h} * p.max_tokens + i) * p.num_topk;
  const auto* const payload = reinterpret_cast<const Vector*>(record);
  const auto* const scales = reinterpret_cast<const float*>(record + p.record.payload_bytes);
  const int vectors = p.record.payload_bytes / 16, groups = p.record.num_scales;
  for (int v = team.index; v < vectors; v += team.size) {
    const Vector value = payload[v];
    for (int k = 0; k < p.num_topk; ++k) {
      const std::int64_t at = place[k];
      if (at < 0) continue;
      in_window<Vector>(p, static_cast<int>(at >> 32), p.x)[(at & 0xffffffff) * vectors + v] =
          value;
    }
  }
  for (int g = team.index; g < groups; g += team.size) {
    for (int k = 0; k < p.num_topk; ++k) {
      const std::int64_t at = place[k];
      if (at < 0) continue;
      in_window<float>(p, static_cast<int>(at >> 32), p.scale)[(at & 0xffffffff) * groups + g] =
          scales[g];
    }
  }
  for (int k = team.index; k < p.num_topk; k += team.size) {
    if (place[k] >= 0) add_to(&p.state->stats.rows[place[k] >> 32], 1ull);
  }
}

SLUICE_STEP void forget_received(const Team& team, const RailSlot& p) {
  for (int l = team.index; l < p.placement.num_local(); l += team.size) p.num_rows[l] = 0;
}

SLUICE_STEP void finish_step(const Team& team, const RailSlot& p) {
  bool ok = !team.any(is_stopped(p));
  if (ok) {
    const std::uint64_t epoch = p.slot->epoch + 1;
    signal_mates(team, p, p.dispatched, epoch);
    ok = wait_for_mates(team, p, p.dispatched, kDispatchRows, epoch);
    if (ok && team.index == 0) p.slot->epoch = epoch;
  }
  if (!ok) forget_received(team, p);
  team.sync();
  if (team.index == 0) end_operation(p);
}

}  // namespace sluice::cuda
