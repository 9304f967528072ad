// engine.h - one MoE layer of a checkpoint, ready to run under expert parallelism.
//
//   x --dispatch--> rows --quantize?--> GEMM1, SwiGLU, quantize --> GEMM2 --combine--> y
//
// Threads: one at a time. Ranks: create() and forward() are collective.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "sluice/exchange.h"
#include "sluice/recipe.h"
#include "sluice/stream.h"
#include "sluice/tensor.h"

namespace sluice {

class Backend;
class Checkpoint;
struct ModelGeometry;
class Transport;

struct EngineConfig {
  int layer = 0;
  /// Recipe of each mode; a mode without one cannot be called. Two layers of one model may differ.
  std::optional<Recipe> low_latency = Recipe{};         ///< direct
  std::optional<Recipe> normal = Recipe{};              ///< direct
  DispatchDtype dispatch_dtype = DispatchDtype::kAuto;  ///< See Environment.
  int max_tokens_per_rank = 0;
  int max_m = 0;                       ///< ExchangeConfig::max_m.
  float routed_scaling_factor = 1.0f;  ///< 1: the host model applies it.
  std::chrono::milliseconds peer_timeout{10'000};
};

/// Wall time of the stages of one forward(), microseconds. Where GEMM1 and activation are one fused
/// kernel, the time is split by what each of its threads measured (CPU) or reported as GEMM1
/// (CUDA).
struct StageTimes {
  double dispatch_us = 0, quantize_us = 0, gemm1_us = 0, activation_us = 0, gemm2_us = 0,
         combine_us = 0, total_us = 0;
};

/// What one forward() did on this rank.
struct ForwardStats {
  StageTimes times;
  std::vector<std::int64_t> rows_per_expert;  ///< [num_local_experts]
  std::uint64_t weight_bytes_read = 0;        ///< Codes and scales of experts that had rows.
  std::uint64_t flops = 0;                    ///< 2 * rows * 3 * hidden * intermediate.
};

/// Bytes that an engine holds on one rank.
struct EngineMemory {
  std::size_t codes_bytes = 0;     ///< INT4 codes of the rank's experts, as in the checkpoint.
  std::size_t scales_bytes = 0;    ///< Their group scales.
  std::size_t prepared_bytes = 0;  ///< Both, in the backend's own order: what stays resident.
  std::size_t exchange_bytes = 0;  ///< Buffers of the exchanges of all its modes.
  std::size_t scratch_bytes = 0;   ///< Rows between the stages.
  [[nodiscard]] std::size_t total_bytes() const noexcept {
    return prepared_bytes + exchange_bytes + scratch_bytes;
  }
};

class Engine {
 public:
  /// What create() will take on each of `num_ranks` ranks, for experts of `geometry` with scales of
  /// `scale_dtype`. Needs neither checkpoint nor device.   Throws: as create().
  [[nodiscard]] static EngineMemory plan_memory(const EngineConfig& config,
                                                const ModelGeometry& geometry, DType scale_dtype,
                                                Device::Kind device, int num_ranks);

  /// Resolves the recipes, reads this rank's experts, prepares them for `backend` and creates the
  /// exchanges. Borrows `transport` and `backend`; `checkpoint` is not needed afterwards.
  /// Throws: whatever resolve_recipe(), Checkpoint and Exchange throw; kTransport naming ranks and
  ///   field if version, configuration, recipes or checkpoint differ between ranks.
  [[nodiscard]] static Engine create(const EngineConfig& config, const Checkpoint& checkpoint,
                                     Transport& transport, Backend& backend);

  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  ~Engine();

  /// The whole layer: y = combine(experts(dispatch(x))).
  /// x, y: [num_tokens, hidden] bf16.   Throws: as Exchange; kInvalidArgument for a mode without
  /// recipe.
  void forward(Mode mode, TensorView x, const Routing& routing, MutableTensorView y, Stream stream);

  /// Throws what earlier calls found on the device: Exchange::check() of every mode.
  void check();

  [[nodiscard]] const LayerRecipe& recipe(Mode mode) const;
  /// When on, forward() waits for the device after each stage to time it, and fills stats(). Off at
  /// creation: forward() then only queues work and may be captured in a CUDA graph.
  void record_stats(bool on) noexcept;
  /// Of the last forward() with record_stats(true).
  [[nodiscard]] const ForwardStats& stats() const noexcept;
  [[nodiscard]] ExchangeCounters exchange_counters(Mode mode) const;
  /// Bytes of prepared weights held by this rank's backend.
  [[nodiscard]] std::size_t weight_bytes() const noexcept;
  /// What create() took on this rank, counted from the buffers there are: plan_memory() named it.
  [[nodiscard]] EngineMemory memory() const noexcept;

  /// When on, forward() also computes a digest of the bytes GEMM1 consumes (codes and scales of
  /// every valid row, in order of expert and row). `direct` and `direct-bf16` give the same digest.
  void record_gemm_input_digest(bool on) noexcept;
  [[nodiscard]] std::uint64_t gemm_input_digest() const noexcept;

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl) noexcept;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice
