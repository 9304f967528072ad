// exchange.h - carries tokens to the ranks that own their experts, and back.
//
// One MoE layer, seen from one rank:
//
//   x [num_tokens, hidden]                        y [num_tokens, hidden]
//       |                                                ^
//    dispatch: rows out to the experts' ranks         combine: topk-weighted sum
//       v                                                |
//   ExpertBatch, grouped by local expert  --grouped GEMMs-->  expert_y
//
// An Exchange owns every buffer it will ever need. Routing lives in the Dispatched value, never in
// the Exchange: up to `num_in_flight` layers may be between dispatch and combine at once.
//
// Rank r owns experts [r * num_local_experts, (r + 1) * num_local_experts), unless ExpertSlots say
// where they are. A *row* is one token's copy for one expert. Within an expert, rows are ordered by
// (source rank, token, k), by prefix sums: the same inputs give the same bytes in the same rows,
// every time, on every transport.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "sluice/hosts.h"
#include "sluice/placement.h"
#include "sluice/recipe.h"
#include "sluice/stream.h"
#include "sluice/tensor.h"

namespace sluice {

class Backend;
class DeviceBuffer;
class Layer;
class LayerGroup;
class Transport;

/// Limits of an Exchange. The same on every rank; create() checks that they agree.
struct ExchangeConfig {
  Mode mode = Mode::kLowLatency;
  WireFormat wire = WireFormat::kE4m3Group;
  int num_experts = 0;  ///< Over all ranks. Multiple of num_ranks, unless num_slots is set.
  /// Slots for experts over all ranks, a multiple of num_ranks; every dispatch then says which
  /// expert is where (Routing::slots). 0: as many as experts, expert e in slot e.
  int num_slots = 0;
  int num_topk = 0;             ///< Experts per token, 1 .. 32.
  int hidden = 0;               ///< Elements per token. Multiple of 128.
  int max_tokens_per_rank = 0;  ///< Largest num_tokens of any dispatch().
  /// Low-latency: rows reserved per local expert; 0 = num_ranks * max_tokens_per_rank, which no
  /// routing without repeated experts can exceed. More rows than this are refused on every rank.
  int max_m = 0;
  /// Which rank is on which host; empty: Transport::hosts(). In CUDA memory several hosts need
  /// transport nccl, and as many ranks on each.
  Hosts hosts = {};
  /// Parts of the experts that combine() adds up apart, as it says; 0: as many as hosts. With more
  /// than one host: 1, or as many as hosts, times a power of two where they are even and in order.
  /// In CUDA memory of one host: 1.
  int sum_parts = 0;
  float routed_scaling_factor = 1.0f;              ///< Applied once, by combine().
  int num_in_flight = 2;                           ///< Dispatched values alive at once, 1 .. 8.
  std::chrono::milliseconds peer_timeout{10'000};  ///< Longest wait for any one peer.
  /// CUDA: the most SMs one operation may use; 0 = this rank's even share of its device, the limit.
  int num_sms = 0;

  [[nodiscard]] int total_slots() const noexcept {
    return num_slots != 0 ? num_slots : num_experts;
  }
  /// sum_parts, or what its 0 stands for.
  [[nodiscard]] int total_parts() const noexcept {
    return sum_parts != 0 ? sum_parts : hosts.num_hosts();
  }
};

/// A placement where dispatches read it: on CUDA, a table in the device's memory that stays there
/// when the placement is replaced, so that a captured graph goes on with the new one.
class ExpertSlots {
 public:
  /// Borrows `backend`.   Throws: kOutOfMemory.
  ExpertSlots(const Placement& placement, Backend& backend);
  ExpertSlots(ExpertSlots&&) noexcept;
  ExpertSlots& operator=(ExpertSlots&&) noexcept;
  ~ExpertSlots();

  /// Replaces it by a placement of as many experts, slots and ranks.
  /// Stream: waits for it; no other stream may have a dispatch queued that reads these slots.
  /// Throws: kInvalidArgument naming the number that differs.
  void assign(const Placement& placement, Stream stream);
  [[nodiscard]] const Placement& placement() const noexcept { return placement_; }

