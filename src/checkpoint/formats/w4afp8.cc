// W4AFP8: I8 [N, K / 2], two's complement nibbles, even k low; F32 or BF16 scales [N, K / 128];
// input scales under other stems (w1, w3, w2). docs/checkpoint-formats.md#w4afp8 has the sources.
#include "checkpoint/formats/format.h"
#include "checkpoint/formats/nibbles.h"
#include "checkpoint/formats/part_readers.h"
#include "core/fail.h"

namespace sluice {
namespace {

constexpr int kGroup = 128;

class W4afp8Format final : public Format {
 public:
  W4afp8Format(bool has_offset, bool has_own_inputs)
      : has_offset_(has_offset), has_own_inputs_(has_own_inputs) {}

  [[nodiscard]] std::string_view name() const noexcept override { return "w4afp8"; }
  [[nodiscard]] bool makes_minus_eight() const noexcept override { return false; }

  [[nodiscard]] std::vector<PartSpec> parts(const MatrixLayout& matrix) const override {
    const auto n = static_cast<std::uint64_t>(matrix.n), k = static_cast<std::uint64_t>(matrix.k);
    return {{.name = matrix.part("weight"), .dtypes = {"I8", "U8"}, .shape = {n, k / 2}},
            {.name = matrix.part("weight_scale_inv"),
             .dtypes = {"F32", "BF16", "F16"},
             .shape = {n, k / kGroup}}};
  }

  [[nodiscard]] std::string input_scale_part(const MatrixLayout& matrix) const override {
    if (has_own_inputs_) return matrix.part("input_scale");
    using Role = MatrixLayout::Role;
    return matrix.role == Role::kGate ? "w1.input_scale"
           : matrix.role == Role::kUp ? "w3.input_scale"
                                      : "w2.input_scale";
  }

  [[nodiscard]] std::string scale_part(const MatrixLayout& matrix) const override {
    return matrix.part("weight_scale_inv");
  }

  [[nodiscard]] std::string codes_part(const MatrixLayout& matrix) const override {
    return matrix.part("weight");
  }
  void make_canonical(std::span<std::byte> rows, const MatrixLayout&,
                      std::span<std::byte>) const override {
    if (has_offset_) flip_high_bits(rows, rows.data());
  }

  [[nodiscard]] std::string refusal(const ExpertTensors::Part& extra) const override {
    if (!is_input_scale(extra.name)) return Format::refusal(extra);
    return fmt::format(
        "is an input scale that is not called {}, as this checkpoint has them; all are called w1, "
        "w3, w2.input_scale, or all gate_proj, up_proj, down_proj.input_scale",
        input_scale_part({.role = role_of(extra.name)}));
  }

  [[nodiscard]] QuantMatrix load(const ExpertTensors& expert, const MatrixLayout& matrix,
                                 ExpertStorage& storage) const override {
    const TensorRef& weight = part_of(expert, matrix.part("weight"));
    return {.codes = has_offset_ ? load_offset_codes(weight, matrix, storage)
                                 : view_codes(weight, matrix, storage),
            .scales = scales(expert, matrix, storage),
            .group_size = kGroup};
  }

 private:
  /// Of an input scale under either kind of stem.
  static MatrixLayout::Role role_of(std::string_view part) noexcept {
    using Role = MatrixLayout::Role;
    return part.starts_with("w1.") || part.starts_with("gate") ? Role::kGate
           : part.starts_with("w3.") || part.starts_with("up") ? Role::kUp
                                                               : Role::kDown;
  }

  bool has_offset_;  // U8 codes of q + 8, which the format's definition does not foresee.
  /// Input scales have the weights' stem. Published files have w1 beside gate_proj.
  bool has_own_inputs_;
};

}  // namespace

std::optional<Recognised> recognise_w4afp8(const FormatClues& clues) {
  const QuantizationConfig& config = clues.config;
  const bool by_method = config.quant_method == "w4afp8";
  const bool by_algo = config.quant_method.empty() && config.algo == "MIXED_PRECISION";
  if (!by_method && !by_algo) return std::nullopt;
  if (by_method && !config.algo.empty() && config.algo != "MIXED_PRECISION") {
    fail(ErrorCode::kUnsupported,
         "{}: quantization_config.quant_method = 'w4afp8', but {} has quant_algo = '{}'; w4afp8 "
         "goes with 'MIXED_PRECISION'",
         config.file, config.algo_file, config.algo);
  }
  if (config.group_size && *config.group_size != kGroup) {
    fail(ErrorCode::kUnsupported, "{}: quantization_config.group_size = {}; w4afp8 has {}",
         config.file, *config.group_size, kGroup);
  }
  if (config.algo_group_size && *config.algo_group_size != kGroup) {
    fail(ErrorCode::kUnsupported, "{}: quantization.group_size = {}; w4afp8 has {}",
         config.algo_file, *config.algo_group_size, kGroup);
  }
  std::string evidence = by_method
                             ? fmt::format("config.json: quant_method = '{}'", config.quant_method)
                             : fmt::format("hf_quant_config.json: quant_algo = '{}'", config.algo);
  // The format is defined with signed bytes. Unsigned ones may hold either kind of nibble.
  bool has_offset = false;
  const TensorRef* const gate = clues.first_gate("weight");
  if (gate && gate->entry.dtype == "U8") {
    gate->file->check_is_whole();
    const NibbleEvidence nibbles = nibble_evidence(gate->bytes());
    if (nibbles.verdict == NibbleEvidence::Verdict::kNone) {
      fail(ErrorCode::kUnsupported,
           "{}: dtype U8 does not say whether nibbles are signed or have an offset of 8, and "
           "neither do they: {}",
           place(*gate), nibbles.text());
    }
    has_offset = nibbles.verdict == NibbleEvidence::Verdict::kOffset;
    evidence += "; U8 nibbles: " + nibbles.text();
  }
  return Recognised{
      .format = std::make_unique<W4afp8Format>(has_offset, clues.first_gate("input_scale")),
      .evidence = std::move(evidence)};
}

}  // namespace sluice
