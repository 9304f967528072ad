#include "exchange/host_rows.h"

#include <cstring>

#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {

std::vector<std::int64_t> RowCounts::first_rows(int source) const {
  std::vector<std::int64_t> first(num_slots_);
  for (int lower = 0; lower < source; ++lower) {
    for (std::size_t slot = 0; slot < num_slots_; ++slot) {
      first[slot] += at(lower, static_cast<int>(slot));
    }
  }
  return first;
}

void RowCounts::check_capacity(int max_m, const ExpertSlots* slots) const {
  for (int slot = 0; slot < static_cast<int>(num_slots_); ++slot) {
    std::int64_t rows = 0;
    for (int source = 0; source < num_ranks_; ++source) rows += at(source, slot);
    if (rows <= max_m) continue;
    fail(ErrorCode::kInvalidArgument, "expert {} would receive {} rows{}, max_m is {}",
         slots == nullptr ? slot : slots->placement().expert_of(slot), rows,
         slots == nullptr ? "" : fmt::format(" in slot {}", slot), max_m);
  }
}

std::vector<std::int32_t> count_entries(std::span<const std::int32_t> slots, int num_slots) {
  std::vector<std::int32_t> counts(static_cast<std::size_t>(num_slots));
  for (const std::int32_t slot : slots) {
    if (slot >= 0) ++counts[static_cast<std::size_t>(slot)];
  }
  return counts;
}

bool local_experts_on(int peer, const ExpertPlacement& placement,
                      std::span<const std::int32_t> slots, std::span<std::int32_t> experts) {
  bool is_needed = false;
  for (std::size_t k = 0; k < experts.size(); ++k) {
    const bool is_here = slots[k] >= 0 && placement.rank_of(slots[k]) == peer;
    experts[k] = is_here ? placement.local_of(slots[k]) : -1;
    is_needed |= is_here;
  }
  return is_needed;
}

void HostRows::add_to(const MutableTensorView& totals) const {
  if (totals.empty()) return;
  for (std::size_t e = 0; e < num_rows.size(); ++e) totals.as<std::int64_t>()[e] += num_rows[e];
}

