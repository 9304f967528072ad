// The calls of LocalExperts: their checks, the kernels they queue, and calls that are kept.
#include <algorithm>
#include <utility>

#include "core/check_tensor.h"
#include "core/fail.h"
#include "engine/local_impl.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr int kMaxLocalTopk = 32;  // As an exchange takes; of a kernel's arrays.

}  // namespace

void LocalExperts::Impl::check(const TokenCall& call) const {
  const auto& [x, x_scale, routing, y] = call;
  const Device device = group->backend->device();
  const std::int64_t hidden = group->config.hidden;
  if (x.shape.rank() != 2) {  // Texts are made for what is refused alone.
    fail(ErrorCode::kInvalidArgument, "x has shape {}, expected [num_tokens, {}]",
         x.shape.to_string(), hidden);
  }
  const std::int64_t num_tokens = x.dim(0);
  const bool is_bf16 = x.dtype == DType::kBFloat16;
  if (!is_bf16 && recipe.wire == WireFormat::kBf16) {
    fail(ErrorCode::kInvalidArgument, "x is {}, but recipe {} begins with bfloat16",
         to_string(x.dtype), to_string(recipe));
  }
  const auto own_width = [&](const auto& tensor) {
    return tensor.shape.rank() == 2 && tensor.dim(1) == geometry.token_width() ? tensor.dim(1)
                                                                               : hidden;
  };
  check_tensor("x", x, is_bf16 ? DType::kBFloat16 : DType::kFloat8E4M3,
               Shape{num_tokens, is_bf16 ? own_width(x) : hidden}, device);
  const std::int64_t scales = is_bf16 ? 0 : scales_per_row(sent_cast(recipe.wire), hidden);
  if (scales > 0) {
    check_tensor("x_scale", x_scale, DType::kFloat32, Shape{num_tokens, scales}, device);
  } else {
    check_argument(x_scale.empty(), "x_scale is given, but x is {}",
                   is_bf16 ? "bfloat16" : "e4m3 with a static scale");
  }
  const TensorView& idx = routing.topk_idx;
  if (idx.shape.rank() != 2 || idx.dim(0) != num_tokens || idx.dim(1) < 1 ||
      idx.dim(1) > kMaxLocalTopk) {
    fail(ErrorCode::kInvalidArgument,
         "topk_idx has shape {}, expected [{}, num_topk] with num_topk in [1, {}]",
         idx.shape.to_string(), num_tokens, int{kMaxLocalTopk});
  }
  check_argument(idx.dtype == DType::kInt32 || idx.dtype == DType::kInt64,
                 "topk_idx is {}, expected int32 or int64", to_string(idx.dtype));
  check_tensor("topk_idx", idx, idx.dtype, idx.shape, device);
  check_tensor("topk_weights", routing.topk_weights, DType::kFloat32, idx.shape, device);
  check_argument(num_tokens <= group->config.max_entries / idx.dim(1),
                 "{} tokens with {} top-k entries each exceed max_entries {}", num_tokens,
                 idx.dim(1), group->config.max_entries);
  check_tensor("y", y, DType::kBFloat16, Shape{num_tokens, own_width(y)}, device);
}

TensorView LocalExperts::Impl::padded(const TensorView& x, Stream stream) const {
  const std::int64_t hidden = group->config.hidden;
  if (x.dim(1) == hidden) return x;
  std::byte* const to = group->room.padded_x->data();
  const std::size_t own = static_cast<std::size_t>(x.dim(1)) * sizeof(std::uint16_t);
  group->backend->copy_rows(to, static_cast<std::size_t>(hidden) * sizeof(std::uint16_t),
                            x.as<std::byte>(), own, own, x.dim(0), stream);
  return {to, DType::kBFloat16, {x.dim(0), hidden}, x.device};
}

TokenRows LocalExperts::Impl::tokens_of(const TensorView& x, const TensorView& x_scale) const {
  if (x.dtype == DType::kBFloat16) {
    // A recipe with a bf16 wire has its only cast at the receiver, which is here as well.
    const Cast sent = sent_cast(recipe.wire);
    if (sent == Cast::kNone) return {.x = x.as<std::uint16_t>(), .first = recipe.gemm1};
    return {.x = x.as<std::uint16_t>(), .first = sent, .second = recipe.gemm1};
  }
  return {.coded = {.codes = x.as<std::uint8_t>(),
                    .scale = x_scale.as<float>(),
                    .static_scale = recipe.wire_static_scale(),
                    .width = group->config.hidden,
                    .scale_per_row = sent_cast(recipe.wire) == Cast::kToken},
          .second = recipe.gemm1};
}

