// mxfp4.h - what layouts of MXFP4 have in common, and those that differ in the names and types of
// their tensors alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/formats/format.h"

namespace sluice {

inline constexpr int kMxfp4Group = 32;

/// e2m1 codes and an e8m0 scale for each 32, which are canonical as they lie in the file, or as its
/// rows (rows()). A layout adds the names and shapes of its tensors.
class Mxfp4Format : public Format {
 public:
  [[nodiscard]] std::optional<WeightFormat> weight_format() const noexcept override {
    return WeightFormat::kMxfp4;
  }
  [[nodiscard]] int group_size() const noexcept override { return kMxfp4Group; }
  [[nodiscard]] std::string input_scale_part(const MatrixLayout&) const override { return {}; }
  [[nodiscard]] DType scale_dtype(const ExpertTensors&, const MatrixLayout&) const override {
    return DType::kFloat8E8M0;
  }
  [[nodiscard]] std::size_t copied_bytes(const MatrixLayout& matrix) const override;
  [[nodiscard]] TensorView scales(const ExpertTensors& expert, const MatrixLayout& matrix,
                                  ExpertStorage& storage) const override;
  [[nodiscard]] QuantMatrix load(const ExpertTensors& expert, const MatrixLayout& matrix,
                                 ExpertStorage& storage) const override;

 protected:
  /// The tensor bias_part(), of `rows` numbers.
  [[nodiscard]] PartSpec bias_spec(const MatrixLayout& matrix, std::uint64_t rows) const;

 private:
  /// Rows of bytes that are the matrix's, one after the other.
  [[nodiscard]] TensorView own_rows(const TensorView& all, const MatrixLayout& matrix,
                                    ExpertStorage& storage) const;
};

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
