// local_experts.h - the experts that live here, on a rank's own tokens: no exchange, no peers.
//
//   x [num_tokens, hidden]                                y [num_tokens, hidden]
//       |                                                      ^
//    one row for each top-k entry whose expert is here      sum over those entries, weighted
//       v                                                      |
//    rows, expert after expert  --GEMM1, activation, quantize, GEMM2--> rows
//
// This is the layer of one GPU, and of a stack whose ranks all hold the same tokens and add up
// their results themselves (tensor parallelism, or expert parallelism by all-reduce). It has the
// experts [first, first + count) of a layer and skips all others. One that has the whole layer
// gives the bits of an Engine over any number of ranks.
//
// LocalExperts of one LocalGroup share the memory between the stages, as the layers of a model do:
// they run one after the other.
//
// Threads: one at a time, for a group and all its LocalExperts together.
// Streams: calls of one group on different streams take turns on the device, in the order in which
// they were made; so do the streams of one graph capture. Graphs are ordered by whoever launches
// them: replay the graphs of one group one after the other. A stream outlives the calls queued on
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/exchange.h"
#include "sluice/experts.h"
#include "sluice/loading.h"
#include "sluice/recipe.h"
#include "sluice/stream.h"
#include "sluice/tensor.h"

namespace sluice {

class Backend;

/// Slice `slice` of `num_slices` of each expert, for tensor parallelism: its intermediate channels
/// [slice * n, (slice + 1) * n), where n = intermediate / num_slices. The outputs of all slices add
/// up to those of the experts; a rank's own are rounded to bf16 before they are added.
/// gate and up are views of what `experts` view; down is copied, 1 / num_slices of it.
/// Throws: kInvalidArgument if n is no multiple of 128.
[[nodiscard]] ExpertWeights slice_experts(const ExpertWeights& experts, int slice, int num_slices);

/// What the LocalExperts of a group have in common.
struct LocalGroupConfig {
  int hidden = 0;        ///< Multiple of 128.
  int intermediate = 0;  ///< Multiple of 128.
  /// Most top-k entries of one call: num_tokens * num_topk. Entries of experts elsewhere count too.
  std::int64_t max_entries = 0;
  float routed_scaling_factor = 1.0f;  ///< 1: the host model applies it.
};

/// Bytes that a group and its LocalExperts hold.
struct LocalGroupMemory {
  int num_layers = 0;
  std::size_t prepared_bytes = 0;  ///< Weights in the backend's own order, once where shared.
  /// Rows between the stages, and what reserve() left behind; two more of [max_entries, hidden]
  /// bf16 where a layer's own width is padded.
  std::size_t scratch_bytes = 0;
};

/// One call of LocalExperts with the same tensors, for callers that repeat it: its arguments are
/// checked once. On a GPU it becomes a graph when it has been repeated, so queueing it costs the
/// host one launch instead of one for each kernel. What the tensors hold is read anew each time.
///
/// Requires: the tensors' memory is there whenever it runs, and the LocalExperts outlive it.
/// Threads: as the LocalExperts.
class LocalCall {
 public:
  LocalCall(LocalCall&&) noexcept;
  LocalCall& operator=(LocalCall&&) noexcept;
  ~LocalCall();

  /// Stream: as LocalExperts::forward(). In a capture the kernels themselves are captured.
  /// Throws: as forward_batch(), where the CPU looks at the batch's counts; kCuda.
  void run(Stream stream);

  struct Impl;  ///< Internal.

 private:
  friend class LocalExperts;
  explicit LocalCall(std::unique_ptr<Impl> impl) noexcept;
  std::unique_ptr<Impl> impl_;
};

/// Some experts of one layer. Keeps the group's memory alive. Its destructor gives memory back,
/// which waits for the device.
class LocalExperts {
 public:
  /// A group of its own and, in it, these experts.   Throws: as LocalGroup.
  [[nodiscard]] static LocalExperts create(const LocalGroupConfig& config,
                                           const ExpertWeights& weights, Backend& backend,
                                           const Recipe& recipe = {});

  LocalExperts(LocalExperts&&) noexcept;
  LocalExperts& operator=(LocalExperts&&) noexcept;
  ~LocalExperts();

  /// y[t] = bf16(routed_scaling_factor * sum_k topk_weights[t, k] * expert(topk_idx[t, k], x[t]))
  /// over the entries whose expert is one of these. An entry with any other number is skipped: that
  /// of an expert elsewhere, -1, or a caller's sentinel such as num_experts. The sum is float32, in
  /// order of k, and rounded once; a token without an expert here gives a row of zeros.
  ///
  /// x:       [num_tokens, hidden] bf16; 0 tokens are fine. Each token is quantized once, by the
  ///          casts of the recipe. Or e4m3 in the recipe's wire format, as a dispatch brings it.
  /// x_scale: [num_tokens, hidden / 128] float32 where x is e4m3 with group scales, [num_tokens, 1]
  ///          where it is e4m3 with a scale per token; else empty.
  /// routing: topk_idx [num_tokens, num_topk] int32 or int64, topk_weights the same in float32;
  ///          num_topk is 1 .. 32. An expert may occur twice in a token.
  /// y:       [num_tokens, hidden] bf16; may be x. Where the model's own width is no multiple of
  ///          128, bf16 x and y may have that one instead, as Layer::forward() does.
  /// Stream:  asynchronous on CUDA, without allocation or host synchronization. May be captured in
  ///          a graph once a call has run.
  /// Throws:  kInvalidArgument naming the tensor or the number of entries.
  void forward(TensorView x, const Routing& routing, MutableTensorView y, Stream stream,
               TensorView x_scale = {});

