#include "exchange/cuda/rail_exchange.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "core/fail.h"
#include "exchange/cuda/device_batch.h"
#include "exchange/cuda/fault_words.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

using cuda::DeviceFault;
using cuda::ExchangeState;
using cuda::RailSizes;
using cuda::RailSlot;
using cuda::RailState;
using cuda::RailTokens;

/// Waits inside a host are the rail's to end; theirs are longer.
constexpr std::chrono::milliseconds kBeyondTheRail{3'000};

// What is in mapped memory, in this order. Words that one side writes and the other reads have a
// line of their own.
constexpr std::size_t kLine = 128;
constexpr std::size_t kStop = 2 * kLine;
static_assert(sizeof(DeviceFault) <= kLine);

std::size_t words_of(std::size_t slot) {
  return kStop + kLine + 2 * kLine * slot;
}
std::size_t sizes_of(const RailLayout& layout, std::size_t slot) {
  return words_of(static_cast<std::size_t>(layout.num_slots)) +
         slot * static_cast<std::size_t>(layout.num_hosts) * sizeof(RailSizes);
}

template <class T>
T* at(std::byte* memory, std::size_t offset) {
  return reinterpret_cast<T*>(memory + offset);
}

cuda::RecordOffsets offsets_of(const NetworkRecord& r) {
  return {.payload_bytes = static_cast<int>(r.payload_bytes),
          .num_scales = static_cast<int>(r.scale_bytes / sizeof(float)),
          .token = static_cast<int>(r.token),
          .slots = static_cast<int>(r.slots),
          .weights = static_cast<int>(r.weights),
          .bytes = static_cast<int>(r.bytes),
          .header_bytes = static_cast<int>(r.header_bytes),
          .counts = static_cast<int>(r.counts),
          .layer = static_cast<int>(r.layer),
          .has_counts = r.num_counts > 0,
          .has_weights = r.has_weights};
}

}  // namespace

RailExchange::Watches::~Watches() {
  for (const int number : numbers) rail.stop_watching(number);
}

RailExchange::RailExchange(const ExchangeConfig& config_in, RailTransport& transport,
                           Backend& backend, std::unique_ptr<RailDevice> rail_device)
    : backend_(backend),
      rail_device_(std::move(rail_device)),
      rail_(*transport.rail()),
      layout_(config_in, transport.num_ranks()),
      parts_(config_in, transport.num_ranks()),
      host_(config_in.hosts.host_of(transport.rank())),
      local_(config_in.hosts.local_of(transport.rank())),
      mapped_(
          rail_device_->map_host(sizes_of(layout_, static_cast<std::size_t>(layout_.num_slots)))),
      faults_(config_in, transport.rank(), rail_,
              std::shared_ptr<DeviceFault>(mapped_, at<DeviceFault>(mapped_.get(), 0)),
              [this](int layer) { return name_of_layer(layer); }),
      watches_(rail_),
      records_to_(static_cast<std::size_t>(layout_.num_hosts)),
      home_to_(records_to_.size()) {
  config = config_in;
  rank = transport.rank();
  num_ranks = transport.num_ranks();
  device = backend.device();
  placement = layout_.placement;
  max_rows = layout_.max_rows;
  rail_device_->use();
  private_ = backend.allocate(layout_.private_bytes());
  tables_ = backend.allocate(layout_.tables_bytes());
  state_ = backend.allocate(layout_.state_bytes());
  rail_device_->clear(state_->data(), state_->bytes(), backend.stream());
  share_window(transport.mates());
  upload_tables();
  make_slots();
  max_ctas_ = rail_device_->count_ctas(transport, config);
  watch();
  meet();
}

/// Every rank allocates its window, clears its flags, and only then shows it to its mates.
void RailExchange::share_window(Transport& mates) {
  const std::shared_ptr<DeviceBuffer> memory = backend_.allocate(layout_.window_bytes());
  held_bytes = private_->bytes() + tables_->bytes() + state_->bytes() + memory->bytes();
  for (int s = 0; s < layout_.num_slots; ++s) {
    rail_device_->clear(memory->data() + static_cast<std::size_t>(s) * layout_.slot_bytes,
                        layout_.flags_and_counts_bytes, backend_.stream());
  }
  backend_.synchronize(backend_.stream());
  windows_ = mates.share_device_memory(std::shared_ptr<std::byte>(memory, memory->data()),
                                       layout_.window_bytes(), config.peer_timeout);
  for (const auto& window : windows_) rail_device_->reach(window.get());
}

