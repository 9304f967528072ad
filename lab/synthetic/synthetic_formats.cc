#include "synthetic/synthetic_formats.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <span>

#include "core/fail.h"
#include "sluice/quant.h"
#include "synthetic/synthetic_families.h"
#include "synthetic/synthetic_mxfp4.h"

namespace sluice {
namespace {

using Content = SyntheticTensor::Content;

constexpr const char* kStems[] = {"gate_proj", "up_proj", "down_proj"};

constexpr FormatDefinition kDefinitions[] = {
    {"w4afp8", Family::kW4afp8, false, true},
    {"compressed-tensors", Family::kCompressedTensors, true, false},
    {"kimi-int4", Family::kKimi, true, false},
    {"kimi-mxfp4", Family::kKimiMxfp4, true, false},
    {"deepseek-fp4", Family::kDeepseekFp4, true, false},
    {"gpt-oss", Family::kGptOss, true, false},
    {"angelslim", Family::kAngelslim, false, true},
    {"modelopt-w4a8-awq", Family::kModelopt, true, true},
    {"fp8-block", Family::kFp8Block, false, false},
    {"bf16", Family::kBf16, false, false},
};

/// A matrix of codes and scales, value by value.
class Values {
 public:
  explicit Values(const SyntheticMatrix& m) : m_(m) {}
  [[nodiscard]] int code(int row, int col) const {
    const std::size_t i = index(row, col);
    const int nibble = i % 2 == 0 ? m_.codes[i / 2] % 16 : m_.codes[i / 2] / 16;
    return nibble < 8 ? nibble : nibble - 16;
  }
  [[nodiscard]] float scale(int row, int col) const {
    return m_.scales[index(row, col) / static_cast<std::size_t>(m_.group)];
  }

 private:
  [[nodiscard]] std::size_t index(int row, int col) const {
    return static_cast<std::size_t>(row) * static_cast<std::size_t>(m_.k) +
           static_cast<std::size_t>(col);
  }
  const SyntheticMatrix& m_;
};

template <class T>
void put(std::vector<std::byte>& out, std::size_t index, T value) {
  std::memcpy(out.data() + index * sizeof(T), &value, sizeof(T));
}

/// Of a scale as it is stored: float32, or rounded to bf16.
float stored(float scale, const std::string& dtype) {
  return dtype == "BF16" ? bf16_to_float(bf16_from_float(scale)) : scale;
}

std::vector<std::byte> number_bytes(std::span<const float> values, const std::string& dtype) {
  std::vector<std::byte> out(values.size() * (dtype == "BF16" ? 2 : 4));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == "BF16") {
      put(out, i, bf16_from_float(values[i]));
    } else {
      put(out, i, values[i]);
    }
  }
  return out;
}

std::vector<std::byte> nibbles_along_k(const SyntheticMatrix& m) {
  const Values values(m);
  std::vector<std::byte> out;
  out.reserve(m.codes.size());
  for (int row = 0; row < m.n; ++row) {
    for (int col = 0; col < m.k; col += 2) {
      const unsigned low = static_cast<unsigned>(values.code(row, col) + 16) % 16;
      const unsigned high = static_cast<unsigned>(values.code(row, col + 1) + 16) % 16;
      out.push_back(static_cast<std::byte>(low + 16 * high));
    }
  }
  return out;
}

std::vector<std::byte> nibbles_along_n(const SyntheticMatrix& m) {
  const Values values(m);
  std::vector<std::byte> out;
  out.reserve(m.codes.size());
  for (int row = 0; row < m.n; row += 2) {
    for (int col = 0; col < m.k; ++col) {
      const unsigned low = static_cast<unsigned>(values.code(row, col) + 16) % 16;
      const unsigned high = static_cast<unsigned>(values.code(row + 1, col) + 16) % 16;
      out.push_back(static_cast<std::byte>(low + 16 * high));
    }
  }
  return out;
}

std::vector<std::byte> offset_words(const SyntheticMatrix& m) {
  const Values values(m);
  std::vector<std::byte> out(m.codes.size());
  std::size_t at = 0;
  for (int row = 0; row < m.n; ++row) {
    for (int col = 0; col < m.k; col += 8) {
      std::uint32_t word = 0;
      for (int i = 0; i < 8; ++i) {
        word += static_cast<std::uint32_t>(values.code(row, col + i) + 8) << (4 * i);
      }
      put(out, at++, word);
    }
  }
  return out;
}

