#include "bench/random_experts.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>

#include "core/counter_rng.h"
#include "core/fail.h"
#include "sluice/lab/parallel.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

struct Storage {
  std::unique_ptr<std::byte[]> bytes;
};

float random_scale(const CounterRng& rng, std::uint64_t index, float base) {
  return base * static_cast<float>(0.75 + 0.5 * rng.uniform(index));
}

/// Sixteen codes with every -8 turned into -7.
std::uint64_t without_minus8(std::uint64_t word) {
  const std::uint64_t other = word ^ 0x8888888888888888u;  // A nibble is zero where it was -8.
  const std::uint64_t any = other | other >> 1 | other >> 2 | other >> 3;
  return word | (~any & 0x1111111111111111u);
}

/// The next unused part of one allocation.
class Carver {
 public:
  explicit Carver(std::byte* at) : at_(at) {}
  std::byte* take(std::size_t bytes) {
    std::byte* part = at_;
    at_ += (bytes + 63) / 64 * 64;
    return part;
  }

 private:
  std::byte* at_;
};

/// Scale codes of 2^-9 .. 2^-6.
void fill_e8m0(const CounterRng& rng, std::int64_t count, std::byte* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<std::byte>(127 - 9 + rng.bits(static_cast<std::uint64_t>(i)) % 4);
  }
}

QuantMatrix random_mxfp4(std::int64_t n, std::int64_t k, std::uint64_t seed, std::uint64_t stream,
                         Carver& memory) {
  constexpr int kGroup = 32;
  const CounterRng code_rng(seed, 2 * stream), scale_rng(seed, 2 * stream + 1);
  std::byte* codes = memory.take(static_cast<std::size_t>(n * k / 2));
  for (std::int64_t i = 0; i < n * k / 2; i += 8) {
    const std::uint64_t word = code_rng.bits(static_cast<std::uint64_t>(i));
    std::memcpy(codes + i, &word, 8);
  }
  std::byte* scales = memory.take(static_cast<std::size_t>(n * k / kGroup));
  fill_e8m0(scale_rng, n * k / kGroup, scales);
  return {.codes = {codes, DType::kPackedE2M1, {n, k / 2}},
          .scales = {scales, DType::kFloat8E8M0, {n, k / kGroup}},
          .group_size = kGroup,
          .format = WeightFormat::kMxfp4};
}

QuantMatrix random_matrix(std::int64_t n, std::int64_t k, int group_size, DType scale_dtype,
                          std::uint64_t seed, std::uint64_t stream, CodeRange range,
                          Carver& memory) {
  const CounterRng code_rng(seed, 2 * stream), scale_rng(seed, 2 * stream + 1);
  const std::int64_t code_bytes = n * k / 2, num_scales = n * (k / group_size);
  std::byte* codes = memory.take(static_cast<std::size_t>(code_bytes));
  for (std::int64_t i = 0; i < code_bytes; i += 8) {
    std::uint64_t word = code_rng.bits(static_cast<std::uint64_t>(i));
    if (range == CodeRange::kSymmetric) word = without_minus8(word);
    std::memcpy(codes + i, &word, 8);
  }
  std::byte* scales = memory.take(static_cast<std::size_t>(num_scales) * size_bytes(scale_dtype));
  for (std::int64_t i = 0; i < num_scales; ++i) {
    const float scale = random_scale(scale_rng, static_cast<std::uint64_t>(i), 0x1p-8f);
    if (scale_dtype == DType::kFloat32) {
      std::memcpy(scales + i * 4, &scale, 4);
    } else {
      const std::uint16_t bits = bf16_from_float(scale);
      std::memcpy(scales + i * 2, &bits, 2);
    }
  }
  return {.codes = {codes, DType::kPackedInt4, {n, k / 2}},
          .scales = {scales, scale_dtype, {n, k / group_size}},
          .group_size = group_size};
}

/// Of each output, within +-1.
TensorView random_bias(std::int64_t n, std::uint64_t seed, std::uint64_t stream, Carver& memory) {
  const CounterRng rng(seed, ~(stream + 2));
  auto* const bias = reinterpret_cast<float*>(memory.take(static_cast<std::size_t>(n) * 4));
  for (std::int64_t i = 0; i < n; ++i) {
    bias[i] = static_cast<float>(2 * rng.uniform(static_cast<std::uint64_t>(i)) - 1);
  }
  return {bias, DType::kFloat32, {n}};
}

}  // namespace

ExpertWeights random_experts(const ModelGeometry& geometry, DType scale_dtype, std::uint64_t seed,
                             CodeRange range) {
  check_argument(geometry.hidden > 0 && geometry.hidden % 128 == 0 && geometry.intermediate > 0 &&
                     geometry.intermediate % 128 == 0,
                 "hidden {} and intermediate {} are not multiples of 128", geometry.hidden,
                 geometry.intermediate);
  check_argument(allows_scale_dtype(geometry.weight_format, scale_dtype),
                 "scale dtype {} is not {}", to_string(scale_dtype),
                 scale_dtype_names(geometry.weight_format));
  check_argument(allows_group_size(geometry.weight_format, geometry.group_size),
                 "group_size {} is {}", geometry.group_size,
                 group_size_refusal(geometry.weight_format));
  const std::int64_t weights = std::int64_t{geometry.hidden} * geometry.intermediate;
  const auto scale_bytes = static_cast<std::int64_t>(size_bytes(scale_dtype));
  const std::int64_t matrix =
      weights / 2 + weights / geometry.group_size * scale_bytes + 128 +
      (geometry.has_bias ? 4 * std::max(geometry.hidden, geometry.intermediate) + 128 : 0);
  auto storage = std::make_shared<Storage>();
  // No initialization: every byte that is read is written below.
  storage->bytes.reset(new std::byte[static_cast<std::size_t>(matrix * 3 * geometry.num_experts)]);
  ExpertWeights out;
  out.geometry = geometry;
  out.experts.resize(static_cast<std::size_t>(geometry.num_experts));
  for_each_in_parallel(out.experts.size(), [&](std::size_t e) {
    Carver memory(storage->bytes.get() + static_cast<std::size_t>(matrix) * 3 * e);
    const auto make = [&](std::int64_t n, std::int64_t k, std::uint64_t which) {
      const std::uint64_t stream = e * 3 + which;
      QuantMatrix m =
          geometry.weight_format == WeightFormat::kMxfp4
              ? random_mxfp4(n, k, seed, stream, memory)
              : random_matrix(n, k, geometry.group_size, scale_dtype, seed, stream, range, memory);
      if (geometry.has_bias) m.bias = random_bias(n, seed, stream, memory);
      return m;
    };
    out.experts[e] = {.gate = make(geometry.intermediate, geometry.hidden, 0),
                      .up = make(geometry.intermediate, geometry.hidden, 1),
                      .down = make(geometry.hidden, geometry.intermediate, 2)};
  });
  out.storage = std::move(storage);
  return out;
}

void random_rows(std::uint64_t seed, std::int64_t rows, std::int64_t width, std::uint8_t* codes,
                 float* scale) {
  const CounterRng code_rng(seed, ~std::uint64_t{0}), scale_rng(seed, ~std::uint64_t{1});
  for (std::int64_t i = 0; i < rows * width; ++i) {
    const float value = static_cast<float>(code_rng.normal(static_cast<std::uint64_t>(i)));
    codes[i] = e4m3_from_float(value * 150.0f);
  }
  for (std::int64_t i = 0; i < rows * (width / kActivationGroup); ++i) {
    scale[i] = random_scale(scale_rng, static_cast<std::uint64_t>(i), 0x1p-7f);
  }
}

}  // namespace sluice