/// host_of, local_of, rail, mates, part_of: one after the other.
void RailExchange::upload_tables() {
  std::vector<std::int32_t> words;
  for (int r = 0; r < num_ranks; ++r) words.push_back(config.hosts.host_of(r));
  for (int r = 0; r < num_ranks; ++r) words.push_back(config.hosts.local_of(r));
  for (int h = 0; h < layout_.num_hosts; ++h) words.push_back(config.hosts.relay(rank, h));
  for (const int r : config.hosts.ranks_of(host_)) words.push_back(r);
  const int each = parts_.parts_per_host();
  for (int s = 0; s < placement.num_experts(); ++s) {
    const int host = config.hosts.host_of(placement.rank_of(s));
    words.push_back(parts_.is_one() ? 0 : parts_.part_of(s) - host * each);
  }
  SLUICE_ASSERT(words.size() * sizeof(words[0]) == tables_->bytes());
  backend_.copy_from_host(tables_->data(), words.data(), tables_->bytes(), backend_.stream());
}

void RailExchange::make_slots() {
  auto* const state = reinterpret_cast<ExchangeState*>(state_->data());
  auto* const slot_state = reinterpret_cast<RailState*>(state + 1);
  auto* const table = reinterpret_cast<const std::int32_t*>(tables_->data());
  std::byte* const mapped = mapped_.get();
  slots_.resize(static_cast<std::size_t>(layout_.num_slots));
  for (std::size_t s = 0; s < slots_.size(); ++s) {
    const std::size_t base = s * layout_.slot_bytes;
    std::byte* const own = private_->data() + s * layout_.private_slot_bytes;
    RailSlot& p = slots_[s].params;
    p.window.rank = local_, p.window.num_ranks = layout_.num_mates;
    for (std::size_t m = 0; m < windows_.size(); ++m) p.window.base[m] = windows_[m].get();
    p.dispatched = base + layout_.dispatched, p.returned = base + layout_.returned;
    p.counts = base + layout_.counts, p.x = base + layout_.x, p.scale = base + layout_.scale;
    p.expert_y = base + layout_.expert_y;
    p.placement = placement;
    p.record = offsets_of(layout_.record);
    p.rank = rank, p.num_ranks = num_ranks, p.host = host_, p.num_hosts = layout_.num_hosts;
    p.host_of = table, p.local_of = table + num_ranks, p.rail = table + 2 * num_ranks;
    p.mates = p.rail + layout_.num_hosts, p.part_of = p.mates + layout_.num_mates;
    p.num_topk = config.num_topk, p.hidden = config.hidden;
    p.max_tokens = config.max_tokens_per_rank, p.max_m = config.max_m;
    p.num_parts = parts_.is_one() ? 0 : parts_.parts_per_host();
    p.home_rows = layout_.home_rows, p.count_width = layout_.count_width;
    p.num_chunks = layout_.num_chunks;
    const auto timeout = config.peer_timeout + kBeyondTheRail;
    p.timeout_ns = static_cast<std::uint64_t>(timeout.count()) * 1'000'000u;
    p.piece_stride = layout_.piece_stride, p.home_stride = layout_.home_stride;
    p.slots = at<std::int32_t>(own, layout_.slots);
    p.slot_rows = at<std::int32_t>(own, layout_.slot_rows);
    p.chunk_records = at<std::int32_t>(own, layout_.chunk_records);
    p.record_of = at<std::int32_t>(own, layout_.record_of);
    p.home_at = at<std::int32_t>(own, layout_.home_at);
    p.send = own + layout_.send, p.pieces = own + layout_.pieces;
    p.place = at<std::int64_t>(own, layout_.place);
    p.relay_at = at<std::int32_t>(own, layout_.relay_at);
    p.home_out = own + layout_.home_out, p.home_in = own + layout_.home_in;
    for (std::byte* const home : {p.home_out, p.home_in}) {
      for (std::size_t h = 0; h < static_cast<std::size_t>(layout_.num_hosts); ++h) {
        rail_device_->clear(home + h * layout_.home_stride, cuda::kHomeHeaderBytes,
                            backend_.stream());
      }
    }
    p.row_begin = at<std::int64_t>(own, layout_.row_begin);
    p.num_rows = at<std::int32_t>(own, layout_.num_rows);
    p.slot = slot_state + s, p.state = state;
    p.faults = at<DeviceFault>(mapped, 0);
    p.stop = at<const std::uint64_t>(mapped, kStop);
    p.begun = at<std::uint64_t>(mapped, words_of(s));
    p.done = at<std::uint64_t>(mapped, words_of(s) + kLine);
    p.sizes = at<std::int32_t>(mapped, sizes_of(layout_, s));
    p.num_experts = config.num_experts;
    slots_[s].order = ops(backend_).make_stream_order();
  }
}