  /// Device memory; null where the exchange reads placement() itself.
  ///   [num_experts + 1] where each expert's slots begin in the next part
  ///   [num_slots]       slots by expert, ascending
  ///   [num_slots]       expert of each slot, or 2^32 - 1
  [[nodiscard]] const std::uint32_t* device_table() const noexcept;

 private:
  void write_table(Stream stream);
  Placement placement_;
  Backend* backend_;
  std::unique_ptr<DeviceBuffer> table_;
};

/// The router's choice for each token, unchanged from dispatch() until combine() has run.
struct Routing {
  TensorView topk_idx;      ///< [num_tokens, num_topk] int32 or int64; -1 leaves an entry empty.
  TensorView topk_weights;  ///< [num_tokens, num_topk] float32; used as given.
  /// [num_local_experts] int64 in the backend's memory, or empty: to each, dispatch adds the rows
  /// that the local expert receives. Nobody else writes there while calls are queued.
  MutableTensorView row_totals = {};
  /// Where the experts are, for an exchange with num_slots; a Layer sets its own. The same value on
  /// every rank: the exchange does not compare it, LayerGroup and Layer::rebalance() do.
  const ExpertSlots* slots = nullptr;
  /// Which of the layers that share the exchange this is for, 1 .. kMaxLayer, or 0; a Layer sets
  /// its own. Ranks that dispatch for different layers find that out before a row is used.
  int layer = 0;
  static constexpr int kMaxLayer = 65535;
};

/// Rows received by one rank.
/// kLowLatency, masked layout: local expert e has rows [e * max_m, e * max_m + num_rows[e]).
/// kNormal, contiguous layout: local expert e has rows [row_begin[e], row_begin[e] + num_rows[e]).
/// Rows outside these ranges hold unspecified bytes.
struct ExpertBatch {
  Mode layout = Mode::kLowLatency;
  TensorView x;         ///< [num_local_experts, max_m, hidden] or [max_rows, hidden]; bf16 or e4m3.
  TensorView x_scale;   ///< x's shape with hidden / 128 or, by token, 1; float32. Or empty.
  TensorView num_rows;  ///< [num_local_experts] int32 (`masked_m`).
  TensorView row_begin;  ///< [num_local_experts] int64, in rows of x.
  int expected_m = 0;    ///< Mean rows per expert, from host data. A tuning hint only.
};

/// What dispatch() returns: the batch, and the way home for its rows. Its memory returns to the
/// Exchange when this is consumed by combine() or destroyed.
class Dispatched {
 public:
  Dispatched(Dispatched&&) noexcept;
  Dispatched& operator=(Dispatched&&) noexcept;
  ~Dispatched();

  [[nodiscard]] const ExpertBatch& batch() const noexcept;
  /// Memory of the exchange, shaped like combine()'s expert_y, from which combine() sends without
  /// copying first: let the experts write here. Empty where a copy costs nothing more (CPU).
  [[nodiscard]] MutableTensorView expert_y() const noexcept;

  struct Route;  ///< Internal.

 private:
  friend class Exchange;
  friend class Layer;
  explicit Dispatched(std::unique_ptr<Route> route) noexcept;
  std::unique_ptr<Route> route_;
};

/// Monotonic counters since create(); the consumer subtracts.
struct ExchangeCounters {
  std::vector<std::uint64_t> dispatch_bytes;  ///< [num_ranks] put to each rank, own included.
  /// [num_ranks] put to each rank (CPU, and over the network), or of rows that came from each
  /// rank's experts (CUDA, on a host).
  std::vector<std::uint64_t> combine_bytes;
  std::vector<std::uint64_t> dispatch_rows;  ///< [num_ranks] token copies sent to each rank.
  std::vector<std::uint64_t> wait_ns;        ///< [num_ranks] spent waiting for each source.
  std::uint64_t num_dispatches = 0;
  std::uint64_t saturated_values = 0;  ///< Elements clipped to +-448 while quantizing to send.
};

/// Dispatch and combine for one expert-parallel group.
///
/// Threads: one at a time. Ranks: create(), dispatch() and combine() are collective, and every rank
/// makes the same calls in the same order. A call that throws kInvalidArgument has not been made:
/// a rank on which it does so alone makes it again, or all ranks make a new exchange.
class Exchange {
 public:
  /// Bytes create() will take on each rank, in memory of `kind` (docs/exchange.md).
  [[nodiscard]] static std::size_t workspace_bytes(const ExchangeConfig& config, int num_ranks,
                                                   Device::Kind kind = Device::Kind::kHost);