EntryRows LocalExperts::Impl::entries_of(const Routing& routing) const {
  auto* const begin = reinterpret_cast<std::int64_t*>(ranges->data());
  return {.topk_idx = routing.topk_idx.data,
          .wide_idx = routing.topk_idx.dtype == DType::kInt64,
          .num_tokens = routing.topk_idx.dim(0),
          .num_topk = static_cast<int>(routing.topk_idx.dim(1)),
          .first_expert = first_expert,
          .num_experts = num_experts,
          .row_of = reinterpret_cast<std::int32_t*>(group->room.row_of->data()),
          .begin = begin,
          .count = reinterpret_cast<std::int32_t*>(begin + num_experts)};
}

Fp8Rows LocalExperts::Impl::hidden_rows() const {
  return cast_rows(group->room.h_codes, group->room.h_scale, group->config.intermediate,
                   recipe.gemm2, recipe.s2);
}

RowRanges LocalExperts::Impl::check(const BatchCall& call, std::vector<std::int64_t>& begin) const {
  const std::int64_t max_rows = recipe.gemm1 == Cast::kNone
                                    ? group->max_batch_rows
                                    : std::min(group->max_batch_rows, group->max_cast_rows);
  const BatchNeeds needs{
      .num_experts = num_experts, .hidden = group->config.hidden, .max_rows = max_rows};
  return check_batch(recipe, call.batch, call.expert_y, needs, group->backend->device(), begin);
}

void LocalExperts::Impl::queue(const BatchCall& call, const RowRanges& rows, Stream stream) const {
  chain->queue(stream, [&](Stream s) { queue_each(call, rows, s); });
}

void LocalExperts::Impl::queue(const TokenCall& call, Stream stream) const {
  const std::int64_t hidden = group->config.hidden;
  if (call.x.dim(1) != hidden || call.y.dim(1) != hidden) return queue_each(call, stream);
  chain->queue(stream, [&](Stream s) { queue_each(call, s); });
}

void LocalExperts::Impl::queue_each(const BatchCall& call, const RowRanges& rows,
                                    Stream stream) const {
  const std::int64_t hidden = group->config.hidden;
  Fp8RowsView in = received_rows(call.batch, recipe.wire, recipe.wire_static_scale(), hidden);
  if (recipe.gemm1 != Cast::kNone) {
    const Fp8Rows cast =
        cast_rows(group->room.rows, group->room.x_scale, hidden, recipe.gemm1, recipe.s1);
    cast_batch(*group->backend, recipe, call.batch, rows, cast, stream);
    in = cast;
  }
  ExpertStageTimes times;
  group->backend->expert_stage(*prepared, in, rows, hidden_rows(),
                               call.expert_y.as<std::uint16_t>(), stream, &times);
}

void LocalExperts::Impl::queue_each(const TokenCall& call, Stream stream) const {
  const std::int64_t hidden = group->config.hidden;
  const EntryRows entries = entries_of(call.routing);
  const std::int64_t num_entries = entries.num_tokens * entries.num_topk;
  auto* const expert_y = reinterpret_cast<std::uint16_t*>(group->room.rows->data());
  const Cast last_cast = recipe.gemm1 != Cast::kNone ? recipe.gemm1 : sent_cast(recipe.wire);
  Fp8Rows in = cast_rows(group->room.rows, group->room.x_scale, hidden, last_cast, recipe.s1);
  in.stride = hidden * static_cast<std::int64_t>(sizeof(std::uint16_t));
  const int model_experts = std::max(geometry.num_experts, num_experts);
  const RowRanges rows{
      .num_experts = num_experts,
      .begin = entries.begin,
      .count = entries.count,
      .max_rows = num_entries,
      .max_rows_per_expert = num_entries,
      .expected_m = static_cast<int>((num_entries + model_experts - 1) / model_experts)};
  const Fp8Rows h = hidden_rows();
  const bool is_narrow = call.y.dim(1) != hidden;
  std::byte* const y = is_narrow ? group->room.padded_y->data() : call.y.as<std::byte>();

  group->backend->gather_tokens(tokens_of(padded(call.x, stream), call.x_scale), entries, in,
                                stream);
  group->backend->expert_stage(*prepared, in, rows, h, expert_y, stream, nullptr);
  group->backend->sum_entries({.rows = expert_y,
                               .row_of = entries.row_of,
                               .weights = call.routing.topk_weights.as<float>(),
                               .num_tokens = entries.num_tokens,
                               .num_topk = entries.num_topk,
                               .width = hidden,
                               .factor = group->config.routed_scaling_factor,
                               .y = reinterpret_cast<std::uint16_t*>(y)},
                              stream);
  if (!is_narrow) return;
  const std::size_t own = static_cast<std::size_t>(call.y.dim(1)) * sizeof(std::uint16_t);
  group->backend->copy_rows(call.y.as<std::byte>(), own, y,
                            static_cast<std::size_t>(hidden) * sizeof(std::uint16_t), own,
                            entries.num_tokens, stream);
}

