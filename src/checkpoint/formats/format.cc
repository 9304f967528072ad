#include "checkpoint/formats/format.h"

#include <utility>

#include "checkpoint/formats/part_readers.h"
#include "core/fail.h"

namespace sluice {

std::string_view MatrixLayout::stem() const noexcept {
  return role == Role::kGate ? "gate_proj" : role == Role::kUp ? "up_proj" : "down_proj";
}

std::string MatrixLayout::part(std::string_view what) const {
  return fmt::format("{}.{}", stem(), what);
}

std::array<MatrixLayout, 3> matrix_layouts(const ModelGeometry& g) {
  using Role = MatrixLayout::Role;
  return {MatrixLayout{.role = Role::kGate, .n = g.intermediate, .k = g.hidden},
          MatrixLayout{.role = Role::kUp, .n = g.intermediate, .k = g.hidden},
          MatrixLayout{.role = Role::kDown, .n = g.hidden, .k = g.intermediate}};
}

std::string Format::input_scale_part(const MatrixLayout& matrix) const {
  return matrix.part("input_scale");
}

std::string Format::refusal(std::string_view) const {
  return fmt::format("is not part of {}; ignoring it could change results", name());
}

void Format::check_values(const ExpertTensors&, const MatrixLayout&) const {}

float Format::input_scale(const ExpertTensors& expert, const MatrixLayout& matrix) const {
  return read_positive(part_of(expert, input_scale_part(matrix)), "input scale");
}

QuantMatrix Format::load(const ExpertTensors&, const MatrixLayout&, ExpertStorage&) const {
  fail(ErrorCode::kInternal, "{} has no int4 weights", name());
}

std::vector<float> Format::input_factors(const ExpertTensors&, const MatrixLayout&) const {
  return {};
}

std::string Format::inexact(const ExpertTensors&, const MatrixLayout&) const {
  return {};
}

QuantMatrix Format::load_unscaled(const ExpertTensors& expert, const MatrixLayout& matrix,
                                  ExpertStorage& storage) const {
  return load(expert, matrix, storage);
}

void Format::load_floats(const ExpertTensors&, const MatrixLayout&, std::span<float>) const {
  fail(ErrorCode::kInternal, "{} has int4 weights", name());
}

const TensorRef* FormatClues::first_gate(std::string_view what) const noexcept {
  const MatrixLayout gate{};
  for (const ExpertTensors& expert : index.layers.begin()->second.experts) {
    if (const TensorRef* const tensor = expert.find(gate.part(what))) return tensor;
  }
  return nullptr;
}

Recognised recognise(const FormatClues& clues) {
  // What the checkpoint declares decides; bf16 is what declares nothing.
  for (const auto& recogniser :
       {recognise_w4afp8, recognise_compressed_tensors, recognise_angelslim, recognise_modelopt,
        recognise_fp8_block, recognise_bf16}) {
    if (std::optional<Recognised> found = recogniser(clues)) return std::move(*found);
  }
  constexpr const char* kSupported =
      "w4afp8, compressed-tensors (pack-quantized INT4), w4a8_awq (AngelSlim), modelopt "
      "(W4A8_AWQ), "
      "fp8 (128x128 blocks), or no quantization with BF16 weights";
  const QuantizationConfig& config = clues.config;
  const std::string algo = config.algo_file.empty() ? ""
                                                    : fmt::format(" ({} says quant_algo = '{}')",
                                                                  config.algo_file, config.algo);
  if (!config.quant_method.empty()) {
    fail(ErrorCode::kUnsupported, "{}: quantization_config.quant_method = '{}'{}; supported are {}",
         config.file, config.quant_method, algo, kSupported);
  }
  if (!config.algo_file.empty()) {
    fail(ErrorCode::kUnsupported, "{}: quantization.quant_algo = '{}'; supported are {}",
         config.algo_file, config.algo, kSupported);
  }
  const TensorRef* const gate = clues.first_gate("weight");
  fail(ErrorCode::kUnsupported,
       "{}: no quantization_config.quant_method, and no quantization.quant_algo in "
       "hf_quant_config.json{}; supported are {}",
       config.file, gate ? fmt::format(", and {} is {}", gate->entry.name, gate->entry.dtype) : "",
       kSupported);
}

}  // namespace sluice
