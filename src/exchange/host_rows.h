// host_rows.h - the rows that a rank received, and where each came from: in host memory, whichever
// way the rows took.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "exchange/host_layout.h"
#include "exchange/slot_ranks.h"
#include "sluice/exchange.h"

namespace sluice {

/// Rows that every rank sends to every expert slot: [num_ranks, num_slots] i32, the same on all
/// ranks once all are there.
class RowCounts {
 public:
  RowCounts(const std::int32_t* counts, int num_ranks, int num_slots)
      : counts_(counts), num_ranks_(num_ranks), num_slots_(static_cast<std::size_t>(num_slots)) {}
  [[nodiscard]] std::int32_t at(int source, int slot) const {
    return counts_[static_cast<std::size_t>(source) * num_slots_ + static_cast<std::size_t>(slot)];
  }
  /// The first row of `source` within each slot: those of all lower ranks come before it.
  [[nodiscard]] std::vector<std::int64_t> first_rows(int source) const;
  /// Every rank has the same counts, so every rank refuses, or none.
  /// Throws: kInvalidArgument naming the expert that would receive more than max_m rows.
  void check_capacity(int max_m, const ExpertSlots* slots) const;

 private:
  const std::int32_t* counts_;
  int num_ranks_;
  std::size_t num_slots_;
};

/// Rows for each slot of this rank's own entries: [num_slots].   slots: of the entries, -1: none.
[[nodiscard]] std::vector<std::int32_t> count_entries(std::span<const std::int32_t> slots,
                                                      int num_slots);

/// Where a received row came from.
struct RowOrigin {
  std::int32_t source;      ///< Rank.
  std::int32_t token_slot;  ///< token * num_topk + top-k entry at the source.
};

/// Rows by local expert, in the batch's layout.
struct HostRows {
  std::vector<std::int32_t> num_rows;   // [num_local_experts]
  std::vector<std::int64_t> row_begin;  // [num_local_experts]
  std::vector<RowOrigin> origin;        // [rows, expert after expert]

  /// Calls body(origin, row of the batch) for every row, expert after expert.
  template <class Body>
  void for_each(const Body& body) const {
    const RowOrigin* from = origin.data();
    for (std::size_t e = 0; e < num_rows.size(); ++e) {
      for (std::int64_t r = 0; r < num_rows[e]; ++r) {
        body(*from++, static_cast<std::size_t>(row_begin[e] + r));
      }
    }
  }
  /// Adds num_rows to `totals`, [num_local_experts] int64, unless it is empty.
  void add_to(const MutableTensorView& totals) const;
};

/// Of the `slots` of a token's top-k entries: the local expert of each one on rank `peer`, else -1.
/// False if none is there.   experts: [num_topk]
[[nodiscard]] bool local_experts_on(int peer, const ExpertPlacement& placement,
                                    std::span<const std::int32_t> slots,
                                    std::span<std::int32_t> experts);

/// What has arrived in `slot`, a slot of the window, on rank `rank`: fills `rows`, and `batch` over
/// them. Masked layout: the rows stay where they are.
void take_masked_rows(const ExchangeConfig& config, const ReceiveLayout& layout, int rank,
                      std::byte* slot, HostRows& rows, ExpertBatch& batch);
/// The same of token copies, which are expanded into `expanded`, the memory behind the window.
void take_copies(const ExchangeConfig& config, const ReceiveLayout& layout, const std::byte* slot,
                 std::byte* expanded, HostRows& rows, ExpertBatch& batch);

}  // namespace sluice
