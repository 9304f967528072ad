// Groups of LocalExperts and what is in them. Once they are made, calls (local_calls.cc) allocate
// no device memory.
#include "sluice/local_experts.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "backend/check_experts.h"
#include "backend/ops.h"
#include "backend/traits.h"
#include "core/fail.h"
#include "engine/expert_loader.h"
#include "engine/local_impl.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr std::int64_t kMaxRows = std::int64_t{1} << 30;

void check_config(const LocalGroupConfig& c) {
  for (const auto& [name, value] :
       {std::pair{"hidden", c.hidden}, {"intermediate", c.intermediate}}) {
    check_argument(value > 0 && value % kActivationGroup == 0,
                   "{} {} is not a positive multiple of {}", name, value, kActivationGroup);
  }
  check_argument(c.max_entries > 0 && c.max_entries <= kMaxRows,
                 "max_entries {} is not in [1, 2^30]", c.max_entries);
  check_argument(std::isfinite(c.routed_scaling_factor) && c.routed_scaling_factor > 0,
                 "routed_scaling_factor {} is not a positive float32", c.routed_scaling_factor);
}

void check_fits(const LocalGroupConfig& c, const ModelGeometry& geometry, const std::string& name) {
  check_argument(geometry.hidden == c.hidden, "{}: hidden {}, the group has {}", name,
                 geometry.hidden, c.hidden);
  check_argument(geometry.intermediate == c.intermediate, "{}: intermediate {}, the group has {}",
                 name, geometry.intermediate, c.intermediate);
}

}  // namespace

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
  check_bias(shapes.geometry, backend->device().kind);
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
    readers.push_back(std::make_unique<ExpertReader>(
        checkpoint, layer, first, count, traits_of(self.backend->device().kind).load_piece_bytes));
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
