// layer_config.h - what a LayerGroup and its layers are made of: sizes, recipes, weights.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "sluice/checkpoint.h"
#include "sluice/hosts.h"
#include "sluice/placement.h"
#include "sluice/recipe.h"
#include "sluice/tensor.h"
#include "sluice/weight_format.h"

namespace sluice {

/// How much one mode of a group can hold.
struct ModeCapacity {
  /// Largest num_tokens of any call in this mode; 0: the group does not have the mode.
  int max_tokens_per_rank = 0;
  int max_m = 0;  ///< ExchangeConfig::max_m; low-latency only.
};

/// What the layers of a group have in common. The same on every rank; create() checks that.
struct LayerGroupConfig {
  /// num_experts, num_topk, hidden and intermediate of every layer. The rest is a layer's own.
  ModelGeometry geometry = {};
  ModeCapacity low_latency = {}, normal = {};
  /// Slots for experts over all ranks: a multiple of num_ranks, and at least num_experts. 0: as
  /// many as experts, expert e stays in slot e, and no call looks anything up.
  int num_slots = 0;
  /// Which rank is on which host (empty: Transport::hosts()), and the parts of the sum: as in
  /// ExchangeConfig. With sum_parts above 1 the bits of an output follow the parts that its
  /// experts' slots are in.
  Hosts hosts = {};
  int sum_parts = 0;
  float routed_scaling_factor = 1.0f;  ///< 1: the host model applies it.
  /// Calls of one mode and wire format between dispatch_send() and finish(); ExchangeConfig has the
  /// limit. 0: what forward() needs on this device, 1 on CUDA, and 2 on the CPU, where a second
  /// slot spares a wait for the slowest rank's release. Each costs the buffers of one dispatch.
  int num_in_flight = 0;
  /// CUDA, several ranks: the experts' kernel writes each row straight to its token's rank while
  /// other rows are still computed, and combine() sums rows that are there. Off: combine() reads
  /// them from the experts' ranks when all are computed. The same bits. Recipes whose receiver
  /// casts rows before GEMM1 do not do it, nor groups whose max_m reserves fewer rows on a rank
  /// than its own tokens have entries.
  bool send_from_experts = true;
  std::chrono::milliseconds peer_timeout{10'000};  ///< Longest wait for any one peer.
};

/// What one layer rounds where. Layers of one group may differ.
struct ModeRecipes {
  /// Of each mode that the group has; empty: direct. A recipe for another mode is refused.
  std::optional<Recipe> low_latency = {}, normal = {};
  DispatchDtype dispatch_dtype = DispatchDtype::kAuto;  ///< Or read_environment().dispatch_dtype.
};

/// One layer as its maker holds it: from a Checkpoint (read_layer) or from anywhere else.
struct LayerSpec {
  std::string name = {};  ///< For messages; the same on every rank. Empty: by weights.layer.
  /// This rank's experts, [rank * num_local_experts, (rank + 1) * num_local_experts) of the layer,
  /// and the static scales of the whole layer. Host memory, not needed after add_layer().
  ExpertWeights weights = {};
  /// What ranks compare of where the weights are from: Checkpoint::identity(), which has config and
  /// headers alone, or a digest of the caller's. The same on every rank. 0: nothing is compared.
  std::uint64_t identity = 0;
  /// For a group with num_slots: `weights` are then of the experts in this rank's slots, one after
  /// the other, whatever their numbers; for an empty slot, of any expert. Empty: Placement::even().
  Placement placement = {};
};

/// Rank `rank`'s part of a layer of `checkpoint`, mapped into memory: for who wants the weights
/// themselves. LayerGroup::add_layer() of a checkpoint loads in several threads instead.
/// Throws: kInvalidArgument for a layer without routed experts and for a number of ranks that does
///   not divide the experts; whatever Checkpoint::load_experts() throws.
[[nodiscard]] LayerSpec read_layer(const Checkpoint& checkpoint, int layer, int rank,
                                   int num_ranks);

/// What plan_memory() has to know of a layer that is not there yet.
struct PlannedLayer {
  ModeRecipes recipes = {};
  WeightFormat weight_format = WeightFormat::kInt4;
  DType scale_dtype = DType::kFloat32;  ///< Of the weights' group scales.
  int group_size = 128;                 ///< Weights per scale.
};

}  // namespace sluice
