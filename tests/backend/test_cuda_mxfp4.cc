// MXFP4 experts on a CUDA device: every element against float64, whatever the kernel; tiles whose
// scales are near each other, and too far apart for e4m3; what is refused.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "bench/random_experts.h"
#include "core/counter_rng.h"
#include "sluice/lab/parallel.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/workload.h"
#include "sluice/quant.h"
#include "sluice/recipe.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

ModelGeometry geometry(int hidden, int intermediate, int num_experts = 4) {
  return {.name = "mxfp4",
          .num_experts = num_experts,
          .num_topk = 1,
          .hidden = hidden,
          .intermediate = intermediate,
          .group_size = 32,
          .weight_format = WeightFormat::kMxfp4};
}

std::uint8_t* scales_of(const QuantMatrix& m) {
  return static_cast<std::uint8_t*>(const_cast<void*>(m.scales.data));
}
std::uint8_t* codes_of(const QuantMatrix& m) {
  return static_cast<std::uint8_t*>(const_cast<void*>(m.codes.data));
}

/// How far apart the scales of a row are.
enum class Spread {
  kFew,     ///< At most 2^3.
  kMost,    ///< Up to 2^26, the most that is near.
  kOneFar,  ///< One row of one tile beyond that.
  kFar,     ///< Up to 2^40.
  kZeros,   ///< Far apart, but only where all weights are zero.
};

/// What scales x and h have.
enum class Scales { kGroup, kStatic, kToken };

void set_spread(const ExpertWeights& weights, Spread spread) {
  const CounterRng rng(9, static_cast<std::uint64_t>(spread));
  for (std::size_t e = 0; e < weights.experts.size(); ++e) {
    const Expert& expert = weights.experts[e];
    for (const QuantMatrix* m : {&expert.gate, &expert.up, &expert.down}) {
      const std::int64_t groups = m->k() / 32;
      for (std::int64_t i = 0; i < m->n() * groups; ++i) {
        const std::uint64_t bits = rng.bits(static_cast<std::uint64_t>(i));
        std::uint8_t& scale = scales_of(*m)[i];
        if (spread == Spread::kMost) scale = static_cast<std::uint8_t>(121 - bits % 27);
        if (spread == Spread::kFar) scale = static_cast<std::uint8_t>(121 - bits % 41);
        if (spread == Spread::kZeros && bits % 5 == 0) {
          scale = bits % 2 == 0 ? 0 : 200;
          std::memset(codes_of(*m) + i * 16, bits % 3 == 0 ? 0x88 : 0, 16);
        }
      }
      if (spread == Spread::kOneFar) scales_of(*m)[(m->n() - 3) * groups + 1] = 90;
    }
  }
}

class CudaMxfp4Test : public CudaBackendTest {
 protected:
  /// Output rows of `num_rows` rows for each expert; with static scales the smallest that fit.
  struct Run {
    Workload load;
    std::vector<std::int64_t> begin;
    std::vector<std::int32_t> count;
    std::vector<std::uint16_t> y;
    std::optional<StaticScales> scales;
    const char* recipe = "direct";
  };

