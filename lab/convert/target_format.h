// target_format.h - the layouts that can be written: tensors, bytes and quantization_config.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/formats/format.h"
#include "checkpoint/safetensors.h"
#include "sluice/checkpoint.h"

namespace sluice {

/// What a result is made of.
struct TargetSpec {
  ModelGeometry geometry;  ///< With the result's group size and weight format.
  DType scale_dtype = DType::kFloat32;
  bool has_input_scales = false;
  /// compressed-tensors: false = no activation scheme at all, as in Kimi-K2's INT4.
  bool has_activation_scheme = true;
  /// deepseek-fp4: blocks of the rest of the model, which is FP8. Empty if it is not.
  std::vector<std::int64_t> rest_blocks = {};
};

class TargetFormat {
 public:
  virtual ~TargetFormat() = default;
  [[nodiscard]] virtual std::string_view name() const noexcept = 0;
  /// Throws: kUnsupported for what this layout cannot represent, naming `source`.
  virtual void check(const TargetSpec& spec, const std::string& source) const = 0;
  /// Tensors of one expert, in the order of their bytes; names without the expert's prefix.
  [[nodiscard]] virtual std::vector<SafetensorsEntry> tensors(const TargetSpec& spec) const = 0;
  /// Bytes of tensors()[index] of one expert. `scales` holds the matrix's in spec.scale_dtype.
  [[nodiscard]] virtual std::vector<std::byte> bytes(std::size_t index, const TargetSpec& spec,
                                                     const Expert& expert,
                                                     const InputScales& inputs) const = 0;
  [[nodiscard]] virtual nlohmann::ordered_json quantization_config(
      const TargetSpec& spec) const = 0;
  /// True if tensors() are parts of one tensor [E, ..] for all experts of a layer.
  [[nodiscard]] virtual bool is_fused() const noexcept { return false; }
  /// config.json's expert_dtype; empty: no such key.
  [[nodiscard]] virtual std::string expert_type() const { return {}; }
};

/// Throws: kInvalidArgument listing the names.
[[nodiscard]] std::unique_ptr<const TargetFormat> make_target_format(const std::string& name);

}  // namespace sluice
