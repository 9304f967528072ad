// ModelOpt W4A8_AWQ: U8 [N / 2, K], packed along N (even n in the low nibble, two's complement),
// weight_scale [N, K / group], weight_scale_2 and input_scale one number each, and pre_quant_scale
// [K], which multiplies the input. Sources: docs/checkpoint-formats.md#modelopt-w4a8_awq.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "checkpoint/formats/format.h"
#include "checkpoint/formats/part_readers.h"
#include "checkpoint/formats/second_scale.h"
#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

float element(const TensorRef& tensor, std::int64_t i) {
  const std::byte* const data = tensor.bytes().data();
  if (tensor.entry.dtype == "F32") {
    float value;
    std::memcpy(&value, data + 4 * i, sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, data + 2 * i, sizeof bits);
  return tensor.entry.dtype == "F16" ? f16_to_float(bits) : bf16_to_float(bits);
}

bool is_pow2(float x) {
  int exponent = 0;
  return std::isfinite(x) && x > 0 && std::frexp(x, &exponent) == 0.5f;
}

/// [N / 2, K] bytes, even n low, to [N, K / 2] bytes, even k low.
void repack_rows(const std::byte* in, std::int64_t n, std::int64_t k, std::byte* out) noexcept {
  for (std::int64_t row = 0; row < n; row += 2, in += k) {
    std::byte* const low = out + row * (k / 2);
    std::byte* const high = low + k / 2;
    for (std::int64_t i = 0; i < k / 2; ++i) {
      const std::byte even = in[2 * i], odd = in[2 * i + 1];
      low[i] = (even & std::byte{0x0f}) | odd << 4;
      high[i] = even >> 4 | (odd & std::byte{0xf0});
    }
  }
}

class ModeloptFormat final : public Format {
 public:
  explicit ModeloptFormat(int group) : group_(group) {}

  [[nodiscard]] std::string_view name() const noexcept override { return "modelopt-w4a8-awq"; }
  [[nodiscard]] int group_size() const noexcept override { return group_; }

  [[nodiscard]] std::vector<PartSpec> parts(const MatrixLayout& matrix) const override {
    const auto n = static_cast<std::uint64_t>(matrix.n), k = static_cast<std::uint64_t>(matrix.k);
    return {{.name = matrix.part("weight"), .dtypes = {"U8"}, .shape = {n / 2, k}},
            {.name = matrix.part("weight_scale"),
             .dtypes = {"F32", "BF16", "F16"},
             .shape = {n, k / static_cast<std::uint64_t>(group_)}},
            {.name = matrix.part("weight_scale_2"), .dtypes = {"F32", "BF16", "F16"}, .shape = {}},
            {.name = matrix.part("pre_quant_scale"),
             .dtypes = {"F32", "BF16", "F16"},
             .shape = {k},
             .is_optional = true,
             .changes_weights = true}};
  }

  [[nodiscard]] std::string scale_part(const MatrixLayout& matrix) const override {
    return matrix.part("weight_scale");
  }
  [[nodiscard]] DType scale_dtype(const ExpertTensors& expert,
                                  const MatrixLayout& matrix) const override {
    return uniform_factor(expert, matrix) == 1 ? Format::scale_dtype(expert, matrix)
                                               : DType::kFloat32;
  }
  /// For F16, and once more for a factor.
  [[nodiscard]] std::size_t copied_bytes(const MatrixLayout& matrix) const override {
    return 2 * Format::copied_bytes(matrix);
  }
  [[nodiscard]] std::string codes_part(const MatrixLayout& matrix) const override {
    return matrix.part("weight");
  }
  void make_canonical(std::span<std::byte> rows, const MatrixLayout& matrix,
                      std::span<std::byte> spare) const override {
    std::ranges::copy(rows, spare.begin());
    repack_rows(spare.data(), static_cast<std::int64_t>(rows.size()) * 2 / matrix.k, matrix.k,
                rows.data());
  }
  [[nodiscard]] TensorView scales(const ExpertTensors& expert, const MatrixLayout& matrix,
                                  ExpertStorage& storage) const override {
    if (const std::string why = inexact(expert, matrix); !why.empty()) refuse_inexact(why);
    return unscaled_scales(expert, matrix, storage);
  }

  [[nodiscard]] float input_scale(const ExpertTensors& expert,
                                  const MatrixLayout& matrix) const override {
    if (const std::string why = inexact(expert, matrix); !why.empty()) {
      fail(ErrorCode::kUnsupported,
           "{}, nor taken out of the input scale, which is of the scaled input; `sluice convert "
           "--scale ... --drop-input-scales` quantizes the weights times it anew",
           why);
    }
    // e4m3(x * p * (1 / s)) = e4m3(x * (1 / (s / p))) for a power of two p.
    return Format::input_scale(expert, matrix) / uniform_factor(expert, matrix);
  }

  [[nodiscard]] QuantMatrix load(const ExpertTensors& expert, const MatrixLayout& matrix,
                                 ExpertStorage& storage) const override {
    if (const std::string why = inexact(expert, matrix); !why.empty()) refuse_inexact(why);
    return load_unscaled(expert, matrix, storage);
  }

  [[nodiscard]] QuantMatrix load_unscaled(const ExpertTensors& expert, const MatrixLayout& matrix,
                                          ExpertStorage& storage) const override {
    const TensorRef& weight = part_of(expert, matrix.part("weight"));
    weight.will_need();
    const auto codes = allocate(storage, weight.bytes().size());
    repack_rows(weight.bytes().data(), matrix.n, matrix.k, codes.data());
    weight.release();
    return {.codes = {codes.data(), DType::kPackedInt4, {matrix.n, matrix.k / 2}},
            .scales = unscaled_scales(expert, matrix, storage),
            .group_size = group_};
  }

  [[nodiscard]] std::vector<float> input_factors(const ExpertTensors& expert,
                                                 const MatrixLayout& matrix) const override {
    if (inexact(expert, matrix).empty()) return {};
    const TensorRef& tensor = part_of(expert, matrix.part("pre_quant_scale"));
    std::vector<float> factors;
    for (std::int64_t i = 0; i < matrix.k; ++i) {
      const float value = element(tensor, i);
      if (!std::isfinite(value) || !(value > 0)) {
        fail(ErrorCode::kCorruptFile, "{}: pre_quant_scale [{}] = {} is not finite and positive",
             place(tensor), i, value);
      }
      factors.push_back(value);
    }
    return factors;
  }

  /// One power of two for all channels can be folded: (q * s) * x * p is (q * (s * p)) * x with the
  /// same bits. Anything else cannot: not into the weight scales, which span a group, nor into the
  /// input scale, which spans all.
  [[nodiscard]] std::string inexact(const ExpertTensors& expert,
                                    const MatrixLayout& matrix) const override {
    const TensorRef* const tensor = expert.find(matrix.part("pre_quant_scale"));
    if (!tensor) return {};
    const float first = element(*tensor, 0);
    if (!is_pow2(first)) {
      return fmt::format(
          "{}: element 0 = {} is not a power of two, so it cannot be folded into the weights "
          "exactly",
          place(*tensor), first);
    }
    for (std::int64_t i = 1; i < matrix.k; ++i) {
      const float value = element(*tensor, i);
      if (value == first) continue;
      return fmt::format(
          "{}: element {} = {} differs from element 0 = {}, so it cannot be folded into the "
          "weights exactly",
          place(*tensor), i, value, first);
    }
    return {};
  }

 private:
  [[noreturn]] static void refuse_inexact(const std::string& why) {
    fail(ErrorCode::kUnsupported,
         "{}; `sluice convert --scale ... --drop-input-scales` quantizes the weights times it anew",
         why);
  }

  /// Times the factor where it can be folded.
  TensorView unscaled_scales(const ExpertTensors& expert, const MatrixLayout& matrix,
                             ExpertStorage& storage) const {
    const TensorRef& scale = part_of(expert, scale_part(matrix));
    const TensorView result = Format::scales(expert, matrix, storage);
    check_second_scale(part_of(expert, matrix.part("weight_scale_2")), scale, result);
    if (!inexact(expert, matrix).empty()) return result;
    const float factor = uniform_factor(expert, matrix);
    return factor == 1 ? result : multiplied(result, factor, scale, storage);
  }

  /// pre_quant_scale where inexact() has nothing against it; 1 if there is none.
  static float uniform_factor(const ExpertTensors& expert, const MatrixLayout& matrix) {
    const TensorRef* const tensor = expert.find(matrix.part("pre_quant_scale"));
    return tensor ? element(*tensor, 0) : 1;
  }

  /// `scales` times a power of two, in float32.
  static TensorView multiplied(const TensorView& scales, float factor, const TensorRef& tensor,
                               ExpertStorage& storage) {
    const std::int64_t count = scales.shape.num_elements();
    const auto bytes = allocate(storage, static_cast<std::size_t>(count) * sizeof(float));
    auto* const out = reinterpret_cast<float*>(bytes.data());
    for (std::int64_t i = 0; i < count; ++i) {
      const float s = scale_value(scales, i);
      out[i] = s * factor;
      if (out[i] / factor == s && std::isfinite(out[i])) continue;
      fail(ErrorCode::kUnsupported,
           "{}: scale [{}, {}] = {} times the pre_quant_scale {} is not a float32", place(tensor),
           i / scales.dim(1), i % scales.dim(1), s, factor);
    }
    return {out, DType::kFloat32, scales.shape};
  }

  int group_;
};

}  // namespace

std::optional<Recognised> recognise_modelopt(const FormatClues& clues) {
  const QuantizationConfig& config = clues.config;
  const bool by_config = config.quant_method == "modelopt" && config.quant_algo == "W4A8_AWQ";
  const bool by_algo = config.algo == "W4A8_AWQ" &&
                       (config.quant_method.empty() || config.quant_method == "modelopt");
  if (!by_config && !by_algo) return std::nullopt;
  const std::int64_t group =
      config.algo_group_size.value_or(config.group_size.value_or(std::int64_t{128}));
  if (group != 128 && group != 32) {
    fail(ErrorCode::kUnsupported, "{}: group_size = {}; only 32 and 128 are supported",
         by_algo ? config.algo_file : config.file, group);
  }
  return Recognised{
      .format = std::make_unique<ModeloptFormat>(static_cast<int>(group)),
      .evidence = fmt::format("{}: quant_algo = 'W4A8_AWQ', group_size {}",
                              by_algo ? "hf_quant_config.json" : "config.json", group)};
}

}  // namespace sluice
