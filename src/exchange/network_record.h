// network_record.h - the bytes that one rank sends to one relay: a header, then a record for each
// token that has an expert on the relay's host.
//
//   header   num_records i32, rows [S] i32 (low-latency: of the source, for every expert slot) or,
//            between GPUs in normal mode, rows of bf16 that come home i32; then the layer, i32
//   record   payload | scales | token i32 | slots [k] i32 | weights [k] f32
//
// `slots` has -1 for entries that are empty or have their expert on another host. Weights travel
// where the relay adds up. Header and record are multiples of 16 bytes, so that a GPU can copy
// them in words of that size; offsets depend on the configuration alone. Records follow each other
// without gaps, in order of their tokens: what is sent is one piece of memory.
//
// Pure functions of a configuration and bytes; both exchanges may use them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "exchange/wire_token.h"
#include "sluice/exchange.h"

namespace sluice {

struct NetworkRecord {
  NetworkRecord() = default;
  explicit NetworkRecord(const ExchangeConfig& config);

  std::size_t payload_bytes = 0, scale_bytes = 0;
  std::size_t scales = 0, token = 0, slots = 0, weights = 0;  ///< Offsets; the payload's is 0.
  std::size_t bytes = 0;
  std::size_t header_bytes = 0;
  std::size_t counts = 0;  ///< Offset of the rows in a header.
  std::size_t layer = 0;  ///< Offset in a header of Routing::layer, i32; between CPUs flags say it.
  int num_topk = 0;
  int num_counts = 0;  ///< Rows in a header: total_slots(), in normal mode none.
  bool has_weights = false;

  /// Of `num_tokens` tokens, header included.
  [[nodiscard]] std::size_t piece_bytes(std::int64_t num_tokens) const noexcept {
    return header_bytes + static_cast<std::size_t>(num_tokens) * bytes;
  }
};

/// One record to read.
class RecordView {
 public:
  RecordView(const NetworkRecord& layout, const std::byte* record)
      : layout_(&layout), record_(record) {}
  /// Its slots are -1 where they are not on this host.
  [[nodiscard]] WireToken token() const {
    return {.idx = *words<std::int32_t>(layout_->token),
            .payload = {record_, layout_->payload_bytes},
            .scales = {record_ + layout_->scales, layout_->scale_bytes},
            .slots = {words<std::int32_t>(layout_->slots),
                      static_cast<std::size_t>(layout_->num_topk)}};
  }
  [[nodiscard]] float weight(int k) const { return words<float>(layout_->weights)[k]; }

 private:
  template <class T>
  [[nodiscard]] const T* words(std::size_t offset) const {
    return reinterpret_cast<const T*>(record_ + offset);
  }
  const NetworkRecord* layout_;
  const std::byte* record_;
};

/// What a relay received from one source.
class PieceView {
 public:
  PieceView(const NetworkRecord& layout, const std::byte* piece)
      : layout_(&layout), piece_(piece) {}
  [[nodiscard]] std::int32_t num_records() const;
  /// [num_counts]
  [[nodiscard]] std::span<const std::byte> counts() const {
    return {piece_ + layout_->counts, static_cast<std::size_t>(layout_->num_counts) * 4};
  }
  [[nodiscard]] RecordView record(std::int64_t i) const {
    return {*layout_, piece_ + layout_->piece_bytes(i)};
  }

 private:
  const NetworkRecord* layout_;
  const std::byte* piece_;
};

/// Writes a record. token: with all its slots, of which those on host `host` are kept.
/// host_of_slot: [total_slots].   weights: [k], where the layout has them.
/// out: [layout.bytes], written whole.
void write_record(const NetworkRecord& layout, const WireToken& token, const float* weights,
                  int host, std::span<const int> host_of_slot, std::byte* out);

/// Writes a header.   counts: [num_counts].   out: [layout.header_bytes], written whole.
void write_header(const NetworkRecord& layout, std::int32_t num_records,
                  std::span<const std::int32_t> counts, std::byte* out);

/// The tokens of a rank that have an expert on each host, ascending.
/// slots: [num_tokens, num_topk], -1 for none.   Returns: [num_hosts].
[[nodiscard]] std::vector<std::vector<std::int32_t>> tokens_by_host(
    std::span<const std::int32_t> slots, int num_topk, int num_hosts,
    std::span<const int> host_of_slot);

/// [total_slots]
[[nodiscard]] std::vector<int> hosts_of_slots(const Hosts& hosts, int total_slots, int num_ranks);

}  // namespace sluice