float second_scale(const SyntheticMatrix& m, const std::string& scale_dtype) {
  float amax = 0;
  const Values values(m);
  for (int row = 0; row < m.n; ++row) {
    for (int col = 0; col < m.k; ++col) {
      const float w =
          static_cast<float>(values.code(row, col)) * stored(values.scale(row, col), scale_dtype);
      amax = std::max(amax, std::fabs(w));
    }
  }
  return amax / kE4m3Max;
}

/// Between 1/4 and 4, most near 1, as AWQ's search leaves them: no power of two for all.
std::vector<float> pre_quant_scale(const SyntheticMatrix& m) {
  RandomStream random(stream_key({m.key, 0x70726573}));
  std::vector<float> out;
  for (int col = 0; col < m.k; ++col) {
    out.push_back(stored(exp2_portable(0.5f * random.normal()), "BF16"));
  }
  return out;
}

/// Weights that the codes could have come from: somewhere in their rounding cells.
std::vector<float> originals(const SyntheticMatrix& m) {
  const Values values(m);
  RandomStream random(stream_key({m.key, 0x6f726967696e}));
  std::vector<float> out;
  out.reserve(static_cast<std::size_t>(m.n) * static_cast<std::size_t>(m.k));
  for (int row = 0; row < m.n; ++row) {
    for (int col = 0; col < m.k; ++col) {
      const int code = values.code(row, col);
      // The largest of a group stays where it is, so that amax / 7 finds its scale again.
      const float offset = std::abs(code) == 7 ? 0.0f : 0.9f * (random.uniform() - 0.5f);
      out.push_back(values.scale(row, col) * (static_cast<float>(code) + offset));
    }
  }
  return out;
}

/// Of each output, bf16: most within +-0.5.
std::vector<float> biases(const SyntheticMatrix& m) {
  RandomStream random(stream_key({m.key, 0x62696173}));
  std::vector<float> out;
  for (int row = 0; row < m.n; ++row) out.push_back(stored(0.25f * random.normal(), "BF16"));
  return out;
}

/// What `bytes_of` gives of gate and up in turn, or of down.
template <class Function>
std::vector<std::byte> fused(const SyntheticExpert& expert, std::size_t matrix,
                             const Function& bytes_of) {
  if (matrix == 2) return bytes_of(expert.matrices[2]);
  return in_turn(bytes_of(expert.matrices[0]), bytes_of(expert.matrices[1]), expert.matrices[0].n);
}

struct Fp8Matrix {
  std::vector<std::byte> codes;
  std::vector<float> scales;
};

Fp8Matrix fp8_blocks(const SyntheticMatrix& m) {
  constexpr int kBlock = 128;
  const std::vector<float> w = originals(m);
  Fp8Matrix out{.codes = std::vector<std::byte>(w.size()), .scales = {}};
  for (int top = 0; top < m.n; top += kBlock) {
    for (int left = 0; left < m.k; left += kBlock) {
      const auto for_each = [&](auto&& function) {
        for (int row = top; row < top + kBlock; ++row) {
          for (int col = left; col < left + kBlock; ++col) {
            function(static_cast<std::size_t>(row) * static_cast<std::size_t>(m.k) +
                     static_cast<std::size_t>(col));
          }
        }
      };
      float amax = 0;
      for_each([&](std::size_t i) { amax = std::max(amax, std::fabs(w[i])); });
      const float scale = amax / kE4m3Max;
      out.scales.push_back(scale);
      for_each([&](std::size_t i) {
        out.codes[i] = static_cast<std::byte>(e4m3_from_float(w[i] / scale));
      });
    }
  }
  return out;
}

}  // namespace

const FormatDefinition& definition(const SyntheticCheckpoint& spec) {
  std::string known;
  for (const FormatDefinition& d : kDefinitions) {
    if (spec.format == d.name) return d;
    known += std::string(known.empty() ? "" : ", ") + d.name;
  }
  fail(ErrorCode::kInvalidArgument, "format '{}' is none of: {}", spec.format, known);
}

std::vector<std::string> synthetic_format_names() {
  std::vector<std::string> names;
  for (const FormatDefinition& d : kDefinitions) names.emplace_back(d.name);
  return names;
}

bool is_fused(const SyntheticCheckpoint& spec) {
  return definition(spec).family == Family::kGptOss;
}

