// rail_params.h - what the kernels of the CUDA exchange over several hosts are given.
//
//   own tokens --route, pack--> pieces --rail--> pieces --count, place, spread--> rows of this host
//   y <--sum-- home rows <--rail-- home rows <--relay-- rows of this host's experts
//
// Hosts have as many ranks each, so a rank is the relay of one rank on each host, itself included:
// what it keeps for them is numbered by their hosts. *Mates* are the ranks of this host, by local
// index. Plain values; what they point at lies in this rank's device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "exchange/cuda/exchange_kernels.h"
#include "exchange/slot_ranks.h"
#include "transport/device.cuh"

namespace sluice::cuda {

/// Most hosts: their CTAs wait for each other.
inline constexpr int kMaxRailHosts = 64;

/// A home piece begins with the relay's stop word (ExchangeState::failed) and zeros. So a reader
/// sees in what has come whether all of it is right, and if not, for whom the relay had stopped.
inline constexpr int kHomeHeaderBytes = 16;

/// Offsets in a header and a record: network_record.h, where the words of the header are the
/// number of records and then, in normal mode, the rows of bf16 that come home for them; `layer` is
/// the offset of Routing::layer.
struct RecordOffsets {
  int payload_bytes, num_scales, token, slots, weights, bytes, header_bytes, counts, layer;
  bool has_counts, has_weights;
};

/// What this rank keeps between two kernels of a slot, in device memory; zero at creation.
struct RailState {
  std::uint64_t epoch;        // Of the slot's last complete dispatch.
  std::uint64_t begun, done;  // Operations: RailProgress.
  int refused;                // The slot's dispatch exceeded a capacity.
  int arrived;                // CTAs of the running kernel that are done.
};

struct RailSlot {
  DeviceWindow window;  // Of the mates; `rank` is the own local index.
  // Offsets in a window.
  std::size_t dispatched, returned;  // [mates] u64, as in device_layout.h
  std::size_t counts;                // [num_ranks, count_width] u64: count_stamp() << 32 | rows
  std::size_t x, scale, expert_y;    // [rows]
  ExpertPlacement placement;
  RecordOffsets record;
  int rank, num_ranks, host, num_hosts;
  const std::int32_t *host_of, *local_of;  // [num_ranks]
  const std::int32_t* rail;                // [num_hosts] this rail's rank on each host
  const std::int32_t* mates;               // [mates] their ranks
  const std::int32_t* part_of;             // [slots] within the slot's host
  int num_topk, hidden, max_tokens;
  int max_m;        // 0: contiguous rows, normal mode.
  int num_parts;    // Of one host; 0: rows go home by themselves.
  int home_rows;    // Rows of bf16 that a token has room for in a fixed piece.
  int count_width;  // All slots, or in normal mode those of one host.
  int num_chunks;   // Into which records and tokens are cut where order counts.
  std::uint64_t timeout_ns;

  std::size_t piece_stride, home_stride;
  std::int32_t* slots;            // [T, k] of the own entries, or -1
  std::int32_t* slot_rows;        // [slots] rows of the own tokens for each
  std::int32_t* chunk_records;    // [num_hosts, num_chunks, 2] records, rows home
  std::int32_t* record_of;        // [num_hosts, T] record of the own token there, or -1
  std::int32_t* home_at;          // [num_hosts, T] its first row in `home_in`
  std::byte *send, *pieces;       // [num_hosts, piece_stride]; the own piece is in `pieces`
  std::int64_t* place;            // [num_hosts, T, k] by record: mate << 32 | row, or -1
  std::int32_t* relay_at;         // [num_hosts, T] by record: first row in `home_out`
  std::byte *home_out, *home_in;  // [num_hosts, home_stride]
  std::int64_t* row_begin;        // [num_local]
  std::int32_t* num_rows;         // [num_local]
  RailState* slot;
  ExchangeState* state;
  DeviceFault* faults;          // [2] by FaultRecord, host-mapped
  const std::uint64_t* stop;    // Host-mapped: the stop word of a rail that has failed.
  std::uint64_t *begun, *done;  // Host-mapped: RailProgress.
  std::int32_t* sizes;          // Host-mapped, [num_hosts, 4]: RailSizes
  const std::uint32_t* placed;  // ExpertSlots::device_table(), or null
  int num_experts;
  int layer;  // Routing::layer of the dispatch.
};

/// What the host must know to queue pieces of exact sizes, of one host.
struct RailSizes {
  std::int32_t records_out, home_in;  // Of the own tokens: records sent, rows of bf16 awaited.
  std::int32_t records_in, home_out;  // Of its tokens here.
};

struct RailTokens {
  const std::uint16_t* x;  // [num_tokens, hidden] bf16
  const void* topk_idx;    // [num_tokens, num_topk] int32 or int64
  const float* weights;    // [num_tokens, num_topk]
  bool wide_idx;
  int num_tokens;
  float static_inverse;      // 1 / s1
  std::int64_t* row_totals;  // [num_local] += num_rows; null: nobody counts.
  float factor;
  std::uint16_t* y;  // [num_tokens, hidden] bf16
};

}  // namespace sluice::cuda