  Run run(const ExpertWeights& weights, const PreparedExperts& experts, int num_rows, Scales scales,
          InputKind kind) {
    const ModelGeometry& g = weights.geometry;
    Run r;
    if (scales != Scales::kGroup) {
      r.recipe = scales == Scales::kStatic ? "bf16-static" : "direct-token";
    }
    const auto num_experts = static_cast<std::int64_t>(weights.experts.size());
    for (std::int64_t e = 0; e < num_experts; ++e) {
      r.begin.push_back(e * num_rows);
      r.count.push_back(num_rows);
    }
    const std::int64_t total = num_experts * num_rows;
    r.load = make_workload(
        {.num_experts = g.num_experts, .num_topk = 1, .hidden = g.hidden, .input = kind, .seed = 3},
        0, total);
    const auto elements = r.load.x.size();
    const auto inner = static_cast<std::size_t>(total) * static_cast<std::size_t>(g.intermediate);
    const auto x = upload(r.load.x);
    const auto begin = upload(r.begin);
    const auto count = upload(r.count);
    const auto codes = backend_->allocate(elements), scale = backend_->allocate(elements / 32);
    const auto h_codes = backend_->allocate(inner), h_scale = backend_->allocate(inner / 32);
    const auto y = upload(std::vector<std::uint16_t>(elements, 0x7fc1));
    const RowRanges rows{.num_experts = g.num_experts,
                         .begin = as<std::int64_t>(begin),
                         .count = as<std::int32_t>(count),
                         .max_rows = total,
                         .max_rows_per_expert = total,
                         .expected_m = num_rows};
    Fp8Rows in{.codes = as<std::uint8_t>(codes), .scale = as<float>(scale), .width = g.hidden};
    Fp8Rows h{
        .codes = as<std::uint8_t>(h_codes), .scale = as<float>(h_scale), .width = g.intermediate};
    in.scale_per_row = scales == Scales::kToken;
    const auto stage = [&] {
      ops_->quantize(as<std::uint16_t>(x), rows, false, in, stream_);
      ops_->expert_stage(experts, in, rows, h, as<std::uint16_t>(y), stream_, nullptr);
    };
    stage();
    if (scales == Scales::kStatic) {
      float amax = 0;
      for (const std::uint16_t v : r.load.x) amax = std::max(amax, std::fabs(bf16_to_float(v)));
      const auto of_h = download<float>(*h_scale, inner / 128);
      r.scales = StaticScales{amax / kE4m3Max, *std::ranges::max_element(of_h)};
      in.scale = nullptr, in.static_scale = r.scales->s1;
      h.scale = nullptr, h.static_scale = r.scales->s2;
      stage();
    }
    r.y = download<std::uint16_t>(*y, elements);
    return r;
  }

  /// First and last row of each expert.
  static VerifyReport verify(const ExpertWeights& weights, const Run& r) {
    const LayerRecipe recipe = resolve_recipe(parse_recipe(r.recipe), Mode::kNormal,
                                              DispatchDtype::kAuto, r.scales, "test");
    const LayerReference reference(weights, recipe, 1.0f, error_model(Device::Kind::kCuda));
    const auto hidden = static_cast<std::size_t>(weights.geometry.hidden);
    std::vector<VerifyReport> reports(r.count.size());
    for_each_in_parallel(r.count.size(), [&](std::size_t e) {
      const auto expert = static_cast<std::int32_t>(e);
      const float weight = 1;
      for (const std::int64_t i : {std::int64_t{0}, r.count[e] - std::int64_t{1}}) {
        const std::size_t at = static_cast<std::size_t>(r.begin[e] + i) * hidden;
        compare_row(reference.row(&r.load.x[at], &expert, &weight, 1), &r.y[at],
                    static_cast<std::int64_t>(at / hidden), reports[e]);
      }
    });
    VerifyReport all;
    for (const VerifyReport& one : reports) {
      all.num_rows += one.num_rows, all.num_wrong += one.num_wrong;
      if (one.worst_ratio < all.worst_ratio) continue;
      all.worst_ratio = one.worst_ratio, all.worst_token = one.worst_token;
      all.worst_element = one.worst_element;
    }
    return all;
  }
};

TEST_F(CudaMxfp4Test, EveryElementIsWithinItsBound) {
  for (const Spread spread :
       {Spread::kFew, Spread::kMost, Spread::kOneFar, Spread::kFar, Spread::kZeros}) {
    double worst = 0;
    for (const auto& [hidden, intermediate] : {std::pair{384, 640}, {640, 256}}) {
      const ExpertWeights weights =
          random_experts(geometry(hidden, intermediate), DType::kFloat8E8M0, 5);
      set_spread(weights, spread);
      const auto experts = ops_->prepare(weights);
      for (const int rows : {1, 33, 129}) {
        for (const Scales scales : {Scales::kGroup, Scales::kStatic, Scales::kToken}) {
          const InputKind kind = rows % 2 == 0 ? InputKind::kGaussian : InputKind::kRealistic;
          const VerifyReport report = verify(weights, run(weights, *experts, rows, scales, kind));
          EXPECT_TRUE(report.passed())
              << "spread " << static_cast<int>(spread) << " hidden " << hidden << " intermediate "
              << intermediate << " rows " << rows << " scales " << static_cast<int>(scales)
              << ": row " << report.worst_token << " element " << report.worst_element << " has "
              << report.worst_ratio << " of its bound";
          worst = std::max(worst, report.worst_ratio);
        }
      }
    }
    std::printf("spread %d: worst error %.3f of its bound\n", static_cast<int>(spread), worst);
  }
}

