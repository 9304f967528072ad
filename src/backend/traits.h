// traits.h - what is known of a kind of backend before there is one: for plans, limits and bounds.
//
// Each backend's folder defines its own, in plain C++ that every build compiles: a machine without
// a GPU plans for one, and judges numbers that one has made.
#pragma once

#include <cstddef>

#include "sluice/backend.h"
#include "sluice/error.h"
#include "sluice/repack.h"
#include "sluice/tensor.h"

namespace sluice {

struct BackendTraits {
  /// Host code may read and write its memory. The exchange for host memory then works on it as it
  /// is, and row counts are checked before work is queued.
  bool has_host_memory = false;
  /// Its GEMMs add QuantMatrix::bias.
  bool adds_bias = false;
  /// Dispatched::expert_y() is memory of the exchange, so a layer group reserves none of its own.
  bool exchange_keeps_expert_y = false;
  /// ExchangeConfig::num_in_flight where one dispatch is in flight.
  int engine_slots = 1;
  /// Codes that a thread of a load reads, and hands on, together.
  std::size_t load_piece_bytes = std::size_t{1} << 20;
  /// What its GEMMs may add to a layer's error; docs/design.md#arithmetic derives it.
  ErrorModel error;
  /// How far a layer's output may be from the evaluator's: docs/accuracy.md#engines.
  double engine_limit = 0;
  /// Of an expert that is not there yet. Tests hold it against PreparedExperts::bytes().
  PackedSizes (*packed_sizes)(const ModelGeometry& geometry, DType scale_dtype) = nullptr;
  [[nodiscard]] std::size_t prepared_bytes(const ModelGeometry& geometry, int num_experts,
                                           DType scale_dtype) const {
    const PackedSizes sizes = packed_sizes(geometry, scale_dtype);
    return static_cast<std::size_t>(num_experts) * (sizes.gate_up_bytes + sizes.down_bytes);
  }
};

/// Throws: kInvalidArgument for a kind without a backend.
[[nodiscard]] const BackendTraits& traits_of(Device::Kind kind);

[[noreturn]] inline void refuse_bias() {
  throw Error(ErrorCode::kUnsupported,
              "experts with biases (gate_up_proj_bias and down_proj_bias of gpt-oss, or "
              "gate_proj.bias) run on the CPU, from a checkpoint or from host memory, and nowhere "
              "else");
}
/// That a backend of this kind adds biases, if the experts have them.   Throws: kUnsupported.
inline void check_bias(const ModelGeometry& geometry, Device::Kind device) {
  if (geometry.has_bias && !traits_of(device).adds_bias) refuse_bias();
}

}  // namespace sluice