bool has_input_scales(const SyntheticCheckpoint& spec) {
  return definition(spec).has_static_inputs ? spec.with_input_scales : spec.with_static_activations;
}

void check_synthetic_format(const SyntheticCheckpoint& spec) {
  const FormatDefinition& d = definition(spec);
  const int group = spec.geometry.group_size;
  const bool is_mxfp4 = d.family == Family::kKimiMxfp4 || d.family == Family::kDeepseekFp4 ||
                        d.family == Family::kGptOss;
  const bool is_float = spec.scale_dtype == DType::kFloat32 || spec.scale_dtype == DType::kBFloat16;
  check_argument(is_mxfp4 ? spec.scale_dtype == DType::kFloat8E8M0 : is_float,
                 "scale_dtype {}; {} has {}", to_string(spec.scale_dtype), d.name,
                 is_mxfp4 ? "float8_e8m0" : "float32 or bfloat16");
  if (d.family == Family::kKimi || is_mxfp4) {
    check_argument(group == 32, "group_size {}; {} has 32", group, d.name);
  } else if (d.allows_group_32) {
    check_argument(group == 32 || group == 128, "group_size {} is neither 32 nor 128", group);
  } else {
    check_argument(group == 128, "group_size {}; {} has 128", group, d.name);
  }
  const bool has_bias = spec.geometry.has_bias;
  check_argument(d.family != Family::kGptOss || has_bias, "{} has biases", d.name);
  check_argument(!has_bias || d.family == Family::kGptOss || d.family == Family::kKimiMxfp4,
                 "biases: gpt-oss and kimi-mxfp4 have them, not {}", d.name);
  check_argument(!spec.with_static_activations || d.family == Family::kCompressedTensors,
                 "static activations can be chosen for compressed-tensors only, not for {}",
                 d.name);
  check_argument(!spec.with_pre_quant_scale || d.family == Family::kModelopt,
                 "modelopt-w4a8-awq alone has a pre_quant_scale, not {}", d.name);
}

std::vector<SyntheticTensor> synthetic_tensors(const SyntheticCheckpoint& spec) {
  const Family family = definition(spec).family;
  const auto group = static_cast<std::uint64_t>(spec.geometry.group_size);
  const std::string scale_dtype = spec.scale_dtype == DType::kBFloat16 ? "BF16" : "F32";
  std::vector<SyntheticTensor> out;
  for (std::size_t m = 0; m < 3; ++m) {
    const auto hidden = static_cast<std::uint64_t>(spec.geometry.token_width());
    const auto intermediate = static_cast<std::uint64_t>(spec.geometry.inner_width());
    const std::uint64_t n = m == 2 ? hidden : intermediate, k = m == 2 ? intermediate : hidden;
    const auto add = [&](const char* what, const std::string& dtype,
                         std::vector<std::uint64_t> shape, Content content) {
      out.push_back({.part = std::string(kStems[m]) + "." + what,
                     .dtype = dtype,
                     .shape = std::move(shape),
                     .content = content,
                     .matrix = m});
    };
    switch (family) {
      case Family::kW4afp8:
        add("weight", "I8", {n, k / 2}, Content::kNibblesAlongK);
        add("weight_scale_inv", scale_dtype, {n, k / group}, Content::kScales);
        break;
      case Family::kCompressedTensors:
      case Family::kKimi:
        add("weight_packed", "I32", {n, k / 8}, Content::kWords);
        add("weight_scale", scale_dtype, {n, k / group}, Content::kScales);
        add("weight_shape", "I64", {2}, Content::kShape);
        break;
      case Family::kKimiMxfp4:
        add("weight_packed", "U8", {n, k / 2}, Content::kMxfp4Codes);
        add("weight_scale", "U8", {n, k / group}, Content::kMxfp4Scales);
        if (spec.geometry.has_bias) add("bias", "BF16", {n}, Content::kBias);
        break;
      case Family::kDeepseekFp4:
        add("weight", "I8", {n, k / 2}, Content::kMxfp4Codes);
        add("scale", "F8_E8M0", {n, k / group}, Content::kMxfp4Scales);
        break;
      case Family::kGptOss: {
        if (m == 1) break;  // With gate.
        const std::string stem = m == 0 ? "gate_up_proj_" : "down_proj_";
        const std::uint64_t rows = m == 0 ? 2 * n : n;
        out.push_back({stem + "blocks", "U8", {rows, k / 32, 16}, Content::kFusedCodes, m});
        out.push_back({stem + "scales", "U8", {rows, k / 32}, Content::kFusedScales, m});
        out.push_back({stem + "bias", "BF16", {rows}, Content::kFusedBias, m});
        break;
      }
      case Family::kAngelslim:
        add("qweight", "I8", {n, k / 2}, Content::kNibblesAlongK);
        add("weight_scale.int4", scale_dtype, {n, k / group}, Content::kScales);
        add("weight_scale", scale_dtype, {}, Content::kSecondScale);
        break;
      case Family::kModelopt:
        add("weight", "U8", {n / 2, k}, Content::kNibblesAlongN);
        add("weight_scale", scale_dtype, {n, k / group}, Content::kScales);
        add("weight_scale_2", "F32", {}, Content::kSecondScale);
        if (spec.with_pre_quant_scale) {
          add("pre_quant_scale", "BF16", {k}, Content::kPreQuantScale);
        }
        break;
      case Family::kFp8Block:
        add("weight", "F8_E4M3", {n, k}, Content::kFp8Codes);
        add("weight_scale_inv", "F32", {n / 128, k / 128}, Content::kFp8Scales);
        break;
      case Family::kBf16:
        add("weight", "BF16", {n, k}, Content::kBf16);
        break;
    }
    if (family != Family::kW4afp8 && has_input_scales(spec)) {
      add("input_scale", "F32", {1}, Content::kInputScale);
    }
  }
  return out;
}