void LocalExperts::forward(TensorView x, const Routing& routing, MutableTensorView y, Stream stream,
                           TensorView x_scale) {
  const TokenCall call{.x = x, .x_scale = x_scale, .routing = routing, .y = y};
  impl_->check(call);
  if (x.dim(0) == 0) return;
  StreamOrder& order = *impl_->group->order;
  const StreamOrder::Seen seen = order.before(stream);
  impl_->queue(call, stream);
  order.after(stream, seen);
}

void LocalExperts::forward_batch(const ExpertBatch& batch, MutableTensorView expert_y,
                                 Stream stream) {
  const BatchCall call{.batch = batch, .expert_y = expert_y};
  std::vector<std::int64_t> begin;
  const RowRanges rows = impl_->check(call, begin);
  if (rows.max_rows == 0) return;
  StreamOrder& order = *impl_->group->order;
  const StreamOrder::Seen seen = order.before(stream);
  impl_->queue(call, rows, stream);
  order.after(stream, seen);
}

struct LocalCall::Impl {
  LocalGroup::Impl* group = nullptr;
  std::unique_ptr<RepeatedWork> work;  ///< None: the call has no rows.
};

LocalCall LocalExperts::keep(TensorView x, const Routing& routing, MutableTensorView y,
                             TensorView x_scale) {
  const Impl& self = *impl_;
  const TokenCall call{.x = x, .x_scale = x_scale, .routing = routing, .y = y};
  self.check(call);
  auto kept = std::make_unique<LocalCall::Impl>(self.group.get());
  if (x.dim(0) > 0) {
    kept->work = self.group->backend->make_repeated_work(
        [&self, call](Stream stream) { self.queue(call, stream); });
  }
  return LocalCall(std::move(kept));
}

LocalCall LocalExperts::keep_batch(const ExpertBatch& batch, MutableTensorView expert_y) {
  const Impl& self = *impl_;
  const BatchCall call{.batch = batch, .expert_y = expert_y};
  std::vector<std::int64_t> begin;
  const RowRanges rows = self.check(call, begin);
  auto kept = std::make_unique<LocalCall::Impl>(self.group.get());
  if (rows.max_rows == 0) return LocalCall(std::move(kept));
  if (self.group->backend->device().kind == Device::Kind::kHost) {
    // Here counts are looked at, and each call has its own.
    kept->work = self.group->backend->make_repeated_work([&self, call](Stream stream) {
      std::vector<std::int64_t> begin_of_call;
      self.queue(call, self.check(call, begin_of_call), stream);
    });
  } else {
    kept->work = self.group->backend->make_repeated_work(
        [&self, call, rows](Stream stream) { self.queue(call, rows, stream); });
  }
  return LocalCall(std::move(kept));
}

void LocalCall::run(Stream stream) {
  if (!impl_->work) return;
  StreamOrder& order = *impl_->group->order;
  const StreamOrder::Seen seen = order.before(stream);
  impl_->work->queue(stream);
  order.after(stream, seen);
}

LocalCall::LocalCall(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
LocalCall::LocalCall(LocalCall&&) noexcept = default;
LocalCall& LocalCall::operator=(LocalCall&&) noexcept = default;
LocalCall::~LocalCall() = default;

}  // namespace sluice