void RailExchange::watch() {
  for (const Slot& slot : slots_) {
    const RailProgress progress{reinterpret_cast<std::atomic<std::uint64_t>*>(slot.params.begun),
                                reinterpret_cast<std::atomic<std::uint64_t>*>(slot.params.done)};
    const auto stop = [mapped = mapped_, own = rank](const Error& error) {
      const int lost = error.ranks().empty() ? own : error.ranks().front();
      *at<std::atomic<std::uint64_t>>(mapped.get(), kStop) = 1 + static_cast<std::uint64_t>(lost);
    };
    watches_.numbers.push_back(rail_.watch(progress, stop));
  }
}

/// One empty round over all ranks: connects the hosts, so that later rounds may be captured, and
/// proves that the kernels of a host's ranks run at once.
void RailExchange::meet() {
  const Stream stream = backend_.stream();
  Slot& slot = slots_[0];
  const RailTokens none{};
  rail_device_->route(slot.params, none, stream);
  exchange_pieces(slot, stream);
  rail_device_->place(slot.params, none, stream);
  rail_device_->spread(slot.params, 1, stream);
  rail_device_->relay(slot.params, true, 1, stream);
  exchange_home(slot, stream);
  rail_device_->sum(slot.params, none, 1, stream);
  rail_device_->synchronize(stream);
  faults_.throw_failure();
}

/// A rank that drops a dispatch is still the relay of others.
void RailExchange::release(RailRoute& route) noexcept {
  route.slot.busy = false;
  try {
    rail_device_->use();
    if (!route.received) receive(route, route.stream);
    if (!route.returned) rail_device_->give(route.params, true, route.stream);
    route.slot.order->after(route.stream);
  } catch (const Error&) {
    // Others find out by their own bounded waits.
  }
}

int RailExchange::ctas_for(std::int64_t work) const {
  return static_cast<int>(std::clamp<std::int64_t>(work, 1, max_ctas_));
}

std::unique_ptr<Dispatched::Route> RailExchange::dispatch_send(TensorView x, const Routing& routing,
                                                               float static_scale, Stream stream) {
  check();
  rail_device_->use();
  if (config.mode == Mode::kNormal && rail_device_->is_capturing(stream)) {
    fail(ErrorCode::kUnsupported,
         "normal mode over {} cannot be captured: it waits for the sizes of what other hosts send",
         config.hosts.to_string());
  }
  Slot& slot = take_free(slots_, stream);
  auto route = std::make_unique<RailRoute>(*this, slot, stream);
  const std::int64_t num_tokens = x.dim(0);
  route->params = slot.params;
  route->params.layer = routing.layer;
  route->params.placed = routing.slots != nullptr ? routing.slots->device_table() : nullptr;
  route->tokens = {.x = x.as<std::uint16_t>(),
                   .topk_idx = routing.topk_idx.data,
                   .weights = routing.topk_weights.as<float>(),
                   .wide_idx = routing.topk_idx.dtype == DType::kInt64,
                   .num_tokens = static_cast<int>(num_tokens),
                   .static_inverse = static_scale != 0 ? 1.0f / static_scale : 0.0f,
                   .row_totals = routing.row_totals.as<std::int64_t>(),
                   .factor = config.routed_scaling_factor,
                   .y = nullptr};
  rail_device_->route(route->params, route->tokens, stream);
  rail_device_->pack(route->params, route->tokens, config.wire, ctas_for(num_tokens), stream);
  exchange_pieces(slot, stream);
  fill_route(*this, slot.params, windows_[static_cast<std::size_t>(local_)].get(), num_tokens,
             *route);
  num_dispatches_ += 1;
  return route;
}

