// The exchange for CUDA memory: slots, epochs and windows on the host side of the kernels.
//
// Ranks are streams: of one process over one GPU or several, or of several processes, as the
// transport has it. A call only queues kernels; the epoch lives in device memory, so that captured
// calls may be replayed.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>
#include <vector>

#include "backend/cuda/check.h"
#include "backend/ops.h"
#include "core/fail.h"
#include "exchange/cuda/device_batch.h"
#include "exchange/cuda/device_counters.h"
#include "exchange/cuda/device_faults.h"
#include "exchange/cuda/device_layout.h"
#include "exchange/cuda/device_sharing.h"
#include "exchange/cuda/exchange_kernels.h"
#include "exchange/cuda/fault_words.h"
#include "exchange/cuda/rail_exchange.h"
#include "exchange/cuda/split.h"
#include "exchange/impl.h"
#include "sluice/quant.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

using cuda::ExchangeState;
using cuda::SlotParams;
using cuda::SlotState;

/// One of the dispatches that may be in flight.
struct Slot {
  SlotParams params{};
  bool busy = false;
  std::unique_ptr<StreamOrder> order;  // One dispatch after the other, whatever their streams.
  std::uint16_t* const* home_rows = nullptr;  // [num_ranks] in device memory; or there is no room.
};

class DeviceExchange final : public Exchange::Impl {
 public:
  DeviceExchange(const ExchangeConfig& config_in, Transport& transport, Backend& backend);

  [[nodiscard]] std::unique_ptr<Dispatched::Route> dispatch_send(TensorView x,
                                                                 const Routing& routing,
                                                                 float static_scale,
                                                                 Stream stream) override {
    return send(x, routing, static_scale, stream, false);
  }
  [[nodiscard]] std::unique_ptr<Dispatched::Route> dispatch(TensorView x, const Routing& routing,
                                                            float static_scale,
                                                            Stream stream) override;
  void dispatch_receive(Dispatched::Route& route, Stream stream) override;
  void combine_send(Dispatched::Route& route, TensorView expert_y, Stream stream) override;
  void combine_receive(Dispatched::Route& route, MutableTensorView y, Stream stream) override;
  void combine(Dispatched::Route& route, TensorView expert_y, MutableTensorView y,
               Stream stream) override;
  void check() override { throw_fault(); }
  [[nodiscard]] ExchangeCounters counters() const override;
  [[nodiscard]] std::optional<int> layer_ahead(int source) const override;

 private:
  struct DeviceRoute final : Dispatched::Route {
    DeviceRoute(DeviceExchange& e, Slot& s, Stream on) : exchange(e), slot(s), stream(on) {
      slot.busy = true;
    }
    ~DeviceRoute() override { exchange.release(*this); }
    DeviceExchange& exchange;
    Slot& slot;
    Stream stream;  // Of the route's latest call.
    Routing routing;
    bool returned = false;  // Every rank has been told that expert_y is complete.
  };

  void share_window(Transport& transport);
  void make_slots();
  void meet();
  void release(DeviceRoute& route) noexcept;
  [[nodiscard]] std::unique_ptr<DeviceRoute> send(TensorView x, const Routing& routing,
                                                  float static_scale, Stream stream, bool receive);
  void prepare_expert_y(const DeviceRoute& route, TensorView expert_y, Stream stream);
  void sum(DeviceRoute& route, MutableTensorView y, Stream stream, bool also_send);
  void fill_batch(DeviceRoute& route, std::int64_t num_tokens) const;
  void check_stream(Stream stream) const;
  void use_device() const { SLUICE_CUDA_CHECK(cudaSetDevice(device.index)); }
  void throw_fault();

  Backend& backend_;
  DeviceLayout layout_;
  std::vector<std::shared_ptr<std::byte>> windows_;  // [num_ranks]; peers may hold them longer.
  std::unique_ptr<DeviceBuffer> private_, state_;
  DeviceFaults faults_;
  std::vector<Slot> slots_;
  int ranks_on_device_ = 1, max_ctas_ = 1;
  int ranks_in_process_ = 1;  // Of those: they share its default stream.
  std::uint64_t num_dispatches_ = 0;
};

