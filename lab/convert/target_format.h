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
  ModelGeometry geometry;  ///< With the result's group size.
  DType scale_dtype = DType::kFloat32;
  bool has_input_scales = false;
  /// compressed-tensors: false = no activation scheme at all, as in Kimi-K2's INT4.
  bool has_activation_scheme = true;
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
};

/// Throws: kInvalidArgument listing the names.
[[nodiscard]] std::unique_ptr<const TargetFormat> make_target_format(const std::string& name);

}  // namespace sluice
