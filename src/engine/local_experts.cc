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
#include "engine/expert_loader.h"
#include "engine/experts_impl.h"
#include "engine/local_room.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr int kMaxLocalTopk = 32;  // As an exchange takes; of a kernel's arrays.
constexpr std::int64_t kMaxRows = std::int64_t{1} << 30;

void check_config(const LocalGroupConfig& c) {
  for (const auto& [name, value] :
       {std::pair{"hidden", c.hidden}, {"intermediate", c.intermediate}}) {
    check_argument(value > 0 && value % kActivationGroup == 0,
                   "{} {} is not a positive multiple of {}", name, value, kActivationGroup);
  }
  check_argument(c.max_entries > 0 && c.max_entries <= kMaxRows,
                 "max_entries {} is not in [1, 2^30]", c.max_entries);
  check_argument(std::isfinite(c.routed_scaling_factor), "routed_scaling_factor {} is not finite",
                 c.routed_scaling_factor);
}

void check_fits(const LocalGroupConfig& c, const ModelGeometry& geometry, const std::string& name) {
  check_argument(geometry.hidden == c.hidden, "{}: hidden {}, the group has {}", name,
                 geometry.hidden, c.hidden);
  check_argument(geometry.intermediate == c.intermediate, "{}: intermediate {}, the group has {}",
                 name, geometry.intermediate, c.intermediate);
}

}  // namespace

struct LocalGroup::Impl {
  [[nodiscard]] LayerRecipe resolve(const ExpertWeights& shapes, const Recipe& recipe,
                                    const std::string& name) const;

  LocalGroupConfig config;
  BackendOps* backend = nullptr;
  LocalRoom room;
  std::int64_t max_batch_rows = 0;  // Of a batch that is cast here, and of any.
  std::int64_t max_cast_rows = 0;
  std::unique_ptr<StreamOrder> order;
  LoadStats load_stats;
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
  [[nodiscard]] Fp8Rows hidden_rows() const;
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
          .row_of = reinterpret_cast<std::int32_t*>(group->room.row_of->data()),
          .begin = begin,
          .count = reinterpret_cast<std::int32_t*>(begin + num_experts)};
}

Fp8Rows LocalExperts::Impl::hidden_rows() const {
  return rows_in(group->room.h_codes, group->room.h_scale, group->config.intermediate,
                 has_group_scales(recipe.gemm2), recipe.s2);
}

std::int64_t LocalExperts::max_batch_rows() const noexcept {
  const LocalGroup::Impl& group = *impl_->group;
  return impl_->recipe.gemm1 == Cast::kNone ? group.max_batch_rows
                                            : std::min(group.max_batch_rows, group.max_cast_rows);
}

void LocalExperts::reserve_batch(std::int64_t max_rows) {
  LocalGroup::Impl& group = *impl_->group;
  check_argument(max_rows > 0 && max_rows <= kMaxRows, "max_rows {} is not in [1, 2^30]", max_rows);
  group.room.grow_h(max_rows, group.config.intermediate, *group.backend);
  group.max_batch_rows = std::max(group.max_batch_rows, max_rows);
  if (impl_->recipe.gemm1 == Cast::kNone) return;
  group.room.grow(group.room.rows, fp8_code_bytes(max_rows, group.config.hidden), *group.backend);
  group.room.grow(group.room.x_scale, fp8_scale_bytes(max_rows, group.config.hidden),
                  *group.backend);
  group.max_cast_rows = std::max(group.max_cast_rows, max_rows);
}