DeviceExchange::DeviceExchange(const ExchangeConfig& config_in, Transport& transport,
                               Backend& backend)
    : backend_(backend),
      layout_(config_in, transport.num_ranks()),
      faults_(config_in, transport.rank(), transport.num_ranks(),
              [this](int layer) { return name_of_layer(layer); }) {
  config = config_in;
  rank = transport.rank();
  num_ranks = transport.num_ranks();
  device = backend.device();
  placement = layout_.placement;
  max_rows = layout_.max_rows;
  use_device();
  layout_.check(config, num_ranks);
  cuda::prepare_exchange_kernels();
  private_ = backend.allocate(layout_.private_bytes());
  state_ = backend.allocate(layout_.state_bytes());
  const auto queue = static_cast<cudaStream_t>(backend.stream().handle);
  SLUICE_CUDA_CHECK(cudaMemsetAsync(state_->data(), 0, state_->bytes(), queue));
  share_window(transport);
  make_slots();
  const RanksOnDevice ranks = count_ranks_on_device(transport, device.index, config.peer_timeout);
  ranks_on_device_ = ranks.all, ranks_in_process_ = ranks.in_process;
  for (Slot& slot : slots_) slot.params.is_alone = ranks_on_device_ == 1;
  int num_sms = 0;
  SLUICE_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device.index));
  const int share = num_sms / ranks_on_device_;
  check_argument(share >= 1, "{} ranks share cuda:{} and its {} SMs", ranks_on_device_,
                 device.index, num_sms);
  check_argument(config.num_sms <= share,
                 "num_sms {} exceeds {}: {} ranks share the {} SMs of cuda:{}", config.num_sms,
                 share, ranks_on_device_, num_sms, device.index);
  max_ctas_ = config.num_sms > 0 ? config.num_sms : share;
  meet();  // Every rank has uploaded what it has: no copy meets a kernel that waits.
}

/// Every rank allocates its window, clears its flags, and only then shows it to the others.
void DeviceExchange::share_window(Transport& transport) {
  const std::shared_ptr<DeviceBuffer> memory = backend_.allocate(layout_.window_bytes());
  held_bytes = private_->bytes() + state_->bytes() + memory->bytes();
  const auto queue = static_cast<cudaStream_t>(backend_.stream().handle);
  for (int s = 0; s < layout_.num_slots; ++s) {
    std::byte* const slot = memory->data() + static_cast<std::size_t>(s) * layout_.slot_bytes;
    SLUICE_CUDA_CHECK(cudaMemsetAsync(slot, 0, layout_.flags_and_counts_bytes, queue));
  }
  SLUICE_CUDA_CHECK(cudaStreamSynchronize(queue));
  windows_ = transport.share_device_memory(std::shared_ptr<std::byte>(memory, memory->data()),
                                           layout_.window_bytes(), config.peer_timeout);
  for (const auto& window : windows_) enable_peer_access(device.index, window.get());
}

void DeviceExchange::make_slots() {
  auto* const state = reinterpret_cast<ExchangeState*>(state_->data());
  auto* const slot_state = reinterpret_cast<SlotState*>(state + 1);
  std::byte* at = private_->data();
  slots_.resize(static_cast<std::size_t>(layout_.num_slots));
  for (std::size_t s = 0; s < slots_.size(); ++s) {
    const std::size_t base = s * layout_.slot_bytes;
    auto* const slot_row = reinterpret_cast<std::int64_t*>(at);
    auto* const row_begin = reinterpret_cast<std::int64_t*>(at + layout_.slot_row_bytes);
    auto* const home = at + layout_.slot_row_bytes + layout_.rows_bytes;
    at += layout_.slot_row_bytes + layout_.rows_bytes + layout_.home_bytes;
    SlotParams& p = slots_[s].params;
    p.window.rank = rank, p.window.num_ranks = num_ranks;
    for (std::size_t r = 0; r < windows_.size(); ++r) p.window.base[r] = windows_[r].get();
    p.dispatched = base + layout_.dispatched;
    p.returned = base + layout_.returned;
    p.counts = base + layout_.counts;
    p.x = base + layout_.x;
    p.scale = base + layout_.scale;
    p.copies = base + layout_.copies;
    p.origin = base + layout_.origin;
    p.expert_y = base + layout_.expert_y;
    p.placement = placement;
    p.slots = nullptr;
    p.num_experts = config.num_experts;
    p.num_topk = config.num_topk;
    p.hidden = config.hidden;
    p.max_tokens = config.max_tokens_per_rank;
    p.max_m = config.max_m;
    p.timeout_ns = static_cast<std::uint64_t>(config.peer_timeout.count()) * 1'000'000u;
    p.slot = slot_state + s;
    p.state = state;
    p.faults = faults_.device();
    p.slot_row = slot_row;
    p.row_begin = row_begin;
    p.num_rows = reinterpret_cast<std::int32_t*>(row_begin + placement.num_local());
    slots_[s].order = ops(backend_).make_stream_order();
    if (!layout_.fits_home_rows) continue;
    std::vector<std::byte*> rows;
    for (const auto& window : windows_) rows.push_back(window.get() + p.expert_y);
    backend_.copy_from_host(home, rows.data(), rows.size() * sizeof(rows[0]), backend_.stream());
    slots_[s].home_rows = reinterpret_cast<std::uint16_t* const*>(home);
  }
}

