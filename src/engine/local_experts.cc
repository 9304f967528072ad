// The local call: rows of tokens, experts, tokens of rows. Once a group and its layers are made,
// nothing here allocates device memory.
#include "sluice/local_experts.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "backend/check_experts.h"
#include "backend/ops.h"
#include "core/check_tensor.h"
#include "core/fail.h"
#include "engine/experts_impl.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr int kMaxLocalTopk = 32;  // As an exchange takes; of a kernel's arrays.

void check_config(const LocalGroupConfig& c) {
  for (const auto& [name, value] :
       {std::pair{"hidden", c.hidden}, {"intermediate", c.intermediate}}) {
    check_argument(value > 0 && value % kActivationGroup == 0,
                   "{} {} is not a positive multiple of {}", name, value, kActivationGroup);
  }
  check_argument(c.max_entries > 0 && c.max_entries <= (std::int64_t{1} << 30),
                 "max_entries {} is not in [1, 2^30]", c.max_entries);
  check_argument(std::isfinite(c.routed_scaling_factor), "routed_scaling_factor {} is not finite",
                 c.routed_scaling_factor);
}

/// Bytes of the rows that experts write, [max_entries, hidden] bf16.
std::size_t expert_y_bytes(const LocalGroupConfig& c) {
  return fp8_code_bytes(c.max_entries, c.hidden) * sizeof(std::uint16_t);
}
std::size_t row_of_bytes(const LocalGroupConfig& c) {
  return static_cast<std::size_t>(c.max_entries) * sizeof(std::int32_t);
}

/// The memory between the stages of one call.
struct LocalScratch {
  ExpertScratch experts;
  /// [max_entries, hidden] bf16. Until GEMM2 writes a row, its codes lie at its beginning.
  std::unique_ptr<DeviceBuffer> expert_y;
  std::unique_ptr<DeviceBuffer> row_of;  ///< [max_entries] int32

  [[nodiscard]] std::size_t bytes() const noexcept {
    return experts.x.bytes() + experts.h.bytes() + expert_y->bytes() + row_of->bytes();
  }
};

LocalScratch make_scratch(const LocalGroupConfig& c, Backend& backend) {
  LocalScratch made;
  made.experts.max_rows = c.max_entries;
  made.experts.x.scale = backend.allocate(fp8_scale_bytes(c.max_entries, c.hidden));
  made.experts.h.codes = backend.allocate(fp8_code_bytes(c.max_entries, c.intermediate));
  made.experts.h.scale = backend.allocate(fp8_scale_bytes(c.max_entries, c.intermediate));
  made.expert_y = backend.allocate(expert_y_bytes(c));
  made.row_of = backend.allocate(row_of_bytes(c));
  return made;
}

void check_fits(const LocalGroupConfig& c, const ModelGeometry& geometry, const std::string& name) {
  check_argument(geometry.hidden == c.hidden, "{}: hidden {}, the group has {}", name,
                 geometry.hidden, c.hidden);
  check_argument(geometry.intermediate == c.intermediate, "{}: intermediate {}, the group has {}",
                 name, geometry.intermediate, c.intermediate);
}

}  // namespace

struct LocalGroup::Impl {
  LocalGroupConfig config;
  BackendOps* backend = nullptr;
  LocalScratch scratch;
  std::vector<LocalScratch> outgrown;  // Graphs may use it.
  std::unique_ptr<StreamOrder> order;
  int num_layers = 0;
  std::map<const PreparedExperts*, int> prepared;  // And how many layers share it.
};