namespace {

/// Masked layout: rows of local expert e from e * max_m on.
/// token_slots: [num_local, max_m] of the rows that arrived.
HostRows masked_rows(const RowCounts& counts, const std::int32_t* token_slots,
                     const ExpertPlacement& placement, int rank, int num_ranks, int max_m) {
  HostRows rows;
  for (int e = 0; e < placement.num_local(); ++e) {
    const std::int64_t begin = std::int64_t{e} * max_m;
    const int slot = placement.expert_of(rank, e);
    std::int32_t row = 0;
    for (int source = 0; source < num_ranks; ++source) {
      const std::int32_t end = row + counts.at(source, slot);
      for (; row < end; ++row) rows.origin.push_back({source, token_slots[begin + row]});
    }
    rows.num_rows.push_back(row);
    rows.row_begin.push_back(begin);
  }
  return rows;
}

/// Token copies that arrived, from each source rank in order of its tokens.
struct TokenCopies {
  const std::int32_t* num_copies;  ///< [num_ranks]
  const std::byte* x;              ///< [num_ranks, T, payload_bytes]
  const std::byte* scale;          ///< [num_ranks, T, scale_bytes]
  const std::int32_t* experts;     ///< [num_ranks, T, k] local expert of each top-k entry, or -1
  const std::int32_t* token;       ///< [num_ranks, T]
  int num_ranks, num_topk;
  std::int64_t max_tokens;  ///< T
  std::size_t payload_bytes, scale_bytes;
};

/// Calls body(copy, source, entry, local expert) in order of (source, token, entry).
template <class Body>
void for_each_row(const TokenCopies& c, const Body& body) {
  const auto topk = static_cast<std::size_t>(c.num_topk);
  for (int source = 0; source < c.num_ranks; ++source) {
    const std::size_t first =
        static_cast<std::size_t>(source) * static_cast<std::size_t>(c.max_tokens);
    const std::size_t last = first + static_cast<std::size_t>(c.num_copies[source]);
    for (std::size_t copy = first; copy < last; ++copy) {
      for (std::size_t k = 0; k < topk; ++k) {
        const std::int32_t e = c.experts[copy * topk + k];
        if (e >= 0) body(copy, source, static_cast<int>(k), static_cast<std::size_t>(e));
      }
    }
  }
}

/// Contiguous layout: copies every token to its rows, in order of (expert, source, token, entry).
/// rows_x: [rows, payload_bytes].   rows_scale: [rows, scale_bytes].
HostRows expand_copies(const TokenCopies& copies, int num_local, std::byte* rows_x,
                       std::byte* rows_scale) {
  HostRows rows;
  const auto count = static_cast<std::size_t>(num_local);
  rows.num_rows.assign(count, 0);
  rows.row_begin.assign(count, 0);
  for_each_row(copies, [&](std::size_t, int, int, std::size_t e) { ++rows.num_rows[e]; });
  for (std::size_t e = 1; e < count; ++e) {
    rows.row_begin[e] = rows.row_begin[e - 1] + rows.num_rows[e - 1];
  }
  rows.origin.resize(static_cast<std::size_t>(rows.row_begin.back() + rows.num_rows.back()));
  std::vector<std::int64_t> next = rows.row_begin;
  for_each_row(copies, [&](std::size_t copy, int source, int k, std::size_t e) {
    const auto row = static_cast<std::size_t>(next[e]++);
    std::memcpy(rows_x + row * copies.payload_bytes, copies.x + copy * copies.payload_bytes,
                copies.payload_bytes);
    if (copies.scale_bytes > 0) {
      std::memcpy(rows_scale + row * copies.scale_bytes, copies.scale + copy * copies.scale_bytes,
                  copies.scale_bytes);
    }
    rows.origin[row] = {source, copies.token[copy] * copies.num_topk + k};
  });
  return rows;
}

/// The views of a batch over these rows.   shape: [num_local, max_m, hidden] or [rows, hidden].
void fill_batch(const ExchangeConfig& config, HostRows& rows, std::byte* x, std::byte* scale,
                Shape shape, ExpertBatch& batch) {
  const bool bf16 = config.wire == WireFormat::kBf16;
  batch.layout = config.mode;
  batch.x = {x, bf16 ? DType::kBFloat16 : DType::kFloat8E4M3, shape};
  if (wire_scale_bytes(config.wire, config.hidden) > 0) {
    const std::int64_t groups = scales_per_row(sent_cast(config.wire), config.hidden);
    batch.x_scale = {
        scale, DType::kFloat32,
        shape.rank() == 3 ? Shape{shape[0], shape[1], groups} : Shape{shape[0], groups}};
  }
  const auto num_local = static_cast<std::int64_t>(rows.num_rows.size());
  batch.num_rows = {rows.num_rows.data(), DType::kInt32, Shape{num_local}};
  batch.row_begin = {rows.row_begin.data(), DType::kInt64, Shape{num_local}};
}

}  // namespace

void take_masked_rows(const ExchangeConfig& config, const ReceiveLayout& layout, int rank,
                      std::byte* slot, HostRows& rows, ExpertBatch& batch) {
  const ExpertPlacement& placement = layout.placement;
  const RowCounts counts(reinterpret_cast<const std::int32_t*>(slot + layout.counts),
                         placement.num_ranks(), placement.num_experts());
  rows = masked_rows(counts, reinterpret_cast<const std::int32_t*>(slot + layout.origin), placement,
                     rank, placement.num_ranks(), config.max_m);
  fill_batch(config, rows, slot + layout.x, slot + layout.scale,
             Shape{placement.num_local(), config.max_m, config.hidden}, batch);
}

void take_copies(const ExchangeConfig& config, const ReceiveLayout& layout, const std::byte* slot,
                 std::byte* expanded, HostRows& rows, ExpertBatch& batch) {
  const auto words = [slot](std::size_t offset) {
    return reinterpret_cast<const std::int32_t*>(slot + offset);
  };
  const TokenCopies copies{.num_copies = words(layout.counts),
                           .x = slot + layout.x,
                           .scale = slot + layout.scale,
                           .experts = words(layout.experts),
                           .token = words(layout.token),
                           .num_ranks = layout.placement.num_ranks(),
                           .num_topk = config.num_topk,
                           .max_tokens = config.max_tokens_per_rank,
                           .payload_bytes = layout.payload_bytes,
                           .scale_bytes = layout.scale_bytes};
  std::byte* const scales = expanded + layout.rows_x_bytes;
  rows = expand_copies(copies, layout.placement.num_local(), expanded, scales);
  fill_batch(config, rows, expanded, scales, Shape{layout.expanded_rows, config.hidden}, batch);
}

}  // namespace sluice