void LocalExperts::forward_batch(const ExpertBatch& batch, MutableTensorView expert_y,
                                 Stream stream) {
  Impl& self = *impl_;
  LocalGroup::Impl& group = *self.group;
  const std::int64_t hidden = group.config.hidden;
  std::vector<std::int64_t> begin;
  const BatchNeeds needs{
      .num_experts = self.num_experts, .hidden = hidden, .max_rows = max_batch_rows()};
  const RowRanges rows =
      check_batch(self.recipe, batch, expert_y, needs, group.backend->device(), begin);
  if (rows.max_rows == 0) return;

  group.order->before(stream);
  Fp8RowsView in = received_rows(batch, self.recipe.wire_static_scale(), hidden);
  if (self.recipe.gemm1 != Cast::kNone) {
    const Fp8Rows cast = rows_in(group.room.rows, group.room.x_scale, hidden,
                                 has_group_scales(self.recipe.gemm1), self.recipe.s1);
    cast_batch(*group.backend, self.recipe, batch, rows, cast, stream);
    in = cast;
  }
  ExpertStageTimes times;
  group.backend->expert_stage(*self.prepared, in, rows, self.hidden_rows(),
                              expert_y.as<std::uint16_t>(), stream, &times);
  group.order->after(stream);
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
  auto* const expert_y = reinterpret_cast<std::uint16_t*>(group.room.rows->data());
  const Cast last_cast =
      self.recipe.gemm1 != Cast::kNone ? self.recipe.gemm1 : sent_cast(self.recipe.wire);
  Fp8Rows in = rows_in(group.room.rows, group.room.x_scale, hidden, has_group_scales(last_cast),
                       self.recipe.s1);
  in.stride = hidden * static_cast<std::int64_t>(sizeof(std::uint16_t));
  const int model_experts = std::max(self.geometry.num_experts, self.num_experts);
  const RowRanges rows{
      .num_experts = self.num_experts,
      .begin = entries.begin,
      .count = entries.count,
      .max_rows = num_entries,
      .max_rows_per_expert = num_entries,
      .expected_m = static_cast<int>((num_entries + model_experts - 1) / model_experts)};
  const Fp8Rows h = self.hidden_rows();

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
std::uint64_t LocalExperts::weight_digest() const {
  return digest_of(*impl_->prepared);
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
  impl->room.grow_entries(config, backend);
  impl->order = impl->backend->make_stream_order();
  return LocalGroup(std::move(impl));
}

void LocalGroup::reserve(std::int64_t max_entries) {
  Impl& self = *impl_;
  if (max_entries <= self.config.max_entries) return;
  LocalGroupConfig larger = self.config;
  larger.max_entries = max_entries;
  check_config(larger);
  self.room.grow_entries(larger, *self.backend);
  self.config = larger;
}

/// The recipe of experts whose shapes fit the group; `shapes` need no data.
LayerRecipe LocalGroup::Impl::resolve(const ExpertWeights& shapes, const Recipe& recipe,
                                      const std::string& name) const {
  check_argument(!shapes.experts.empty(), "{}: the weights hold no expert", name);
  check_argument(shapes.first_expert >= 0, "{}: first_expert {} is negative", name,
                 shapes.first_expert);
  check_fits(config, shapes.geometry, name);
  check_experts(shapes);
  return resolve_recipe(recipe, Mode::kNormal, DispatchDtype::kAuto, shapes.static_scales, name);
}

LocalExperts LocalGroup::add_layer(const ExpertWeights& weights, const Recipe& recipe,
                                   std::string name) {
  if (name.empty()) name = fmt::format("layer {}", weights.layer);
  const LayerRecipe resolved = impl_->resolve(weights, recipe, name);
  return LocalExperts(std::make_unique<LocalExperts::Impl>(
      impl_, std::move(name), impl_->backend->prepare(weights), weights.geometry,
      static_cast<int>(weights.experts.size()), weights.first_expert, resolved));
}

std::vector<LocalExperts> LocalGroup::add_layers(const Checkpoint& checkpoint,
                                                 std::span<const int> layers, int first, int count,
                                                 const Recipe& recipe, const LoadOptions& options) {
  Impl& self = *impl_;
  std::vector<std::unique_ptr<ExpertReader>> readers;
  std::vector<std::pair<std::string, LayerRecipe>> named;
  for (const int layer : layers) {
    readers.push_back(std::make_unique<ExpertReader>(checkpoint, layer, first, count));
    const std::string name = fmt::format("layer {}", layer);
    named.emplace_back(name, self.resolve(readers.back()->shapes(), recipe, name));
  }
  std::vector<LocalExperts> made;
  if (layers.empty()) return made;
  auto prepared = load_prepared(*self.backend, readers, options, self.load_stats);
  for (std::size_t i = 0; i < readers.size(); ++i) {
    made.push_back(LocalExperts(std::make_unique<LocalExperts::Impl>(
        impl_, named[i].first, std::move(prepared[i]), readers[i]->shapes().geometry, count, first,
        named[i].second)));
  }
  return made;
}

const LoadStats& LocalGroup::load_stats() const noexcept {
  return impl_->load_stats;
}

LocalExperts LocalGroup::add_layer(const Experts& experts, const LayerRecipe& recipe,
                                   int first_expert, std::string name) {
  const Experts::Impl& given = *experts.impl_;
  if (name.empty()) name = "the layer";
  check_argument(given.backend == impl_->backend, "{}: its experts were made for another backend",
                 name);
  check_argument(given.is_missing.empty(), "{}: finish_repack() of its experts is missing", name);
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
  LocalGroupMemory memory{.num_layers = impl_->num_layers, .scratch_bytes = impl_->room.bytes()};
  for (const auto& [prepared, layers] : impl_->prepared) memory.prepared_bytes += prepared->bytes();
  return memory;
}

LocalGroup::LocalGroup(std::shared_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
LocalGroup::LocalGroup(LocalGroup&&) noexcept = default;
LocalGroup& LocalGroup::operator=(LocalGroup&&) noexcept = default;
LocalGroup::~LocalGroup() = default;

}  // namespace sluice
