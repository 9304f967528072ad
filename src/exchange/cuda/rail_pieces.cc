// What an exchange over hosts sends over its rail, and how much of it.
#include "core/fail.h"
#include "exchange/cuda/rail_exchange.h"

namespace sluice {

using cuda::ExchangeState;
using cuda::RailSizes;
using cuda::RailState;

void RailExchange::exchange_pieces(Slot& slot, Stream stream) {
  const bool is_fixed = config.mode == Mode::kLowLatency;
  const std::size_t bytes =
      is_fixed ? layout_.fixed_piece_bytes(config) : layout_.record.header_bytes;
  std::vector<Rail::Send> sends;
  std::vector<Rail::Receive> receives;
  for (int h = 0; h < layout_.num_hosts; ++h) {
    if (h == host_) continue;
    const std::size_t piece = static_cast<std::size_t>(h) * layout_.piece_stride;
    sends.push_back({h, slot.params.send + piece, bytes});
    receives.push_back({h, slot.params.pieces + piece, bytes});
  }
  rail_.exchange(sends, receives, stream.handle);
  if (!is_fixed) exchange_records(slot, stream);
}

/// Normal mode: the headers are on their way; waits for them.
void RailExchange::exchange_records(Slot& slot, Stream stream) {
  rail_device_->sizes(slot.params, stream);
  rail_device_->synchronize(stream);
  faults_.throw_failure();
  const auto* const sizes = reinterpret_cast<const RailSizes*>(slot.params.sizes);
  slot.sizes.assign(sizes, sizes + layout_.num_hosts);
  std::vector<Rail::Send> sends;
  std::vector<Rail::Receive> receives;
  const NetworkRecord& record = layout_.record;
  for (int h = 0; h < layout_.num_hosts; ++h) {
    if (h == host_) continue;
    const RailSizes& of = slot.sizes[static_cast<std::size_t>(h)];
    const std::size_t first =
        static_cast<std::size_t>(h) * layout_.piece_stride + record.header_bytes;
    const auto out = static_cast<std::size_t>(of.records_out);
    const auto in = static_cast<std::size_t>(of.records_in);
    if (in > static_cast<std::size_t>(config.max_tokens_per_rank)) {
      fail_of_ranks(ErrorCode::kTransport, {config.hosts.relay(rank, h)},
                    "dispatch on rank {}: rank {} of host {} sends {} tokens, max_tokens_per_rank "
                    "is {}",
                    rank, config.hosts.relay(rank, h), h, in, config.max_tokens_per_rank);
    }
    if (out > 0) sends.push_back({h, slot.params.send + first, out * record.bytes});
    if (in > 0) receives.push_back({h, slot.params.pieces + first, in * record.bytes});
    records_to_[static_cast<std::size_t>(h)] += out;
  }
  if (!sends.empty() || !receives.empty()) rail_.exchange(sends, receives, stream.handle);
}

void RailExchange::exchange_home(const Slot& slot, Stream stream) {
  std::vector<Rail::Send> sends;
  std::vector<Rail::Receive> receives;
  const bool is_fixed = config.mode == Mode::kLowLatency;
  for (int h = 0; h < layout_.num_hosts; ++h) {
    if (h == host_) continue;
    std::size_t out = layout_.fixed_home_bytes(config), in = out;
    if (!is_fixed) {
      const RailSizes& of = slot.sizes[static_cast<std::size_t>(h)];
      out = of.home_out > 0 ? layout_.home_bytes(of.home_out) : 0;
      in = of.home_in > 0 ? layout_.home_bytes(of.home_in) : 0;
      home_to_[static_cast<std::size_t>(h)] += out;
    }
    const std::size_t piece = static_cast<std::size_t>(h) * layout_.home_stride;
    if (out > 0) sends.push_back({h, slot.params.home_out + piece, out});
    if (in > 0) receives.push_back({h, slot.params.home_in + piece, in});
  }
  if (!sends.empty() || !receives.empty()) rail_.exchange(sends, receives, stream.handle);
}

/// Over the network what went to this rail's ranks; inside the host rows and counts.
ExchangeCounters RailExchange::counters() const {
  std::vector<std::byte> bytes(state_->bytes());
  backend_.copy_to_host(bytes.data(), state_->data(), bytes.size(), backend_.stream());
  const auto* const state = reinterpret_cast<const ExchangeState*>(bytes.data());
  const auto* const slots = reinterpret_cast<const RailState*>(state + 1);
  std::uint64_t dispatches = 0, operations = 0;
  for (int s = 0; s < layout_.num_slots; ++s) {
    dispatches += slots[s].epoch, operations += slots[s].done;
  }
  dispatches -= 1, operations -= 3;  // meet()
  const std::uint64_t combines = operations - 2 * dispatches;
  ExchangeCounters counters = counters_for(num_ranks);
  counters.num_dispatches = num_dispatches_;
  counters.saturated_values = state->stats.saturated;
  const bool is_fixed = config.mode == Mode::kLowLatency;
  const std::uint64_t token = layout_.record.payload_bytes + layout_.record.scale_bytes;
  const std::uint64_t words = static_cast<std::uint64_t>(layout_.num_hosts) *
                              static_cast<std::uint64_t>(layout_.count_width) * 8u;
  for (int h = 0; h < layout_.num_hosts; ++h) {
    if (h == host_) continue;
    const auto i = static_cast<std::size_t>(h);
    const auto relay = static_cast<std::size_t>(config.hosts.relay(rank, h));
    counters.dispatch_bytes[relay] = is_fixed ? dispatches * layout_.fixed_piece_bytes(config)
                                              : num_dispatches_ * layout_.record.header_bytes +
                                                    records_to_[i] * layout_.record.bytes;
    counters.combine_bytes[relay] =
        is_fixed ? combines * layout_.fixed_home_bytes(config) : home_to_[i];
    counters.dispatch_rows[relay] = records_to_[i];
  }
  const auto mates = config.hosts.ranks_of(host_);
  for (std::size_t m = 0; m < mates.size(); ++m) {
    const auto mate = static_cast<std::size_t>(mates[m]);
    counters.dispatch_rows[mate] = state->stats.rows[m];
    counters.dispatch_bytes[mate] = state->stats.rows[m] * token + dispatches * words;
    counters.combine_bytes[mate] = state->stats.returned[m] * layout_.row_bytes;
    counters.wait_ns[mate] = state->stats.wait_ns[m];
  }
  return counters;
}

}  // namespace sluice
