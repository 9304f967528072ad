// layer.h - MoE layers that share their buffers, as the layers of a model do.
//
//   LayerGroup   transport, backend, one Exchange per (mode, wire format), scratch: once
//      |
//      +-- Layer "model.layers.3.mlp.experts"   experts, recipes, static scales
//      +-- Layer "model.layers.4.mlp.experts"
//      ...
//
//   Layer::forward:  x --dispatch--> rows --quantize?--> GEMM1, activation, quantize --> GEMM2
//                      --combine--> y
//
// The layers of a model run one after the other, so one set of buffers serves all of them. Only the
// experts are held for each layer.
//
// Buffers are made by LayerGroup::create() and by the first layer that needs them, and never move:
// a CUDA graph that was captured over some layers stays valid when more are added.
//
// Threads: one at a time, for a group and all its layers together.
// Ranks: create(), add_layer(), forward(), dispatch_send() and finish() are collective. Every rank
// makes the same calls in the same order, of the same layers; one that differs is named by all.
// Placement: with num_slots, a layer's experts lie where its Placement says, and rebalance() moves
// them between two calls. Everything else here speaks of logical experts; num_local_experts is then
// the number of this rank's slots.
// Streams: layers of one group may be called on different streams. The device then takes the calls
// one after the other, in the order in which they were made: forward(), dispatch_send() and
// finish() each begin when the one before has ended. They share rows, and their kernels hold
// processors while they wait for other ranks, so that two at once could wait for each other for
// ever. The same holds for the streams of one graph capture. Graphs are ordered by whoever launches
// them: replay the graphs of one group one after the other, in the same order on every rank. A
// stream outlives the calls queued on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/exchange.h"
#include "sluice/layer_config.h"
#include "sluice/layer_stats.h"
#include "sluice/loading.h"
#include "sluice/placement.h"
#include "sluice/rebalance.h"
#include "sluice/recipe.h"
#include "sluice/stream.h"
#include "sluice/tensor.h"

namespace sluice {

class Backend;
class Transport;

/// One layer of a group. Keeps the group's buffers alive. Its destructor gives back the experts'
/// memory, which waits for the device: no rank may have calls queued then.
class Layer {
 public:
  Layer(Layer&&) noexcept;
  Layer& operator=(Layer&&) noexcept;
  ~Layer();

  /// The whole layer: y = combine(experts(dispatch(x))).
  /// x, y:   [num_tokens, hidden] bf16, num_tokens <= max_tokens_per_rank of the mode; 0 is fine.
  ///         Where the model's own width is no multiple of 128, either may have that one instead
  ///         (ModelGeometry::token_width()): it is padded with zeros, for one more copy of the
  ///         rows. In rows of `hidden` the caller has zeros behind the model's channels.
  /// Stream: asynchronous on CUDA; may be captured in a graph: nothing is allocated.
  /// Throws: as Exchange::dispatch(); kInvalidArgument for a mode that the group does not have.
  void forward(Mode mode, TensorView x, const Routing& routing, MutableTensorView y, Stream stream);

  /// forward() in two parts, so that the tokens of up to num_in_flight calls travel at once.
  /// dispatch_send() sends the tokens; finish() receives, runs the experts and combines. The same
  /// bits as forward(). `routing` stays unchanged until finish() has run.
  /// Throws: as forward(); finish() kInvalidArgument if another layer made `dispatched`.
  [[nodiscard]] Dispatched dispatch_send(Mode mode, TensorView x, const Routing& routing,
                                         Stream stream);
  void finish(Dispatched dispatched, MutableTensorView y, Stream stream);

  /// Throws what earlier calls found on the device: Exchange::check() of this layer's modes.
  void check();

  /// Where the experts are. Without num_slots: the identity.
  [[nodiscard]] const Placement& placement() const noexcept;
  /// Moves experts to where `placement` has them: see rebalance.h.
  RebalanceStats rebalance(const Placement& placement, Stream stream,
                           const RebalanceOptions& options = {});
  /// Of all rebalance() so far, on this rank.
  [[nodiscard]] const RebalanceCounters& rebalance_counters() const noexcept;

  [[nodiscard]] const std::string& name() const noexcept;
  /// Throws: kInvalidArgument for a mode that the group does not have.
  [[nodiscard]] const LayerRecipe& recipe(Mode mode) const;
  /// Of the exchange that `mode` uses; other layers with the same wire format count there too.
  [[nodiscard]] ExchangeCounters exchange_counters(Mode mode) const;
  /// Bytes of prepared weights held by this rank's backend.
  [[nodiscard]] std::size_t weight_bytes() const noexcept;

  /// Of all bytes of the prepared weights: the same for the same weights on one kind of backend.
  [[nodiscard]] std::uint64_t weight_digest() const;