/// A row's bits are the same alone and among many, in kernels for few rows and for many.
TEST_F(CudaMxfp4Test, BitsOfARowDependOnNothingElse) {
  for (const Spread spread : {Spread::kFew, Spread::kOneFar}) {
    const ExpertWeights weights = random_experts(geometry(640, 384), DType::kFloat8E8M0, 6);
    set_spread(weights, spread);
    const auto experts = ops_->prepare(weights);
    const Run most = run(weights, *experts, 200, Scales::kGroup, InputKind::kGaussian);
    for (const int rows : {1, 8, 16, 32, 64, 65, 128}) {
      const Run r = run(weights, *experts, rows, Scales::kGroup, InputKind::kGaussian);
      const auto elements = static_cast<std::size_t>(rows) * 640;
      // The first expert's rows are the same tokens.
      EXPECT_EQ(std::memcmp(r.y.data(), most.y.data(), elements * 2), 0) << rows;
    }
  }
}

/// Where the four scales of a row are equal, MXFP4 of small integers is INT4 of them.
TEST_F(CudaMxfp4Test, IntegersGiveWhatInt4Gives) {
  ModelGeometry g = geometry(512, 256);
  const ExpertWeights weights = random_experts(g, DType::kFloat8E8M0, 7);
  g.weight_format = WeightFormat::kInt4, g.group_size = 128;
  const ExpertWeights int4 = random_experts(g, DType::kFloat32, 7);
  // e2m1 codes of 0, 1, 2, 3, 4, 6 and of their negatives, and those numbers.
  constexpr std::uint8_t kE2M1[] = {0, 2, 4, 5, 6, 7, 10, 12, 13, 14, 15};
  constexpr std::uint8_t kInt4[] = {0, 1, 2, 3, 4, 6, 15, 14, 13, 12, 10};
  const CounterRng rng(3, 3);
  for (std::size_t e = 0; e < weights.experts.size(); ++e) {
    const Expert &a = weights.experts[e], &b = int4.experts[e];
    for (const auto member : {&Expert::gate, &Expert::up, &Expert::down}) {
      const QuantMatrix &p = a.*member, &q = b.*member;
      for (std::size_t i = 0; i < p.codes.bytes(); ++i) {
        const std::uint64_t bits = rng.bits(i);
        const auto low = bits % 11, high = bits / 16 % 11;
        codes_of(p)[i] = static_cast<std::uint8_t>(kE2M1[low] | kE2M1[high] << 4);
        codes_of(q)[i] = static_cast<std::uint8_t>(kInt4[low] | kInt4[high] << 4);
      }
      std::memset(scales_of(p), 119, p.scales.bytes());
      auto* const floats = static_cast<float*>(const_cast<void*>(q.scales.data));
      std::fill_n(floats, q.scales.shape.num_elements(), 0x1p-8f);
    }
  }
  const auto mine = ops_->prepare(weights), theirs = ops_->prepare(int4);
  for (const int rows : {1, 16, 64, 200}) {
    const Run a = run(weights, *mine, rows, Scales::kGroup, InputKind::kGaussian);
    const Run b = run(int4, *theirs, rows, Scales::kGroup, InputKind::kGaussian);
    const VerifyReport report = verify(weights, a);
    EXPECT_TRUE(report.passed()) << rows << " rows: " << report.worst_ratio;
    // INT4's subnormal numbers may lose other bits: each is within the bound of the same values.
    EXPECT_TRUE(verify(weights, {a.load, a.begin, a.count, b.y, {}, "direct"}).passed()) << rows;
  }
}

TEST_F(CudaMxfp4Test, ScalesThatItCannotHoldAreNamed) {
  const auto refused = [&](std::uint8_t code, std::uint8_t neighbour, const char* text) {
    const ExpertWeights weights = random_experts(geometry(256, 128), DType::kFloat8E8M0, 8);
    const QuantMatrix& up = weights.experts[2].up;
    scales_of(up)[5 * 8 + 4] = neighbour;
    scales_of(up)[5 * 8 + 6] = code;
    try {
      (void)ops_->prepare(weights);
      ADD_FAILURE() << "not refused: " << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(std::string(error.what()).find("expert 2 up: scale [5, 6]"), std::string::npos)
          << error.what();
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  };
  refused(255, 118, "nan");
  refused(245, 118, "2^118");
  refused(0, 244, "2^127");
}

}  // namespace
}  // namespace sluice::testing