/// One empty round over all ranks: proves, before anything depends on it, that the waiting kernels
/// of all ranks run at once.
void DeviceExchange::meet() {
  if (num_ranks == 1) return;
  const Stream stream = backend_.stream();
  const SlotParams& p = slots_[0].params;
  cuda::launch_dispatch(p, {.num_tokens = 0, .receive = true}, config.wire, 1, stream.handle);
  cuda::launch_combine(p, {.num_tokens = 0, .send = true}, 1, stream.handle);
  backend_.synchronize(stream);
  const auto fault = faults_.failure();
  if (!fault) return;
  std::string hint;
  if (ranks_on_device_ > 1) {
    hint = fmt::format(
        "; {} ranks share cuda:{}: their kernels must run at once, which takes "
        "CUDA_DEVICE_MAX_CONNECTIONS=32 in the environment before the first CUDA call",
        ranks_on_device_, device.index);
  }
  fail_of_ranks(ErrorCode::kPeerTimeout, faults_.ranks_of(*fault), "creation of the exchange: {}{}",
                faults_.describe(*fault), hint);
}

void DeviceExchange::check_stream(Stream stream) const {
  check_argument(stream.handle != nullptr || ranks_in_process_ == 1,
                 "{} ranks of this process share cuda:{}: each needs a stream of its own, not the "
                 "default stream",
                 ranks_in_process_, device.index);
}

void DeviceExchange::release(DeviceRoute& route) noexcept {
  Slot& slot = route.slot;
  slot.busy = false;
  if (cudaSetDevice(device.index) != cudaSuccess) return;
  try {
    if (!route.returned) cuda::launch_return(slot.params, true, route.stream.handle);
    slot.order->after(route.stream);
  } catch (const Error&) {
    // Peers find out by their own bounded waits.
  }
}

std::unique_ptr<Dispatched::Route> DeviceExchange::dispatch(TensorView x, const Routing& routing,
                                                            float static_scale, Stream stream) {
  const bool fused = config.mode == Mode::kLowLatency;
  auto route = send(x, routing, static_scale, stream, fused);
  if (!fused) dispatch_receive(*route, stream);
  return route;
}

std::unique_ptr<DeviceExchange::DeviceRoute> DeviceExchange::send(TensorView x,
                                                                  const Routing& routing,
                                                                  float static_scale, Stream stream,
                                                                  bool receive) {
  throw_fault();
  check_stream(stream);
  use_device();
  Slot& slot = take_free(slots_, stream);
  const std::int64_t num_tokens = x.dim(0);
  const DispatchSplit split = split_dispatch(num_tokens, config.hidden, config.wire, max_ctas_);
  SlotParams params = slot.params;
  if (routing.slots != nullptr) params.slots = routing.slots->device_table();
  cuda::launch_dispatch(params,
                        {.x = x.as<std::uint16_t>(),
                         .topk_idx = routing.topk_idx.data,
                         .wide_idx = routing.topk_idx.dtype == DType::kInt64,
                         .num_tokens = static_cast<int>(num_tokens),
                         .static_inverse = static_scale != 0 ? 1.0f / static_scale : 0.0f,
                         .receive = receive,
                         .chunk_tokens = split.chunk_tokens,
                         .parts = split.parts,
                         .layer = routing.layer,
                         .row_totals = routing.row_totals.as<std::int64_t>()},
                        config.wire, split.num_ctas, stream.handle);
  auto route = std::make_unique<DeviceRoute>(*this, slot, stream);
  route->routing = routing;
  fill_batch(*route, num_tokens);
  num_dispatches_ += 1;
  return route;
}

void DeviceExchange::dispatch_receive(Dispatched::Route& base, Stream stream) {
  auto& route = static_cast<DeviceRoute&>(base);
  check_stream(stream);
  use_device();
  route.stream = stream;
  cuda::launch_receive(route.slot.params, config.wire, max_ctas_, stream.handle);
}

/// Rows that the caller kept in memory of its own are copied to where peers read them.
void DeviceExchange::prepare_expert_y(const DeviceRoute& route, TensorView expert_y,
                                      Stream stream) {
  if (expert_y.data == route.expert_y.data) return;
  cuda::launch_copy_rows(route.slot.params, expert_y.as<std::uint16_t>(), max_ctas_, stream.handle);
}

