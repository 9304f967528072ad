// One forward pass: exchange, experts, exchange. Nothing here allocates device memory.
#include "sluice/layer.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "core/check_tensor.h"
#include "core/fail.h"
#include "core/row_digest.h"
#include "engine/layer_impl.h"
#include "exchange/impl.h"
#include "sluice/quant.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

std::atomic<std::uint64_t> num_layers_made{0};

}  // namespace

Layer::Impl::Impl(std::shared_ptr<LayerGroup::Impl> shared, const AgreedLayer& agreed,
                  const ExpertWeights& shapes, std::shared_ptr<PreparedExperts> prepared)
    : group(std::move(shared)),
      id(++num_layers_made),
      name(agreed.name),
      number(agreed.number),
      experts(shapes, std::move(prepared), group->scratch, *group->backend) {
  if (group->config.num_slots != 0) {
    slots.emplace(agreed.placement, *group->backend);
  } else {
    fixed_placement = agreed.placement;
  }
  LayerGroupMemory& sum = group->layers;
  sum.num_layers += 1;
  sum.codes_bytes += experts.codes_bytes;
  sum.scales_bytes += experts.scales_bytes;
  sum.prepared_bytes += experts.prepared->bytes();
}

Layer::Impl::~Impl() {
  LayerGroupMemory& sum = group->layers;
  sum.num_layers -= 1;
  sum.codes_bytes -= experts.codes_bytes;
  sum.scales_bytes -= experts.scales_bytes;
  sum.prepared_bytes -= experts.prepared->bytes();
}

Layer::Impl::ModeOfLayer& Layer::Impl::mode(Mode mode) {
  auto& found = modes[static_cast<std::size_t>(mode)];
  check_argument(found.has_value(), "{} was made without a recipe for {} mode", name,
                 to_string(mode));
  return *found;
}

TensorView LayerGroup::Impl::padded(const TensorView& x, Stream stream) const {
  const ModelGeometry& g = config.geometry;
  if (!padded_x || x.shape.rank() != 2 || x.dim(1) != g.token_width()) return x;
  const std::int64_t most =
      std::max(config.low_latency.max_tokens_per_rank, config.normal.max_tokens_per_rank);
  check_argument(x.dim(0) <= most, "x has {} tokens, more than max_tokens_per_rank {}", x.dim(0),
                 most);
  check_tensor("x", x, DType::kBFloat16, x.shape, backend->device());
  const auto own = static_cast<std::size_t>(g.token_width()) * sizeof(std::uint16_t);
  const auto stride = static_cast<std::size_t>(g.hidden) * sizeof(std::uint16_t);
  backend->copy_rows(padded_x->data(), stride, x.as<std::byte>(), own, own, x.dim(0), stream);
  return {padded_x->data(), DType::kBFloat16, {x.dim(0), g.hidden}, backend->device()};
}

MutableTensorView LayerGroup::Impl::padded(const MutableTensorView& y) const {
  const ModelGeometry& g = config.geometry;
  if (!padded_y || y.shape.rank() != 2 || y.dim(1) != g.token_width()) return y;
  check_tensor("y", y, DType::kBFloat16, y.shape, backend->device());
  const Shape shape{y.dim(0), g.hidden};
  check_argument(
      static_cast<std::size_t>(shape.num_elements()) * sizeof(std::uint16_t) <= padded_y->bytes(),
      "y has {} tokens, more than max_tokens_per_rank", y.dim(0));
  MutableTensorView wide;
  wide.data = padded_y->data(), wide.dtype = DType::kBFloat16, wide.shape = shape;
  wide.device = backend->device();
  return wide;
}

void LayerGroup::Impl::copy_padded(const MutableTensorView& y, Stream stream) const {
  const ModelGeometry& g = config.geometry;
  if (!padded_y || y.dim(1) != g.token_width()) return;
  const auto own = static_cast<std::size_t>(g.token_width()) * sizeof(std::uint16_t);
  const auto stride = static_cast<std::size_t>(g.hidden) * sizeof(std::uint16_t);
  backend->copy_rows(y.as<std::byte>(), own, padded_y->data(), stride, own, y.dim(0), stream);
}

double Layer::Impl::stage_us(Clock::time_point& start, Stream stream) {
  if (!records_stats) return 0;
  group->backend->synchronize(stream);
  const Clock::time_point now = Clock::now();
  const double us = std::chrono::duration<double, std::micro>(now - start).count();
  start = now;
  return us;
}

