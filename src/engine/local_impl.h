// local_impl.h - what LocalGroup and LocalExperts are made of.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/ops.h"
#include "engine/experts_impl.h"
#include "engine/local_room.h"
#include "sluice/local_experts.h"

namespace sluice {

/// The arguments of LocalExperts::forward() and forward_batch().
struct TokenCall {
  TensorView x, x_scale;
  Routing routing;
  MutableTensorView y;
};
struct BatchCall {
  ExpertBatch batch;
  MutableTensorView expert_y;
};

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
                                        (sizeof(std::int64_t) + sizeof(std::int32_t)))),
        chain(group->backend->make_kernel_chain()) {
    if (geometry.token_width() != geometry.hidden) {
      group->room.grow_padded(group->config, *group->backend);
    }
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
  void check(const TokenCall& call) const;
  /// The rows of a batch; `begin` is memory for what it leaves out.   Throws: kInvalidArgument.
  [[nodiscard]] RowRanges check(const BatchCall& call, std::vector<std::int64_t>& begin) const;
  /// x, or its rows in the room's padded_x if they have the model's own width.
  [[nodiscard]] TensorView padded(const TensorView& x, Stream stream) const;
  /// A call that was checked, without the order of the group's calls.
  void queue(const TokenCall& call, Stream stream) const;
  void queue(const BatchCall& call, const RowRanges& rows, Stream stream) const;
  /// Its kernels, and copies for tokens of a width that is padded.
  void queue_each(const TokenCall& call, Stream stream) const;
  void queue_each(const BatchCall& call, const RowRanges& rows, Stream stream) const;

  std::shared_ptr<LocalGroup::Impl> group;
  std::string name;
  std::shared_ptr<PreparedExperts> prepared;
  ModelGeometry geometry;
  int num_experts, first_expert;
  LayerRecipe recipe;
  std::unique_ptr<DeviceBuffer> ranges;  ///< begin [num_experts] int64, then count int32.
  std::unique_ptr<KernelChain> chain;    ///< Of the layer, whose weights are the same each time.
};

}  // namespace sluice
