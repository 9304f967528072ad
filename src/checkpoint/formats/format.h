// format.h - a published layout of routed experts: how it is recognised, which tensors an expert
// has, and how they become canonical ones.
//
//   config.json, tensor names, dtypes --recognise()--> Format
//   tensors of one matrix             --load()-------> codes [N, K / 2], scales [N, K / group]
//                                     --load_floats()> [N, K] float32, for formats without codes
//
// One file per format in this folder. docs/checkpoint-formats.md describes the bytes.
// Threads: formats are constant after recognise().
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/expert_storage.h"
#include "checkpoint/formats/quantization_config.h"
#include "checkpoint/tensor_index.h"
#include "sluice/checkpoint.h"

namespace sluice {

/// One of the three matrices of an expert, with its sizes.
struct MatrixLayout {
  enum class Role { kGate, kUp, kDown };
  Role role = Role::kGate;
  std::int64_t n = 0, k = 0;                ///< The model's own.
  std::int64_t padded_n = n, padded_k = k;  ///< Of the canonical matrix.
  [[nodiscard]] bool is_padded() const noexcept { return padded_n != n || padded_k != k; }

  /// "gate_proj", "up_proj", "down_proj"
  [[nodiscard]] std::string_view stem() const noexcept;
  /// "gate_proj.weight_scale" for "weight_scale"
  [[nodiscard]] std::string part(std::string_view what) const;
};

/// gate, up, down.
[[nodiscard]] std::array<MatrixLayout, 3> matrix_layouts(const ModelGeometry& geometry);

/// One tensor that a matrix has, or may have.
struct PartSpec {
  std::string name;  ///< MatrixLayout::part()
  std::vector<std::string_view> dtypes;
  std::vector<std::uint64_t> shape;  ///< Empty: one number, of shape [] or [1].
  bool is_optional = false;
  bool changes_weights = false;  ///< If it is optional: all experts of a layer have it, or none.
};

/// Row i of a matrix is row `first + i * step` of a tensor.
struct RowStep {
  std::int64_t first = 0, step = 1;
};

class Format {
 public:
  virtual ~Format() = default;

  /// As Checkpoint::format() gives it.
  [[nodiscard]] virtual std::string_view name() const noexcept = 0;
  /// Empty: the experts are floats, for `sluice convert` to quantize.
  [[nodiscard]] virtual std::optional<WeightFormat> weight_format() const noexcept {
    return WeightFormat::kInt4;
  }
  /// Weights per scale along K. Of floats: what they are quantized with unless asked otherwise.
  [[nodiscard]] virtual int group_size() const noexcept { return 128; }
  /// True if every matrix has a bias.
  [[nodiscard]] virtual bool has_bias() const noexcept { return false; }
  /// True if -8 is an ordinary value: scales of amax / 8 or amax / 7.5.
  [[nodiscard]] virtual bool makes_minus_eight() const noexcept { return true; }

  /// Tensors of one matrix, apart from its input scale.
  [[nodiscard]] virtual std::vector<PartSpec> parts(const MatrixLayout& matrix) const = 0;
  /// Name of the static scale of the matrix's input; empty if the format has none.
  [[nodiscard]] virtual std::string input_scale_part(const MatrixLayout& matrix) const;
  /// Name of the tensor with the weights' group scales; empty for floats.
  [[nodiscard]] virtual std::string scale_part(const MatrixLayout& matrix) const;
  /// Of the scales that load() gives: float32, bfloat16 or e8m0.
  [[nodiscard]] virtual DType scale_dtype(const ExpertTensors& expert,
                                          const MatrixLayout& matrix) const;
  /// Most bytes that scales() copies.
  [[nodiscard]] virtual std::size_t copied_bytes(const MatrixLayout& matrix) const;
  /// Name of the tensor with the weights' codes; empty for floats. Rows [first, first + count) of
  /// the matrix, both even, are bytes [first * k / 2, (first + count) * k / 2) of it, unless rows()
  /// says more.
  [[nodiscard]] virtual std::string codes_part(const MatrixLayout& matrix) const;
  /// Rows of codes_part() that are the matrix's.
  [[nodiscard]] virtual RowStep rows(const MatrixLayout&) const { return {}; }
  /// Name of the tensor with the bias; empty if there is none.
  [[nodiscard]] virtual std::string bias_part(const MatrixLayout&) const { return {}; }
  /// [n], or empty.   Throws: kCorruptFile for a number that is not finite.
  [[nodiscard]] virtual std::vector<float> bias(const ExpertTensors& expert,
                                                const MatrixLayout& matrix) const;
  /// Makes such rows canonical where they lie. `spare` is as large, and left in any state.
  virtual void make_canonical(std::span<std::byte> rows, const MatrixLayout& matrix,
                              std::span<std::byte> spare) const;
  /// The scales of load(), and everything that load() checks beside the codes.
  [[nodiscard]] virtual TensorView scales(const ExpertTensors& expert, const MatrixLayout& matrix,
                                          ExpertStorage& storage) const;
  /// Why a tensor that is none of the above makes a layer unsupported.
  [[nodiscard]] virtual std::string refusal(const ExpertTensors::Part& part) const;
  /// Things about one matrix that the headers cannot show and that cost a few bytes to read. Called
  /// for matrices that are loaded, and for all of a layer whose input scales are asked for.
  virtual void check_values(const ExpertTensors& expert, const MatrixLayout& matrix) const;