  /// When on, forward() waits for the device after each stage to time it, and fills stats(). Off at
  /// creation: forward() then only queues work and may be captured in a CUDA graph.
  void record_stats(bool on) noexcept;
  /// Of the last forward() with record_stats(true).
  [[nodiscard]] const ForwardStats& stats() const noexcept;
  /// When on, forward() also computes a digest of the bytes GEMM1 consumes (codes and scales of
  /// every valid row, in order of expert and row). `direct` and `direct-bf16` give the same digest.
  void record_gemm_input_digest(bool on) noexcept;
  [[nodiscard]] std::uint64_t gemm_input_digest() const noexcept;

  /// When on, every call adds up the rows that each of this rank's experts received, where they are
  /// counted anyway: nothing waits, and a CUDA graph that is captured meanwhile counts whenever it
  /// is replayed. Off at creation.
  /// Stream: turned on for the first time, allocates, which waits for the device.
  /// Throws: kOutOfMemory.
  void count_rows(bool on);
  /// Of all calls with count_rows(true) since the experts last moved, in both modes:
  /// [num_local_experts].
  /// Stream: waits for `stream`, on which the last call was queued.
  [[nodiscard]] std::vector<std::int64_t> counted_rows(Stream stream) const;
  /// The same of every logical expert, from all ranks: what balance() takes. [num_experts]
  /// Ranks: collective.   Throws: kPeerTimeout, kTransport.
  [[nodiscard]] std::vector<std::int64_t> counted_rows_of_all(Stream stream) const;
  /// Sets the counts to zero.   Stream: as counted_rows().
  void reset_counted_rows(Stream stream);

  struct Impl;  ///< Internal.

 private:
  friend class LayerGroup;
  explicit Layer(std::unique_ptr<Impl> impl) noexcept;
  std::unique_ptr<Impl> impl_;
};

/// What layers share. The layers keep it alive: a LayerGroup may go before them.
class LayerGroup {
 public:
  /// What a group with these layers takes on each of `num_ranks` ranks. Needs neither weights nor
  /// device.   Throws: as create() and add_layer().
  [[nodiscard]] static LayerGroupMemory plan_memory(const LayerGroupConfig& config,
                                                    std::span<const PlannedLayer> layers,
                                                    Device::Kind device, int num_ranks);

  /// Makes the scratch that every recipe needs, for the larger of the group's modes. Borrows
  /// `transport` and `backend` until the last layer is gone.
  /// Throws: kInvalidArgument (names the field), kOutOfMemory; kTransport naming ranks and field if
  ///   version or configuration differ between ranks; kPeerTimeout naming the missing ranks.
  [[nodiscard]] static LayerGroup create(const LayerGroupConfig& config, Transport& transport,
                                         Backend& backend);

  LayerGroup(LayerGroup&&) noexcept;
  LayerGroup& operator=(LayerGroup&&) noexcept;
  ~LayerGroup();

  /// Resolves the recipes, lets the ranks compare notes, repacks the experts for the backend, and
  /// makes what this layer is the first to need: exchanges for its modes and wire formats, rows for
  /// recipes that quantize at the receiver.
  /// Stream: allocates, which waits for the device; so no rank may have calls of this group queued.
  /// Throws: kInvalidArgument (weights that do not fit the group, a recipe for a mode that it does
  ///   not have), whatever resolve_recipe() and Exchange::create() throw; kTransport naming ranks
  ///   and field if version, layer, identity, recipes or static scales differ between ranks. After
  ///   one of these on every rank the group is as it was. After kPeerTimeout, kOutOfMemory or an
  ///   error on some ranks only, ranks may be out of step: make a new group.
  [[nodiscard]] Layer add_layer(const LayerSpec& spec, const ModeRecipes& recipes = {});

  /// The same of this rank's experts of a layer of `checkpoint`, which several threads read, repack
  /// and copy at once (loading.h). `checkpoint` is not needed afterwards.
  /// Throws: also whatever Checkpoint::load_experts() and options.progress throw, on the rank where
  ///   it happens; kTransport naming that rank on all others. The group is then as it was.
  [[nodiscard]] Layer add_layer(const Checkpoint& checkpoint, int layer,
                                const ModeRecipes& recipes = {}, const LoadOptions& options = {});
  /// Several layers in one load, whose threads go from one layer straight to the next: all or none.
  [[nodiscard]] std::vector<Layer> add_layers(const Checkpoint& checkpoint,
                                              std::span<const int> layers,
                                              const ModeRecipes& recipes = {},
                                              const LoadOptions& options = {});
  /// Of all layers so far that came from a checkpoint, on this rank.
  [[nodiscard]] const LoadStats& load_stats() const noexcept;

  [[nodiscard]] const LayerGroupConfig& config() const noexcept;
  [[nodiscard]] int rank() const noexcept;
  [[nodiscard]] int num_ranks() const noexcept;
  /// Of the group and the layers that are alive, counted from the buffers there are: what
  /// plan_memory() named.
  [[nodiscard]] LayerGroupMemory memory() const noexcept;
  /// Throws what earlier calls found on the device: Exchange::check() of every exchange.
  void check();

  struct Impl;  ///< Internal.

 private:
  explicit LayerGroup(std::shared_ptr<Impl> impl) noexcept;
  std::shared_ptr<Impl> impl_;
};

}  // namespace sluice