void RailExchange::dispatch_receive(Dispatched::Route& base, Stream stream) {
  auto& route = static_cast<RailRoute&>(base);
  faults_.throw_failure();
  rail_device_->use();
  receive(route, stream);
}

void RailExchange::receive(RailRoute& route, Stream stream) {
  route.stream = stream;
  route.received = true;
  rail_device_->place(route.params, route.tokens, stream);
  rail_device_->spread(
      route.params, ctas_for(std::int64_t{layout_.num_hosts} * config.max_tokens_per_rank), stream);
}

/// Rows that the caller kept in memory of its own are copied to where mates read them.
void RailExchange::keep_rows(const RailRoute& route, TensorView expert_y, Stream stream) {
  if (expert_y.data == route.expert_y.data) return;
  rail_device_->keep_rows(route.params, expert_y.as<std::uint16_t>(), max_ctas_, stream);
}

void RailExchange::combine_send(Dispatched::Route& base, TensorView expert_y, Stream stream) {
  auto& route = static_cast<RailRoute&>(base);
  faults_.throw_failure();
  rail_device_->use();
  route.stream = stream;
  keep_rows(route, expert_y, stream);
  rail_device_->give(route.params, false, stream);
  route.returned = true;
}

void RailExchange::combine_receive(Dispatched::Route& base, MutableTensorView y, Stream stream) {
  auto& route = static_cast<RailRoute&>(base);
  faults_.throw_failure();
  rail_device_->use();
  return_rows(route, y, false, stream);
}

void RailExchange::combine(Dispatched::Route& base, TensorView expert_y, MutableTensorView y,
                           Stream stream) {
  auto& route = static_cast<RailRoute&>(base);
  faults_.throw_failure();
  rail_device_->use();
  keep_rows(route, expert_y, stream);
  return_rows(route, y, true, stream);
}

void RailExchange::return_rows(RailRoute& route, MutableTensorView y, bool also_send,
                               Stream stream) {
  route.stream = stream;
  route.returned = true;
  route.tokens.y = y.as<std::uint16_t>();
  rail_device_->relay(route.params, also_send,
                      ctas_for(std::int64_t{layout_.num_hosts} * config.max_tokens_per_rank),
                      stream);
  exchange_home(route.slot, stream);
  rail_device_->sum(route.params, route.tokens, ctas_for(route.tokens.num_tokens), stream);
}

/// Throws what earlier calls found on the device; after a refused dispatch the exchange works on.
void RailExchange::check() {
  faults_.throw_failure();
  const auto refusal = faults_.take_refusal();
  if (!refusal) return;
  auto* const state = reinterpret_cast<ExchangeState*>(state_->data());
  rail_device_->use();
  rail_device_->clear(&state->claimed[cuda::kRefusal], sizeof(int), backend_.stream());
  backend_.synchronize(backend_.stream());
  throw_refusal(config, *refusal);
}

std::unique_ptr<Exchange::Impl> make_rail_exchange(const ExchangeConfig& config,
                                                   Transport& transport, Backend& backend,
                                                   std::unique_ptr<RailDevice> device) {
  auto* const rails = dynamic_cast<RailTransport*>(&transport);
  if (rails == nullptr || rails->rail() == nullptr) {
    fail(ErrorCode::kUnsupported,
         "{} over transport {}: GPUs of several hosts need transport nccl, which connects them",
         config.hosts.to_string(), transport.name());
  }
  check_argument(transport.hosts() == config.hosts, "hosts are {}; the ranks are on {}",
                 config.hosts.to_string(), transport.hosts().to_string());
  RailLayout(config, transport.num_ranks()).check(config, transport.num_ranks());
  return std::make_unique<RailExchange>(config, *rails, backend, std::move(device));
}

}  // namespace sluice
