#include "exchange/cuda/rail_layout.h"

#include <algorithm>

#include "core/fail.h"
#include "exchange/impl.h"
#include "sluice/network_bytes.h"

namespace sluice {
namespace {

constexpr std::size_t kAlignment = 256;
static_assert(cuda::kHomeHeaderBytes == kNetworkHomeHeaderBytes);

constexpr std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// Tokens and records whose order counts are walked by a thread for each chunk.
constexpr int kTokensPerChunk = 2, kMostChunks = 256;
/// Words of shared memory that one team of `place` may take: rail_place.cuh.
constexpr int kMostPlaceWords = 50 * 1024;

class Places {
 public:
  void place(std::size_t& offset, std::size_t bytes) {
    offset = at_;
    at_ += aligned(bytes);
  }
  [[nodiscard]] std::size_t bytes() const noexcept { return at_; }

 private:
  std::size_t at_ = 0;
};

}  // namespace

RailLayout::RailLayout(const ExchangeConfig& config, int num_ranks)
    : num_hosts(config.hosts.num_hosts()),
      num_mates(num_ranks / num_hosts),
      num_slots(config.num_in_flight),
      placement(config.total_slots(), num_ranks),
      record(config) {
  const bool masked = config.mode == Mode::kLowLatency;
  const auto hosts = static_cast<std::size_t>(num_hosts);
  const auto mates = static_cast<std::size_t>(num_mates);
  const auto tokens = static_cast<std::size_t>(config.max_tokens_per_rank);
  const auto entries = tokens * static_cast<std::size_t>(config.num_topk);
  const auto all_slots = static_cast<std::size_t>(config.total_slots());
  const auto local = static_cast<std::size_t>(placement.num_local());
  constexpr std::size_t kWord = sizeof(std::int32_t);
  row_bytes = 2 * static_cast<std::size_t>(config.hidden);
  home_rows = static_cast<int>(network_combine_bytes(config, config.num_topk) / row_bytes);
  const int width_of_host = placement.num_local() * num_mates;
  count_width = masked ? config.total_slots() : width_of_host;
  const int fitting = (kMostPlaceWords - 2 * count_width) / (width_of_host + 1);
  num_chunks = std::clamp(config.max_tokens_per_rank / kTokensPerChunk, 1,
                          std::clamp(fitting, 1, kMostChunks));
  max_rows = masked ? std::int64_t{placement.num_local()} * config.max_m
                    : num_ranks * static_cast<std::int64_t>(entries);
  const auto chunks = static_cast<std::size_t>(num_chunks);
  const auto width = static_cast<std::size_t>(count_width);
  const auto rows = static_cast<std::size_t>(max_rows);
  piece_stride = aligned(record.piece_bytes(config.max_tokens_per_rank));
  home_stride = aligned(fixed_home_bytes(config));

  Places window;
  window.place(dispatched, mates * sizeof(std::uint64_t));
  window.place(returned, mates * sizeof(std::uint64_t));
  window.place(counts, static_cast<std::size_t>(num_ranks) * width * sizeof(std::uint64_t));
  flags_and_counts_bytes = window.bytes();
  window.place(x, rows * record.payload_bytes);
  window.place(scale, rows * record.scale_bytes);
  window.place(expert_y, rows * row_bytes);
  slot_bytes = window.bytes();

  Places own;
  own.place(slots, entries * kWord);
  own.place(slot_rows, all_slots * kWord);
  own.place(chunk_records, hosts * chunks * 2 * kWord);
  own.place(record_of, hosts * tokens * kWord);
  own.place(home_at, hosts * tokens * kWord);
  own.place(send, hosts * piece_stride);
  own.place(pieces, hosts * piece_stride);
  own.place(place, hosts * entries * sizeof(std::int64_t));
  own.place(relay_at, hosts * tokens * kWord);
  own.place(home_out, hosts * home_stride);
  own.place(home_in, hosts * home_stride);
  own.place(row_begin, local * sizeof(std::int64_t));
  own.place(num_rows, local * kWord);
  private_slot_bytes = own.bytes();
}

std::size_t RailLayout::tables_bytes() const noexcept {
  const auto ranks = static_cast<std::size_t>(placement.num_ranks());
  const auto all_slots = static_cast<std::size_t>(placement.num_experts());
  return (2 * ranks + static_cast<std::size_t>(num_hosts + num_mates) + all_slots) *
         sizeof(std::int32_t);
}

void RailLayout::check(const ExchangeConfig& config, int num_ranks) const {
  if (!config.hosts.is_even()) {
    fail(ErrorCode::kUnsupported,
         "hosts are {}: the exchange in CUDA memory needs as many ranks on each host",
         config.hosts.to_string());
  }
  check_argument(num_hosts <= cuda::kMaxRailHosts, "{} hosts over CUDA memory; at most {}",
                 num_hosts, int{cuda::kMaxRailHosts});
  check_argument(num_mates <= kMaxDeviceRanks, "{} ranks on a host over CUDA memory; at most {}",
                 num_mates, int{kMaxDeviceRanks});
  check_argument(config.total_slots() <= cuda::kMaxExchangeExperts,
                 "{} {} over CUDA memory; at most {}",
                 config.num_slots != 0 ? "num_slots" : "num_experts", config.total_slots(),
                 int{cuda::kMaxExchangeExperts});
  check_argument(record.payload_bytes <= cuda::kMaxPayloadBytes,
                 "hidden {} makes rows of {} bytes; at most {} over CUDA memory", config.hidden,
                 record.payload_bytes, int{cuda::kMaxPayloadBytes});
  check_argument(max_rows < (std::int64_t{1} << 31), "{} rows on a rank of {}; at most 2^31 - 1",
                 max_rows, num_ranks);
}

}  // namespace sluice
