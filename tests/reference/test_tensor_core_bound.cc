// The error bound for Hopper's tensor cores, against their adder written out in plain arithmetic.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>

#include "bench/random_experts.h"
#include "core/counter_rng.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/workload.h"
#include "sluice/quant.h"
#include "support/tensor_core_adder.h"

namespace sluice::testing {
namespace {

/// out[n] = sum over groups, in float32, as the kernels promote them.
std::vector<float> multiply(const TensorCoreAdder& adder, const QuantMatrix& m,
                            const std::vector<std::uint8_t>& codes,
                            const std::vector<float>& scales) {
  std::vector<double> a(codes.size()), w(codes.size());
  for (std::size_t k = 0; k < a.size(); ++k) a[k] = e4m3_to_float(codes[k]);
  std::vector<float> out(static_cast<std::size_t>(m.n()));
  const std::int64_t num_groups = m.k() / m.group_size;
  for (std::int64_t n = 0; n < m.n(); ++n) {
    const std::uint8_t* row = m.codes.as<std::uint8_t>() + n * m.codes.dim(1);
    const bool is_mxfp4 = m.format == WeightFormat::kMxfp4;
    for (std::size_t k = 0; k < w.size(); ++k) {
      const auto at = static_cast<std::int64_t>(k);
      w[k] = code_value(m.format, row, at);
      // Its scales are in the codes, and an accumulator sums 128.
      if (is_mxfp4) w[k] *= scale_value(m.scales, n * num_groups + at / m.group_size);
    }
    const std::int64_t unit = is_mxfp4 ? kActivationGroup : m.group_size;
    float& sum = out[static_cast<std::size_t>(n)];
    for (std::int64_t k = 0; k < m.k(); k += unit) {
      const float ws = is_mxfp4 ? 1.0f : scale_value(m.scales, n * num_groups + k / m.group_size);
      const float xs = scales[static_cast<std::size_t>(k / kActivationGroup)];
      // All of its numbers are normal ones.
      const TensorCoreAdder own{.fraction_bits = adder.fraction_bits,
                                .normalizes = adder.normalizes || is_mxfp4};
      const auto group =
          static_cast<float>(own.sum(&a[static_cast<std::size_t>(k)],
                                     &w[static_cast<std::size_t>(k)], static_cast<int>(unit)));
      sum = std::fma(group, ws * xs, sum);
    }
  }
  return out;
}

struct Quantized {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
};
Quantized quantize(const std::vector<float>& values) {
  Quantized q{std::vector<std::uint8_t>(values.size()),
              std::vector<float>(values.size() / kActivationGroup)};
  for (std::size_t g = 0; g < q.scales.size(); ++g) {
    q.scales[g] =
        quantize_group(std::span(values).subspan(g * kActivationGroup, kActivationGroup),
                       std::span(q.codes).subspan(g * kActivationGroup, kActivationGroup));
  }
  return q;
}

/// y of one token through one expert, on such tensor cores.
std::vector<std::uint16_t> run(const TensorCoreAdder& adder, const Expert& expert,
                               const std::uint16_t* x, std::size_t hidden) {
  std::vector<float> values(hidden);
  for (std::size_t i = 0; i < hidden; ++i) values[i] = bf16_to_float(x[i]);
  const Quantized a = quantize(values);
  const auto gate = multiply(adder, expert.gate, a.codes, a.scales);
  const auto up = multiply(adder, expert.up, a.codes, a.scales);
  std::vector<float> h(gate.size());
  for (std::size_t i = 0; i < h.size(); ++i) h[i] = swiglu(gate[i], up[i]);
  const Quantized b = quantize(h);
  std::vector<std::uint16_t> y(hidden);
  const auto c2 = multiply(adder, expert.down, b.codes, b.scales);
  for (std::size_t i = 0; i < hidden; ++i) y[i] = bf16_from_float(c2[i]);
  return y;
}

struct Shape {
  int hidden, intermediate, group_size;
  WeightFormat format = WeightFormat::kInt4;
};
constexpr Shape kShapes[] = {{128, 128, 128},
                             {896, 128, 128},
                             {128, 896, 128},
                             {256, 256, 32},
                             {512, 256, 32, WeightFormat::kMxfp4}};

/// The kinds of the workload, and values spread evenly over every exponent of e4m3.
constexpr int kNumKinds = 4;
const char* const kKindNames[kNumKinds] = {"gaussian", "outliers", "massive", "all exponents"};

std::vector<std::uint16_t> make_tokens(int kind, int hidden, std::int64_t num_tokens) {
  if (kind < 3) {
    constexpr InputKind kinds[] = {InputKind::kGaussian, InputKind::kOutliers, InputKind::kMassive};
    return make_workload(
               {.num_experts = 1, .num_topk = 1, .hidden = hidden, .input = kinds[kind], .seed = 3},
               /*first_token=*/14, num_tokens)  // One in sixteen is massive.
        .x;
  }
  const CounterRng rng(17, 4);
  std::vector<std::uint16_t> x(static_cast<std::size_t>(num_tokens * hidden));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::uint64_t bits = rng.bits(i);
    const double size =
        std::ldexp(1.0 + static_cast<double>(bits % 8) / 8, static_cast<int>(bits / 8 % 18) - 9);
    x[i] = bf16_from_float(static_cast<float>(bits >> 63 ? -size : size));
  }
  return x;
}

/// Of every shape: the largest error, as a share of its bound.
double worst_ratio(const TensorCoreAdder& adder, int kind, const ErrorModel& model) {
  double worst = 0;
  for (const Shape& shape : kShapes) {
    const ModelGeometry g{.name = "adder",
                          .num_experts = 1,
                          .num_topk = 1,
                          .hidden = shape.hidden,
                          .intermediate = shape.intermediate,
                          .group_size = shape.group_size,
                          .weight_format = shape.format};
    const bool is_mxfp4 = shape.format == WeightFormat::kMxfp4;
    const ExpertWeights weights =
        random_experts(g, is_mxfp4 ? DType::kFloat8E8M0 : DType::kFloat32, 5);
    // Scales of a row up to 2^11 apart, the most that one accumulator sums.
    for (const QuantMatrix* m : {&weights.experts[0].gate, &weights.experts[0].up}) {
      if (!is_mxfp4) break;
      auto* const codes = static_cast<std::uint8_t*>(const_cast<void*>(m->scales.data));
      for (std::size_t i = 0; i < m->scales.bytes(); i += 3) {
        codes[i] = static_cast<std::uint8_t>(121 - i % 9);
      }
    }
    const LayerReference reference(weights, {Recipe{}, Mode::kNormal}, 1.0f, model);
    constexpr std::int64_t kTokens = 4;
    const auto hidden = static_cast<std::size_t>(shape.hidden);
    const auto x = make_tokens(kind, shape.hidden, kTokens);
    VerifyReport report;
    for (std::size_t t = 0; t < kTokens; ++t) {
      const std::int32_t expert = 0;
      const float weight = 1;
      compare_row(reference.row(&x[t * hidden], &expert, &weight, 1),
                  run(adder, weights.experts[0], &x[t * hidden], hidden).data(),
                  static_cast<std::int64_t>(t), report);
    }
    worst = std::max(worst, report.worst_ratio);
  }
  return worst;
}

TEST(TensorCoreBound, HoldsForEveryKindOfInput) {
  for (int kind = 0; kind < kNumKinds; ++kind) {
    for (const bool normalizes : {false, true}) {
      const double worst =
          worst_ratio({.normalizes = normalizes}, kind, error_model(Device::Kind::kCuda));
      std::printf("%s%s: %.3f of the bound\n", kKindNames[kind], normalizes ? ", normalized" : "",
                  worst);
      EXPECT_LE(worst, 1) << kKindNames[kind];
    }
  }
}

/// What one constant times sum |a||w| says of rows in which one product dwarfs the others.
TEST(TensorCoreBound, OneConstantWouldNotDo) {
  const ErrorModel constant{.accumulation = 0x1p-14};
  EXPECT_LE(worst_ratio({}, 0, constant), 1);
  EXPECT_GT(worst_ratio({}, 2, constant), 1);
}

/// The bound is no blank cheque: an adder with half the bits is seen, whatever the input.
TEST(TensorCoreBound, APoorerAdderIsSeen) {
  const ErrorModel model = error_model(Device::Kind::kCuda);
  for (int kind = 0; kind < kNumKinds; ++kind) {
    EXPECT_GT(worst_ratio({.fraction_bits = 6}, kind, model), 1) << kKindNames[kind];
  }
}

/// The CPU's bound does not forgive a tensor core.
TEST(TensorCoreBound, IsForTensorCoresOnly) {
  EXPECT_GT(worst_ratio({}, 0, error_model(Device::Kind::kHost)), 1);
}

}  // namespace
}  // namespace sluice::testing
