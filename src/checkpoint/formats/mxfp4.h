// mxfp4.h - layouts of MXFP4 that differ in the names and types of their tensors alone.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "checkpoint/formats/format.h"

namespace sluice {

/// Codes [N, K / 2] with even k in the low nibble, and e8m0 scales [N, K / 32].
struct Mxfp4Layout {
  std::string_view format;                    ///< Format::name()
  std::string_view codes, scales;             ///< "weight_packed", "weight_scale"
  std::vector<std::string_view> code_dtypes;  ///< Of two codes in a byte.
  std::vector<std::string_view> scale_dtypes;
  std::string_view bias = {};  ///< "bias", of experts that have one.
};

[[nodiscard]] std::unique_ptr<const Format> make_mxfp4_format(Mxfp4Layout layout);

}  // namespace sluice