  /// The static scale of the matrix's input, amax / 448. Requires: the part exists.
  [[nodiscard]] virtual float input_scale(const ExpertTensors& expert,
                                          const MatrixLayout& matrix) const;

  /// Requires: checked headers. Throws: kCorruptFile, kUnsupported, naming file and tensor.
  /// Views point into the mapped files or into `storage`.
  [[nodiscard]] virtual QuantMatrix load(const ExpertTensors& expert, const MatrixLayout& matrix,
                                         ExpertStorage& storage) const;
  /// Factors of the input's channels, [k], which load() cannot fold into codes and scales exactly
  /// and therefore refuses; empty where it does not.
  [[nodiscard]] virtual std::vector<float> input_factors(const ExpertTensors& expert,
                                                         const MatrixLayout& matrix) const;
  /// Why input_factors() cannot be folded, naming file and tensor; empty if there are none.
  [[nodiscard]] virtual std::string inexact(const ExpertTensors& expert,
                                            const MatrixLayout& matrix) const;
  /// As load(), but for input_factors(), which are left to the caller.
  [[nodiscard]] virtual QuantMatrix load_unscaled(const ExpertTensors& expert,
                                                  const MatrixLayout& matrix,
                                                  ExpertStorage& storage) const;
  /// Of formats of floats: [n, k] weights, exactly as the checkpoint defines them, in float32.
  virtual void load_floats(const ExpertTensors& expert, const MatrixLayout& matrix,
                           std::span<float> out) const;
};

/// A format, and why we think so.
struct Recognised {
  std::unique_ptr<const Format> format;
  std::string evidence;                      ///< "config.json: quant_method = 'w4afp8'"
  const QuantizationGroup* group = nullptr;  ///< The experts' of config_groups, where one is known.
  std::vector<std::string> unknown_keys = {};  ///< quantization_keys.h
};

/// What the formats' recognisers may look at.
struct FormatClues {
  const QuantizationConfig& config;
  const TensorIndex& index;  ///< With at least one layer.
  const ModelGeometry& geometry;

  /// The first tensor called "gate_proj.WHAT" of any expert of the first layer; null if there is
  /// none.
  [[nodiscard]] const TensorRef* first_gate(std::string_view what) const noexcept;
};

/// Throws: kUnsupported naming the file, the field and what is supported.
[[nodiscard]] Recognised recognise(const FormatClues& clues);

/// What would help with a container that is known by this name and not read; empty for others.
[[nodiscard]] std::string container_help(const std::string& name);

/// Each is empty if the checkpoint is not of this family, and throws if it is but cannot be read.
[[nodiscard]] std::optional<Recognised> recognise_w4afp8(const FormatClues& clues);
[[nodiscard]] std::optional<Recognised> recognise_compressed_tensors(const FormatClues& clues);
[[nodiscard]] std::optional<Recognised> recognise_angelslim(const FormatClues& clues);
[[nodiscard]] std::optional<Recognised> recognise_modelopt(const FormatClues& clues);
[[nodiscard]] std::optional<Recognised> recognise_deepseek_fp4(const FormatClues& clues);
[[nodiscard]] std::optional<Recognised> recognise_gpt_oss(const FormatClues& clues);
[[nodiscard]] std::optional<Recognised> recognise_fp8_block(const FormatClues& clues);
[[nodiscard]] std::optional<Recognised> recognise_bf16(const FormatClues& clues);

}  // namespace sluice