  /// expert_y[row] = expert(batch.x[row]) for every valid row, rounded as the recipe says and not
  /// weighted: Experts::forward() in the memory that the group's calls share.
  ///
  /// batch, expert_y: as Experts::forward(); at most max_batch_rows() rows, padding included.
  /// Stream, Throws:  as forward().
  void forward_batch(const ExpertBatch& batch, MutableTensorView expert_y, Stream stream);
  /// forward() and forward_batch() with these tensors, to be run later; nothing is queued here.
  /// Room that is reserved afterwards is not used by them: they stay valid.
  /// Throws: as forward().
  [[nodiscard]] LocalCall keep(TensorView x, const Routing& routing, MutableTensorView y,
                               TensorView x_scale = {});
  [[nodiscard]] LocalCall keep_batch(const ExpertBatch& batch, MutableTensorView expert_y);
  /// Makes room for batches of `max_rows` rows of this recipe, for all layers of the group. What
  /// was there before stays for graphs, as after LocalGroup::reserve().
  /// Stream: allocates, which waits for the device; not during a capture.
  /// Throws: kInvalidArgument, kOutOfMemory.
  void reserve_batch(std::int64_t max_rows);
  /// 0 until some room is reserved.
  [[nodiscard]] std::int64_t max_batch_rows() const noexcept;

  [[nodiscard]] const std::string& name() const noexcept;
  [[nodiscard]] const LayerRecipe& recipe() const noexcept;
  [[nodiscard]] int first_expert() const noexcept;
  [[nodiscard]] int num_experts() const noexcept;
  /// Bytes of prepared weights.
  [[nodiscard]] std::size_t weight_bytes() const noexcept;
  /// Of all bytes of the prepared weights: the same for the same weights on one kind of backend.
  [[nodiscard]] std::uint64_t weight_digest() const;

  struct Impl;  ///< Internal.

 private:
  friend class LocalGroup;
  explicit LocalExperts(std::unique_ptr<Impl> impl) noexcept;
  std::unique_ptr<Impl> impl_;
};

/// What LocalExperts share. They keep it alive: a LocalGroup may go before them.
class LocalGroup {
 public:
  /// The scratch of a group on a device of any kind.   Throws: as create().
  [[nodiscard]] static std::size_t scratch_bytes(const LocalGroupConfig& config);

  /// Borrows `backend` until the last LocalExperts is gone.
  /// Throws: kInvalidArgument (names the field), kOutOfMemory.
  [[nodiscard]] static LocalGroup create(const LocalGroupConfig& config, Backend& backend);

  LocalGroup(LocalGroup&&) noexcept;
  LocalGroup& operator=(LocalGroup&&) noexcept;
  ~LocalGroup();

  /// Repacks experts [weights.first_expert, ..) for the backend; `weights` are not needed
  /// afterwards. `name` is for messages; empty: by weights.layer. No rows are dispatched here, so
  /// SLUICE_DISPATCH_DTYPE has nothing to choose.
  /// Stream: allocates, which waits for the device.
  /// Throws: kInvalidArgument for weights that do not fit the group, kOutOfMemory, whatever
  ///   resolve_recipe() throws.
  [[nodiscard]] LocalExperts add_layer(const ExpertWeights& weights, const Recipe& recipe = {},
                                       std::string name = {});
  /// Experts [first, first + count) of each of `layers` of `checkpoint`, which several threads
  /// read, repack and copy at once (loading.h): all or none.
  /// Throws: also whatever Checkpoint::load_experts() and options.progress throw.
  [[nodiscard]] std::vector<LocalExperts> add_layers(const Checkpoint& checkpoint,
                                                     std::span<const int> layers, int first,
                                                     int count, const Recipe& recipe = {},
                                                     const LoadOptions& options = {});
  /// Of all experts so far that came from a checkpoint.
  [[nodiscard]] const LoadStats& load_stats() const noexcept;
  /// The same of experts that are repacked already; shares their weights.
  /// Requires: `experts` were made with this group's backend, and run no call at the same time.
  [[nodiscard]] LocalExperts add_layer(const Experts& experts, const LayerRecipe& recipe,
                                       int first_expert = 0, std::string name = {});

  /// Makes room for more entries: afterwards config().max_entries is at least `max_entries`. Memory
  /// that calls used before stays as it is until the group is gone, since a graph that was captured
  /// may still use it: a caller who grows by doubling holds twice the memory at most.
  /// Stream: allocates, which waits for the device; not during a capture.   Throws: as create().
  void reserve(std::int64_t max_entries);

  [[nodiscard]] const LocalGroupConfig& config() const noexcept;
  [[nodiscard]] LocalGroupMemory memory() const noexcept;

  struct Impl;  ///< Internal.

 private:
  explicit LocalGroup(std::shared_ptr<Impl> impl) noexcept;
  std::shared_ptr<Impl> impl_;
};

}  // namespace sluice