struct LocalExperts::Impl {
  Impl(std::shared_ptr<LocalGroup::Impl> shared, std::string layer_name,
       std::shared_ptr<PreparedExperts> weights, const ModelGeometry& model, int count, int first,
       const LayerRecipe& resolved)
      : group(std::move(shared)),
        name(std::move(layer_name)),
        prepared(std::move(weights)),
        geometry(model),
        num_experts(count),
        first_expert(first),
        recipe(resolved),
        ranges(group->backend->allocate(static_cast<std::size_t>(count) *
                                        (sizeof(std::int64_t) + sizeof(std::int32_t)))) {
    group->num_layers += 1;
    group->prepared[prepared.get()] += 1;
  }
  ~Impl() {
    group->num_layers -= 1;
    if (--group->prepared[prepared.get()] == 0) group->prepared.erase(prepared.get());
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  /// The casts that are left to do, for tokens of x's dtype.   Throws: kInvalidArgument.
  [[nodiscard]] TokenRows tokens_of(const TensorView& x, const TensorView& x_scale) const;
  [[nodiscard]] EntryRows entries_of(const Routing& routing) const;
  void check(const TensorView& x, const TensorView& x_scale, const Routing& routing,
             const MutableTensorView& y) const;

  std::shared_ptr<LocalGroup::Impl> group;
  std::string name;
  std::shared_ptr<PreparedExperts> prepared;
  ModelGeometry geometry;
  int num_experts, first_expert;
  LayerRecipe recipe;
  std::unique_ptr<DeviceBuffer> ranges;  ///< begin [num_experts] int64, then count int32.
};

void LocalExperts::Impl::check(const TensorView& x, const TensorView& x_scale,
                               const Routing& routing, const MutableTensorView& y) const {
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
  check_tensor("x", x, is_bf16 ? DType::kBFloat16 : DType::kFloat8E4M3, Shape{num_tokens, hidden},
               device);
  if (!is_bf16 && has_group_scales(sent_cast(recipe.wire))) {
    check_tensor("x_scale", x_scale, DType::kFloat32, Shape{num_tokens, hidden / kActivationGroup},
                 device);
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
  check_tensor("y", y, DType::kBFloat16, Shape{num_tokens, hidden}, device);
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
                    .width = group->config.hidden},
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
          .row_of = reinterpret_cast<std::int32_t*>(group->scratch.row_of->data()),
          .begin = begin,
          .count = reinterpret_cast<std::int32_t*>(begin + num_experts)};
}

void LocalExperts::forward(TensorView x, const Routing& routing, MutableTensorView y, Stream stream,
                           TensorView x_scale) {
  Impl& self = *impl_;
  LocalGroup::Impl& group = *self.group;
  self.check(x, x_scale, routing, y);
  if (x.dim(0) == 0) return;
  const std::int64_t hidden = group.config.hidden;
  const EntryRows entries = self.entries_of(routing);
  const std::int64_t num_entries = entries.num_tokens * entries.num_topk;
  auto* const expert_y = reinterpret_cast<std::uint16_t*>(group.scratch.expert_y->data());
  const ExpertScratch& scratch = group.scratch.experts;
  const Cast last_cast =
      self.recipe.gemm1 != Cast::kNone ? self.recipe.gemm1 : sent_cast(self.recipe.wire);
  Fp8Rows in = scratch.x.rows(hidden, has_group_scales(last_cast), self.recipe.s1);
  in.codes = reinterpret_cast<std::uint8_t*>(expert_y);
  in.stride = hidden * static_cast<std::int64_t>(sizeof(std::uint16_t));
  const int model_experts = std::max(self.geometry.num_experts, self.num_experts);
  const RowRanges rows{
      .num_experts = self.num_experts,
      .begin = entries.begin,
      .count = entries.count,
      .max_rows = num_entries,
      .max_rows_per_expert = num_entries,
      .expected_m = static_cast<int>((num_entries + model_experts - 1) / model_experts)};
  const Fp8Rows h = scratch.h.rows(group.config.intermediate, has_group_scales(self.recipe.gemm2),
                                   self.recipe.s2);

  group.order->before(stream);
  group.backend->gather_tokens(self.tokens_of(x, x_scale), entries, in, stream);
  group.backend->expert_stage(*self.prepared, in, rows, h, expert_y, stream, nullptr);
  group.backend->sum_entries({.rows = expert_y,
                              .row_of = entries.row_of,
                              .weights = routing.topk_weights.as<float>(),
                              .num_tokens = entries.num_tokens,
                              .num_topk = entries.num_topk,
                              .width = hidden,
                              .factor = group.config.routed_scaling_factor,
                              .y = y.as<std::uint16_t>()},
                             stream);
  group.order->after(stream);
}

LocalExperts LocalExperts::create(const LocalGroupConfig& config, const ExpertWeights& weights,
                                  Backend& backend, const Recipe& recipe) {
  return LocalGroup::create(config, backend).add_layer(weights, recipe);
}