  /// max_rows() of an Exchange made with this configuration.
  [[nodiscard]] static std::int64_t max_rows(const ExchangeConfig& config, int num_ranks);

  /// Borrows `transport` and `backend` for its lifetime.
  /// Throws: kInvalidArgument (names the field), kTransport naming the ranks and the field on which
  ///   configurations differ, kOutOfMemory, kUnsupported if this transport cannot reach this
  ///   backend's memory, kPeerTimeout.
  [[nodiscard]] static Exchange create(const ExchangeConfig& config, Transport& transport,
                                       Backend& backend);

  Exchange(Exchange&&) noexcept;
  Exchange& operator=(Exchange&&) noexcept;
  ~Exchange();

  [[nodiscard]] const ExchangeConfig& config() const noexcept;
  [[nodiscard]] int num_local_experts() const noexcept;
  /// Rows of batch().x: num_local_experts * max_m, or the most that normal mode receives.
  [[nodiscard]] std::int64_t max_rows() const noexcept;
  /// What create() took on this rank: workspace_bytes(), counted.
  [[nodiscard]] std::size_t held_bytes() const noexcept;

  /// Quantizes `x` to the wire format and sends each token to its experts' ranks.
  ///
  /// x:       [num_tokens, hidden] bf16, num_tokens <= max_tokens_per_rank; 0 is fine.
  /// static_scale: s1 of the layer, for WireFormat::kE4m3Static; 0 for the other formats. It is not
  ///          sent: whoever reads the rows knows the layer. Every rank gives the same value, which
  ///          LayerGroup compares, and not the exchange.
  /// Stream:  asynchronous on CUDA; the batch may be read by later work on `stream`. No allocation
  ///          and no host synchronization: may be captured in a CUDA graph and replayed, also
  ///          interleaved with other graphs of this exchange, in the same order on every rank. On
  ///          CUDA over several hosts normal mode waits for the stream once, for sizes; it refuses
  ///          to be captured.
  /// Throws:  kInvalidArgument before anything is sent; the same on *every* rank when an expert
  ///          would receive more than max_m rows. kPeerTimeout names operation, epoch and missing
  ///          ranks, kTransport those whose dispatch is for another layer. On CUDA what the device
  ///          finds is thrown by the next dispatch or by check(): a refused dispatch has no rows
  ///          and its combine gives rows of NaN.
  [[nodiscard]] Dispatched dispatch(TensorView x, const Routing& routing, Stream stream,
                                    float static_scale = 0);

  /// y[t] = routed_scaling_factor * sum_k topk_weights[t, k] * expert_y(row of t at topk_idx[t, k])
  /// It is added in float32 in order of k, then rounded to bf16 once: the same bits on every run
  /// and for any number of ranks. With sum_parts G > 1, part g is the g-th of G equal parts of the
  /// expert slots (of uneven hosts: host g): each part is added in order of k, then the parts in
  /// rounds of neighbours: the same bits for any number of hosts. A token with no expert gives a
  /// row of zeros.
  ///
  /// expert_y: [num_local_experts, max_m, hidden] or [max_rows, hidden] bf16, rows as batch().x.
  /// y:        [num_tokens, hidden] bf16.
  void combine(Dispatched dispatched, TensorView expert_y, MutableTensorView y, Stream stream);

  /// Their halves, in this order, for work in between. batch() is valid after dispatch_receive().
  [[nodiscard]] Dispatched dispatch_send(TensorView x, const Routing& routing, Stream stream,
                                         float static_scale = 0);
  void dispatch_receive(Dispatched& dispatched, Stream stream);
  void combine_send(Dispatched& dispatched, TensorView expert_y, Stream stream);
  void combine_receive(Dispatched dispatched, MutableTensorView y, Stream stream);

  /// Throws what earlier asynchronous calls found on the device: call it after synchronizing.
  void check();

  [[nodiscard]] ExchangeCounters counters() const;

  struct Impl;  ///< Internal: one implementation per memory kind.

 private:
  friend class LayerGroup;
  explicit Exchange(std::unique_ptr<Impl> impl) noexcept;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice
