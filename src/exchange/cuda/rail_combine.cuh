// rail_combine.cuh - the steps of combine over hosts: sums in the order of exchange/sum_parts.h.
//
//   give     one team: tells the mates that expert_y may be read
//   await    every team that reads it: until all mates have said so
//   relay    a team for each record of another host: its rows, or their sum, into the home piece
//   (rail)
//   sum      a team for each own token
//
// Rows are read where the mates' experts wrote them.
#pragma once

#include "exchange/cuda/rail_protocol.cuh"
#include "exchange/cuda/sum_tree.cuh"

namespace sluice::cuda {

/// What a host makes of a token, 8 channels: its parts, then their rounds. False: it has no row.
SLUICE_STEP bool sum_on_host(const RailSlot& p, const RowsOfToken& rows, int v, SumTree tree,
                             Lanes& sum) {
  if (p.num_parts <= 1) return add_part(rows, p.num_topk, -1, v, sum);
  for (int part = next_part(rows, p.num_topk, -1); part >= 0;
       part = next_part(rows, p.num_topk, part)) {
    Lanes of_part{};
    (void)add_part(rows, p.num_topk, part, v, of_part);
    tree.add(part, of_part);
  }
  if (tree.is_empty()) return false;
  sum = tree.total();
  return true;
}

/// A row of the mates' experts: mate << 32 | row.
SLUICE_STEP const Vector* expert_row(const RailSlot& p, std::int64_t place) {
  return in_window<const Vector>(p, static_cast<int>(place >> 32), p.expert_y) +
         (place & 0xffffffff) * (p.hidden / 8);
}
/// Row `row` of bf16 of a home piece.
SLUICE_STEP Vector* home_row(const RailSlot& p, std::byte* pieces, int h, int row) {
  return reinterpret_cast<Vector*>(pieces + static_cast<std::size_t>(h) * p.home_stride +
                                   kHomeHeaderBytes) +
         std::int64_t{row} * (p.hidden / 8);
}

SLUICE_STEP void give_step(const Team& team, const RailSlot& p, bool dropped) {
  if (team.any(is_stopped(p))) return;
  signal_mates(team, p, p.returned, 2 * p.slot->epoch + (dropped ? 1 : 0));
}

SLUICE_STEP void await_step(const Team& team, const RailSlot& p) {
  if (team.any(is_stopped(p) || (team.index == 0 && rail_has_failed(p)))) return;
  (void)wait_for_mates(team, p, p.returned, kCombineRows, p.slot->epoch);
}

/// The rows of record `i` from host `h`, which lie on this host. Returns how many.
SLUICE_STEP int find_record_rows(const Team& team, const RailSlot& p, int h, int i,
                                 RowsOfToken& rows) {
  const std::int32_t* const slots = slots_of_record(p, record_at(p, h, i));
  const auto* const weights = reinterpret_cast<const float*>(record_at(p, h, i) + p.record.weights);
  const std::int64_t* const place = p.place + (std::int64_t{h} * p.max_tokens + i) * p.num_topk;
  team.sync();  // Of the record before.
  for (int k = team.index; k < p.num_topk; k += team.size) {
    const bool is_here = slots[k] >= 0 && place[k] >= 0;
    rows.at[k] = is_here ? expert_row(p, place[k]) : nullptr;
    rows.weight[k] = is_here && p.record.has_weights ? weights[k] : 0.0f;
    rows.part[k] = is_here && p.num_parts > 1 ? p.part_of[slots[k]] : 0;
    if (is_here) add_to(&p.state->stats.returned[place[k] >> 32], 1ull);
  }
  team.sync();
  int count = 0;
  for (int k = 0; k < p.num_topk; ++k) count += rows.at[k] != nullptr;
  return count;
}

/// What this host made of record `i` from host `h`, into the piece that goes home. A team that
/// cannot says so in the piece, which is then read no further.
SLUICE_STEP void relay_step(const Team& team, const RailSlot& p, int h, int i,
                            const SumSpace& space) {
  if (h == p.host) return;
  if (team.any(is_stopped(p))) {
    if (team.index == 0) set(home_stop_word(p, p.home_out, h), look(&p.state->failed));
    return;
  }
  if (i >= num_records(p, h) || p.slot->refused != 0) return;
  RowsOfToken& rows = *space.rows;
  const int count = find_record_rows(team, p, h, i, rows), vectors = p.hidden / 8;
  Vector* to = home_row(p, p.home_out, h, p.relay_at[h * p.max_tokens + i]);
  if (p.num_parts == 0 || count == 1) {
    // In a fixed piece, rows that go home by themselves are at their entries' places.
    for (int k = 0; k < p.num_topk; ++k) {
      if (rows.at[k] == nullptr) continue;
      Vector* const row = p.max_m > 0 && p.num_parts == 0 ? to + k * vectors : to;
      for (int v = team.index; v < vectors; v += team.size) row[v] = rows.at[k][v];
      if (p.max_m == 0 || p.num_parts > 0) to += vectors;
    }
    return;
  }
  for (int v = team.index; v < vectors; v += team.size) {
    Lanes sum{};
    (void)sum_on_host(p, rows, v, SumTree(space.levels + team.index, team.size), sum);
    // float32: two vectors for one of bf16.
    auto* const out = reinterpret_cast<Half*>(to) + 2 * v;
    out[0] = {{sum.value[0], sum.value[1], sum.value[2], sum.value[3]}};
    out[1] = {{sum.value[4], sum.value[5], sum.value[6], sum.value[7]}};
  }
}

/// The rows of an own token whose experts are on this host and, where rows come home by themselves,
/// all of them.
SLUICE_STEP void find_own_rows(const Team& team, const RailSlot& p, const RailTokens& d, int token,
                               RowsOfToken& rows) {
  const int record = p.record_of[p.host * p.max_tokens + token];
  const std::int64_t* const place =
      p.place + (std::int64_t{p.host} * p.max_tokens + record) * p.num_topk;
  team.sync();  // Of the token before.
  for (int k = team.index; k < p.num_topk; k += team.size) {
    const int slot = p.slots[token * p.num_topk + k];
    const int h = slot < 0 ? -1 : p.host_of[p.placement.rank_of(slot)];
    rows.at[k] = nullptr, rows.part[k] = 0;
    rows.weight[k] = d.weights[token * p.num_topk + k];
    if (h == p.host) {
      rows.at[k] = place[k] >= 0 ? expert_row(p, place[k]) : nullptr;
      if (rows.at[k] != nullptr) add_to(&p.state->stats.returned[place[k] >> 32], 1ull);
      if (p.num_parts > 1) rows.part[k] = p.part_of[slot];
    } else if (h >= 0 && p.num_parts == 0) {
      int before = 0;  // Entries of the token on that host.
      for (int j = 0; j < k; ++j) {
        const int other = p.slots[token * p.num_topk + j];
        before += other >= 0 && p.host_of[p.placement.rank_of(other)] == h;
      }
      const int at = p.home_at[h * p.max_tokens + token] + (p.max_m > 0 ? k : before);
      rows.at[k] = home_row(p, p.home_in, h, at);
    }
  }
  team.sync();
}

/// What another host sent for an own token, 8 channels. False: the token has no entry there.
SLUICE_STEP bool sum_of_other_host(const RailSlot& p, const RailTokens& d, int token, int h, int v,
                                   Lanes& sum) {
  int entries = 0;
  float weight = 0;
  for (int k = 0; k < p.num_topk; ++k) {
    const int slot = p.slots[token * p.num_topk + k];
    if (slot < 0 || p.host_of[p.placement.rank_of(slot)] != h) continue;
    weight = d.weights[token * p.num_topk + k];
    ++entries;
  }
  if (entries == 0) return false;
  const Vector* const from = home_row(p, p.home_in, h, p.home_at[h * p.max_tokens + token]);
  if (entries == 1) {
    add_row(sum, from[v], weight);
    return true;
  }
  const auto* const halves = reinterpret_cast<const Half*>(from) + 2 * v;
  const Half low = halves[0], high = halves[1];
  sum = {{low.value[0], low.value[1], low.value[2], low.value[3], high.value[0], high.value[1],
          high.value[2], high.value[3]}};
  return true;
}

/// Every team, before its first sum: is what came from all other hosts whole? No piece that comes
/// later is: an exchange stops for good.
SLUICE_STEP void check_home_step(const Team& team, const RailSlot& p) {
  for (int h = team.index; h < p.num_hosts; h += team.size) {
    const int word = h == p.host ? 0 : *home_stop_word(p, p.home_in, h);
    if (word != 0) stop_for_relay(p, h, word, kCombineRows, p.slot->epoch);
  }
}

/// y of an own token; NaN if the exchange has stopped, or the dispatch was refused.
SLUICE_STEP void sum_step(const Team& team, const RailSlot& p, const RailTokens& d, int token,
                          const SumSpace& space) {
  const int vectors = p.hidden / 8;
  Vector* const y = reinterpret_cast<Vector*>(d.y) + std::int64_t{token} * vectors;
  if (team.any(is_stopped(p) || p.slot->refused != 0)) {
    for (int v = team.index; v < vectors; v += team.size) {
      y[v] = {{0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u}};
    }
    return;
  }
  RowsOfToken& rows = *space.rows;
  find_own_rows(team, p, d, token, rows);
  for (int v = team.index; v < vectors; v += team.size) {
    Lanes sum{};
    if (p.num_parts == 0) {
      (void)add_part(rows, p.num_topk, -1, v, sum);
    } else {
      SumTree hosts(space.levels + team.index, team.size);
      for (int h = 0; h < p.num_hosts; ++h) {
        Lanes of_host{};
        const bool found = h == p.host ? sum_on_host(p, rows, v, hosts.above(), of_host)
                                       : sum_of_other_host(p, d, token, h, v, of_host);
        if (found) hosts.add(h, of_host);
      }
      sum = hosts.total();
    }
    Vector out;
    SLUICE_UNROLL
    for (int w = 0; w < 4; ++w) {
      out.word[w] = bf16_pair(multiply_rounded(sum.value[2 * w], d.factor),
                              multiply_rounded(sum.value[2 * w + 1], d.factor));
    }
    y[v] = out;
  }
}

/// The valid rows of the caller's expert_y, to where mates read them: rows of local expert `l`.
SLUICE_STEP void keep_rows_step(const Team& team, const RailSlot& p, const Vector* expert_y, int l,
                                int part, int num_parts) {
  const int vectors = p.hidden / 8;
  const std::int64_t first = p.row_begin[l] * vectors;
  const std::int64_t count = std::int64_t{p.num_rows[l]} * vectors;
  Vector* const to = in_window<Vector>(p, p.window.rank, p.expert_y);
  for (std::int64_t v = std::int64_t{part} * team.size + team.index; v < count;
       v += std::int64_t{num_parts} * team.size) {
    to[first + v] = expert_y[first + v];
  }
}

}  // namespace sluice::cuda