void DeviceExchange::combine_send(Dispatched::Route& base, TensorView expert_y, Stream stream) {
  auto& route = static_cast<DeviceRoute&>(base);
  faults_.throw_failure();
  check_stream(stream);
  use_device();
  route.stream = stream;
  prepare_expert_y(route, expert_y, stream);
  cuda::launch_return(route.slot.params, false, stream.handle);
  route.returned = true;
}

void DeviceExchange::combine_receive(Dispatched::Route& base, MutableTensorView y, Stream stream) {
  sum(static_cast<DeviceRoute&>(base), y, stream, false);
}

void DeviceExchange::combine(Dispatched::Route& base, TensorView expert_y, MutableTensorView y,
                             Stream stream) {
  auto& route = static_cast<DeviceRoute&>(base);
  faults_.throw_failure();
  use_device();
  if (!route.at_home) prepare_expert_y(route, expert_y, stream);
  sum(route, y, stream, true);
}

void DeviceExchange::sum(DeviceRoute& route, MutableTensorView y, Stream stream, bool also_send) {
  check_stream(stream);
  use_device();
  route.stream = stream;
  cuda::launch_combine(route.slot.params,
                       {.weights = route.routing.topk_weights.as<float>(),
                        .num_tokens = static_cast<int>(y.dim(0)),
                        .factor = config.routed_scaling_factor,
                        .y = y.as<std::uint16_t>(),
                        .send = also_send,
                        .at_home = route.at_home},
                       ctas_of_combine(y.dim(0), config.hidden, max_ctas_), stream.handle);
  route.returned = true;
}

void DeviceExchange::fill_batch(DeviceRoute& route, std::int64_t num_tokens) const {
  const SlotParams& p = route.slot.params;
  std::byte* const window = windows_[static_cast<std::size_t>(rank)].get();
  fill_route(*this, p, window, num_tokens, route);
  if (route.slot.home_rows == nullptr) return;
  route.home = {.origin = reinterpret_cast<const std::uint64_t*>(window + p.origin),
                .rows = route.slot.home_rows};
}

/// Throws what earlier calls found on the device; after a refused dispatch the exchange works on.
void DeviceExchange::throw_fault() {
  faults_.throw_failure();
  const auto refusal = faults_.take_refusal();
  if (!refusal) return;
  auto* const state = reinterpret_cast<ExchangeState*>(state_->data());
  const auto queue = static_cast<cudaStream_t>(backend_.stream().handle);
  use_device();
  SLUICE_CUDA_CHECK(cudaMemsetAsync(&state->claimed[cuda::kRefusal], 0, sizeof(int), queue));
  SLUICE_CUDA_CHECK(cudaStreamSynchronize(queue));
  throw_refusal(config, *refusal);
}

/// Only after a failure, when the device does no more than return from kernels.
std::optional<int> DeviceExchange::layer_ahead(int source) const {
  const std::byte* const window = windows_[static_cast<std::size_t>(rank)].get();
  for (const Slot& slot : slots_) {
    const SlotParams& p = slot.params;
    std::uint64_t word = 0, epoch = 0;
    const auto first = static_cast<std::size_t>(source * placement.num_experts());
    backend_.copy_to_host(&word, window + p.counts + first * sizeof(word), sizeof(word),
                          backend_.stream());
    backend_.copy_to_host(&epoch, &p.slot->epoch, sizeof(epoch), backend_.stream());
    const auto layer = static_cast<int>(cuda::layer_of_count(word));
    if (word >> 32 == cuda::count_stamp(epoch + 1, layer)) return layer;
  }
  return {};
}

ExchangeCounters DeviceExchange::counters() const {
  cuda::DeviceStats stats{};
  const auto* const state = reinterpret_cast<const ExchangeState*>(state_->data());
  backend_.copy_to_host(&stats, &state->stats, sizeof(stats), backend_.stream());
  return counters_of(stats, layout_, config, rank, num_dispatches_);
}

}  // namespace

std::unique_ptr<Exchange::Impl> make_cuda_exchange(const ExchangeConfig& config,
                                                   Transport& transport, Backend& backend) {
  if (config.hosts.num_hosts() > 1) {
    return make_rail_exchange(config, transport, backend,
                              make_cuda_rail_device(backend.device().index));
  }
  return std::make_unique<DeviceExchange>(config, transport, backend);
}

}  // namespace sluice