void Layer::forward(Mode mode, TensorView x, const Routing& routing, MutableTensorView y,
                    Stream stream) {
  Impl& self = *impl_;
  Impl::ModeOfLayer& m = self.mode(mode);
  const Routing placed = self.placed(routing);
  self.stats = {};
  self.started = self.mark = Impl::Clock::now();
  self.group->order->before(stream);
  Dispatched dispatched = self.group->dispatch_in(*m.exchange, self.number, [&] {
    return m.exchange->dispatch(self.group->padded(x, stream), self.counted(placed), stream,
                                m.recipe.wire_static_scale());
  });
  self.stats.times.dispatch_us = self.stage_us(self.mark, stream);
  self.run(m, std::move(dispatched), y, stream);
  self.group->order->after(stream);
}

Dispatched Layer::dispatch_send(Mode mode, TensorView x, const Routing& routing, Stream stream) {
  Impl::ModeOfLayer& m = impl_->mode(mode);
  const Routing placed = impl_->placed(routing);
  impl_->group->order->before(stream);
  Dispatched dispatched = impl_->group->dispatch_in(*m.exchange, impl_->number, [&] {
    return m.exchange->dispatch_send(impl_->group->padded(x, stream), impl_->counted(placed),
                                     stream, m.recipe.wire_static_scale());
  });
  impl_->group->order->after(stream);
  dispatched.route_->layer = impl_->id;
  dispatched.route_->is_in_flight = impl_->in_flight;
  dispatched.route_->keeps = impl_->group;
  dispatched.route_->mode = mode;
  return dispatched;
}

void Layer::finish(Dispatched dispatched, MutableTensorView y, Stream stream) {
  Impl& self = *impl_;
  check_argument(dispatched.route_ != nullptr, "finish of a Dispatched that was moved away");
  check_argument(dispatched.route_->layer == impl_->id,
                 "finish of a Dispatched that {} did not make", self.name);
  (void)self.placed({});
  Impl::ModeOfLayer& m = self.mode(dispatched.route_->mode);
  self.stats = {};
  self.started = self.mark = Impl::Clock::now();
  self.group->order->before(stream);
  self.group->dispatch_in(*m.exchange, self.number,
                          [&] { m.exchange->dispatch_receive(dispatched, stream); });
  self.stats.times.dispatch_us = self.stage_us(self.mark, stream);
  self.run(m, std::move(dispatched), y, stream);
  self.group->order->after(stream);
}

void Layer::Impl::run(ModeOfLayer& m, Dispatched dispatched, MutableTensorView y, Stream stream) {
  const ExpertBatch& batch = dispatched.batch();
  const RowRanges rows = row_ranges(batch);
  // Where the exchange has memory of its own for the experts' rows, combine need not copy them.
  MutableTensorView expert_y = dispatched.expert_y();
  if (expert_y.empty()) {
    expert_y.data = group->expert_y->data(), expert_y.dtype = DType::kBFloat16;
    expert_y.shape = batch.x.shape, expert_y.device = group->backend->device();
  }
  // Until GEMM2 writes them, the rows of expert_y hold what the receiver quantizes. No peer reads
  // the last call's rows any more: every rank's flag of this dispatch follows its last combine.
  const Fp8RowsView in =
      experts.gemm1_rows(m.recipe, batch, rows, expert_y.as<std::uint16_t>(), stream);
  stats.times.quantize_us = stage_us(mark, stream);
  if (records_digest) record_digest(rows, in, stream);

  ExpertStageTimes split;
  mark = Clock::now();
  if (rows_go_home(m, *dispatched.route_)) {
    experts.gemms_home(m.recipe, in, rows, dispatched.route_->home, stream);
    dispatched.route_->at_home = true;
  } else {
    experts.gemms(m.recipe, in, rows, expert_y.as<std::uint16_t>(), stream, &split);
  }
  const double gemms_us = stage_us(mark, stream);
  const double split_us = split.gemm1_us + split.activation_us + split.gemm2_us;
  const double share = split_us > 0 ? gemms_us / split_us : 0;
  stats.times.gemm1_us = split_us > 0 ? split.gemm1_us * share : gemms_us;
  stats.times.activation_us = split.activation_us * share;
  stats.times.gemm2_us = split.gemm2_us * share;

  if (records_stats) record_rows(batch, stream);
  mark = Clock::now();
  m.exchange->combine(std::move(dispatched), expert_y, group->padded(y), stream);
  group->copy_padded(y, stream);
  stats.times.combine_us = stage_us(mark, stream);
  stats.times.total_us = std::chrono::duration<double, std::micro>(Clock::now() - started).count();
}