std::vector<std::byte> synthetic_bytes(const SyntheticTensor& tensor,
                                       const SyntheticCheckpoint& spec,
                                       const SyntheticExpert& expert, const InputScales& inputs) {
  const SyntheticMatrix& m = expert.matrices[tensor.matrix];
  const std::string scale_dtype = spec.scale_dtype == DType::kBFloat16 ? "BF16" : "F32";
  switch (tensor.content) {
    case Content::kNibblesAlongK:
      return nibbles_along_k(m);
    case Content::kNibblesAlongN:
      return nibbles_along_n(m);
    case Content::kWords:
      return offset_words(m);
    case Content::kScales:
      return number_bytes(m.scales, tensor.dtype);
    case Content::kShape: {
      std::vector<std::byte> out(2 * sizeof(std::int64_t));
      put(out, 0, static_cast<std::int64_t>(m.n));
      put(out, 1, static_cast<std::int64_t>(m.k));
      return out;
    }
    case Content::kSecondScale: {
      const float value = second_scale(m, scale_dtype);
      return number_bytes(std::span(&value, 1), tensor.dtype);
    }
    case Content::kPreQuantScale:
      return number_bytes(pre_quant_scale(m), tensor.dtype);
    case Content::kInputScale: {
      float value = tensor.matrix == 0 ? inputs.w1 : tensor.matrix == 1 ? inputs.w3 : inputs.w2;
      // Of the scaled input, which is calibrated here by its bound.
      if (spec.with_pre_quant_scale) value *= std::ranges::max(pre_quant_scale(m));
      return number_bytes(std::span(&value, 1), tensor.dtype);
    }
    case Content::kMxfp4Codes:
      return mxfp4_bytes(m).codes;
    case Content::kMxfp4Scales:
      return mxfp4_bytes(m).scales;
    case Content::kBias:
      return number_bytes(biases(m), tensor.dtype);
    case Content::kFusedCodes:
      return fused(expert, tensor.matrix,
                   [](const SyntheticMatrix& one) { return mxfp4_bytes(one).codes; });
    case Content::kFusedScales:
      return fused(expert, tensor.matrix,
                   [](const SyntheticMatrix& one) { return mxfp4_bytes(one).scales; });
    case Content::kFusedBias:
      return fused(expert, tensor.matrix, [&](const SyntheticMatrix& one) {
        return number_bytes(biases(one), tensor.dtype);
      });
    case Content::kFp8Codes:
      return fp8_blocks(m).codes;
    case Content::kFp8Scales:
      return number_bytes(fp8_blocks(m).scales, "F32");
    case Content::kBf16:
      return number_bytes(originals(m), "BF16");
  }
  fail(ErrorCode::kInternal, "tensor {} has no content", tensor.part);
}

}  // namespace sluice