const std::string& LocalExperts::name() const noexcept {
  return impl_->name;
}
const LayerRecipe& LocalExperts::recipe() const noexcept {
  return impl_->recipe;
}
int LocalExperts::first_expert() const noexcept {
  return impl_->first_expert;
}
int LocalExperts::num_experts() const noexcept {
  return impl_->num_experts;
}
std::size_t LocalExperts::weight_bytes() const noexcept {
  return impl_->prepared->bytes();
}
LocalExperts::LocalExperts(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
LocalExperts::LocalExperts(LocalExperts&&) noexcept = default;
LocalExperts& LocalExperts::operator=(LocalExperts&&) noexcept = default;
LocalExperts::~LocalExperts() = default;

std::size_t LocalGroup::scratch_bytes(const LocalGroupConfig& config) {
  check_config(config);
  const std::int64_t rows = config.max_entries;
  return fp8_scale_bytes(rows, config.hidden) + fp8_code_bytes(rows, config.intermediate) +
         fp8_scale_bytes(rows, config.intermediate) + expert_y_bytes(config) + row_of_bytes(config);
}

LocalGroup LocalGroup::create(const LocalGroupConfig& config, Backend& backend) {
  check_config(config);
  auto impl = std::make_shared<Impl>();
  impl->config = config;
  impl->backend = &ops(backend);
  impl->scratch = make_scratch(config, backend);
  impl->order = impl->backend->make_stream_order();
  return LocalGroup(std::move(impl));
}

void LocalGroup::reserve(std::int64_t max_entries) {
  Impl& self = *impl_;
  if (max_entries <= self.config.max_entries) return;
  LocalGroupConfig larger = self.config;
  larger.max_entries = max_entries;
  check_config(larger);
  self.outgrown.reserve(self.outgrown.size() + 1);
  LocalScratch scratch = make_scratch(larger, *self.backend);
  self.outgrown.push_back(std::exchange(self.scratch, std::move(scratch)));
  self.config = larger;
}

LocalExperts LocalGroup::add_layer(const ExpertWeights& weights, const Recipe& recipe,
                                   std::string name) {
  Impl& self = *impl_;
  if (name.empty()) name = fmt::format("layer {}", weights.layer);
  check_argument(!weights.experts.empty(), "{}: the weights hold no expert", name);
  check_argument(weights.first_expert >= 0, "{}: first_expert {} is negative", name,
                 weights.first_expert);
  check_fits(self.config, weights.geometry, name);
  check_experts(weights);
  const LayerRecipe resolved =
      resolve_recipe(recipe, Mode::kNormal, DispatchDtype::kAuto, weights.static_scales, name);
  return LocalExperts(std::make_unique<LocalExperts::Impl>(
      impl_, std::move(name), self.backend->prepare(weights), weights.geometry,
      static_cast<int>(weights.experts.size()), weights.first_expert, resolved));
}

LocalExperts LocalGroup::add_layer(const Experts& experts, const LayerRecipe& recipe,
                                   int first_expert, std::string name) {
  const Experts::Impl& given = *experts.impl_;
  if (name.empty()) name = "the layer";
  check_argument(given.backend == impl_->backend, "{}: its experts were made for another backend",
                 name);
  check_argument(first_expert >= 0, "{}: first_expert {} is negative", name, first_expert);
  check_fits(impl_->config, given.geometry, name);
  check_recipe(recipe);
  return LocalExperts(std::make_unique<LocalExperts::Impl>(impl_, std::move(name), given.prepared,
                                                           given.geometry, given.num_experts,
                                                           first_expert, recipe));
}

const LocalGroupConfig& LocalGroup::config() const noexcept {
  return impl_->config;
}

LocalGroupMemory LocalGroup::memory() const noexcept {
  LocalGroupMemory memory{.num_layers = impl_->num_layers, .scratch_bytes = impl_->scratch.bytes()};
  for (const auto& [prepared, layers] : impl_->prepared) memory.prepared_bytes += prepared->bytes();
  for (const LocalScratch& scratch : impl_->outgrown) memory.scratch_bytes += scratch.bytes();
  return memory;
}

LocalGroup::LocalGroup(std::shared_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
LocalGroup::LocalGroup(LocalGroup&&) noexcept = default;
LocalGroup& LocalGroup::operator=(LocalGroup&&) noexcept = default;
LocalGroup::~LocalGroup() = default;

}  // namespace sluice