/// Every rank decides alike: by what ranks agreed on and by sizes that they share.
bool Layer::Impl::rows_go_home(const ModeOfLayer& m, const Dispatched::Route& route) const {
  // GEMM1's input may lie in expert_y, which is where the other ranks would write.
  return group->config.send_from_experts && group->transport->num_ranks() > 1 &&
         m.recipe.gemm1 == Cast::kNone && route.home.origin != nullptr;
}

void Layer::Impl::record_rows(const ExpertBatch& batch, Stream stream) {
  const auto num_local = static_cast<std::size_t>(group->placement.num_local());
  std::vector<std::int32_t> rows(num_local);
  group->backend->copy_to_host(rows.data(), batch.num_rows.data, num_local * sizeof(std::int32_t),
                               stream);
  stats.rows_per_expert.assign(rows.begin(), rows.end());
  std::int64_t total = 0, active = 0;
  for (const std::int32_t n : rows) total += n, active += n > 0;
  stats.weight_bytes_read =
      experts.prepared->bytes() / num_local * static_cast<std::size_t>(active);
  stats.flops = static_cast<std::uint64_t>(total) * 6u *
                static_cast<std::uint64_t>(experts.geometry.hidden) *
                static_cast<std::uint64_t>(experts.geometry.intermediate);
}

/// Sums one hash per row, so that the total over ranks does not depend on how experts are spread.
void Layer::Impl::record_digest(const RowRanges& rows, const Fp8RowsView& in, Stream stream) {
  BackendOps& backend = *group->backend;
  const auto num_local = static_cast<std::size_t>(rows.num_experts);
  std::vector<std::int64_t> begin(num_local);
  std::vector<std::int32_t> count(num_local);
  RowRanges on_host = rows;
  if (rows.begin != nullptr) {
    backend.copy_to_host(begin.data(), rows.begin, num_local * sizeof(begin[0]), stream);
    on_host.begin = begin.data();
  }
  backend.copy_to_host(count.data(), rows.count, num_local * sizeof(count[0]), stream);
  on_host.count = count.data();
  const auto width = static_cast<std::size_t>(in.width);
  std::vector<std::uint8_t> codes(width);
  std::vector<float> scales(in.scale ? static_cast<std::size_t>(in.num_scales()) : 0);
  const std::span<const int> here = placement().slot_experts(group->transport->rank());
  digest = 0;
  for (int e = 0; e < rows.num_experts; ++e) {
    const auto expert = static_cast<std::uint64_t>(here[static_cast<std::size_t>(e)]);
    for (std::int64_t r = 0; r < on_host.num_rows(e); ++r) {
      const auto source = static_cast<std::size_t>(on_host.first_row(e) + r);
      backend.copy_to_host(codes.data(), in.row(static_cast<std::int64_t>(source)), width, stream);
      if (in.scale) {
        backend.copy_to_host(scales.data(), in.scale + source * scales.size(),
                             scales.size() * sizeof(float), stream);
      }
      digest += row_digest(expert, static_cast<std::uint64_t>(r), codes, scales);
    }
  }
}

Routing Layer::Impl::placed(const Routing& routing) const {
  if (half_moved) {
    fail_of_ranks(ErrorCode::kTransport, half_moved->ranks(),
                  "{}: its experts are half moved, read the layer again: {}", name,
                  half_moved->what());
  }
  Routing placed = routing;
  placed.slots = slots ? &*slots : nullptr;
  placed.layer = number;
  return placed;
}

const Placement& Layer::placement() const noexcept {
  return impl_->placement();
}
void Layer::check() {
  for (auto& mode : impl_->modes) {
    if (mode) mode->exchange->check();
  }
}
const std::string& Layer::name() const noexcept {
  return impl_->name;
}
const LayerRecipe& Layer::recipe(Mode mode) const {
  return impl_->mode(mode).recipe;
}
ExchangeCounters Layer::exchange_counters(Mode mode) const {
  return impl_->mode(mode).exchange->counters();
}
std::size_t Layer::weight_bytes() const noexcept {
  return impl_->experts.prepared->bytes();
}
std::uint64_t Layer::weight_digest() const {
  return digest_of(*impl_->experts.prepared);
}
void Layer::record_stats(bool on) noexcept {
  impl_->records_stats = on;
}
const ForwardStats& Layer::stats() const noexcept {
  return impl_->stats;
}
void Layer::record_gemm_input_digest(bool on) noexcept {
  impl_->records_digest = on;
}
std::uint64_t Layer::gemm_input_digest() const noexcept {
  return impl_->digest;
}

Layer::Layer(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
Layer::Layer(Layer&&) noexcept = default;
Layer& Layer::operator=(Layer&&) noexcept = default;
Layer::~Layer() = default;

}  // namespace sluice
