// The expert stage on a CUDA device against float64, by shape, rows per expert and kind of input.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <tuple>

#include "bench/random_experts.h"
#include "cuda_experts_fixture.h"

namespace sluice::testing {
namespace {

TEST_F(CudaExpertsTest, EveryShapeAndInputWithinItsBound) {
  struct Shape {
    int hidden, intermediate, group_size;
  };
  std::map<InputKind, double> worst;
  for (const Shape& shape :
       {Shape{128, 128, 128}, Shape{384, 1792, 128}, Shape{1792, 384, 32}, Shape{3584, 384, 128},
        Shape{7168, 128, 128}, Shape{128, 7168, 128}, Shape{384, 3584, 32}}) {
    const ModelGeometry g = geometry(shape.hidden, shape.intermediate, shape.group_size);
    for (const CodeRange range : {CodeRange::kAll, CodeRange::kSymmetric}) {
      const ExpertWeights weights = random_experts(g, DType::kBFloat16, 5, range);
      const auto experts = ops_->prepare(weights);
      for (const InputKind kind : {InputKind::kGaussian, InputKind::kOutliers, InputKind::kMassive,
                                   InputKind::kRealistic, InputKind::kStudentT}) {
        Rows r = make_rows(g, kRows, kind, false);
        std::optional<StaticScales> scales;
        for (const bool is_static : {false, true}) {
          if (is_static) scales = make_static(*experts, r);
          const VerifyReport report = verify(weights, r, run(*experts, r), scales);
          EXPECT_TRUE(report.passed())
              << "hidden " << g.hidden << " intermediate " << g.intermediate << " groups of "
              << g.group_size << (is_static ? " static" : "") << " input " << static_cast<int>(kind)
              << ": row " << report.worst_token << " element " << report.worst_element << " has "
              << report.worst_ratio << " of its bound";
          worst[kind] = std::max(worst[kind], report.worst_ratio);
        }
      }
    }
  }
  for (const auto& [kind, ratio] : worst) {
    std::printf("input %d: worst error %.3f of its bound\n", static_cast<int>(kind), ratio);
  }
}

/// A stage whose GEMMs have different kinds of activation scales runs as two kernels.
TEST_F(CudaExpertsTest, AStaticScaleForOneGemmAndOwnScalesForTheOther) {
  for (const int group_size : {128, 32}) {
    const ModelGeometry g = geometry(384, 256, group_size);
    const ExpertWeights weights = random_experts(g, DType::kBFloat16, 9);
    const auto experts = ops_->prepare(weights);
    for (const bool x_is_static : {false, true}) {
      Rows r = make_rows(g, kRows, InputKind::kRealistic, false);
      const StaticScales scales = make_static(*experts, r);
      if (x_is_static) {
        r.h.scale = as<float>(r.h_scale), r.h.static_scale = 0;
      } else {
        r.in.scale = as<float>(r.scale), r.in.static_scale = 0;
        ops_->quantize(as<std::uint16_t>(r.x), r.rows, false, r.in, stream_);
      }
      const Recipe recipe{.wire = WireFormat::kBf16,
                          .gemm1 = x_is_static ? Cast::kStatic : Cast::kGroup,
                          .gemm2 = x_is_static ? Cast::kGroup : Cast::kStatic};
      EXPECT_TRUE(verify_recipe(recipe, weights, r, run(*experts, r), scales).passed())
          << "groups of " << group_size << ", " << to_string(recipe);
    }
  }
}

/// One scale per row, in one kernel and in two, by both kernels, in both layouts.
TEST_F(CudaExpertsTest, OneScalePerTokenIsWithinItsBoundAndGivesTheSameBits) {
  for (const auto& [hidden, intermediate, group_size] :
       {std::tuple{384, 1792, 128}, {1792, 384, 32}, {128, 128, 128}, {7168, 128, 128}}) {
    const ModelGeometry g = geometry(hidden, intermediate, group_size);
    const ExpertWeights weights = random_experts(g, DType::kBFloat16, 14, CodeRange::kAll);
    const auto experts = ops_->prepare(weights);
    for (const InputKind kind :
         {InputKind::kOutliers, InputKind::kMassive, InputKind::kRealistic}) {
      SCOPED_TRACE(::testing::Message() << "hidden " << hidden << " groups of " << group_size
                                        << " input " << static_cast<int>(kind));
      Rows dense = make_rows(g, kRows, kind, false);
      make_token(dense);
      const auto whole = run(*experts, dense);
      EXPECT_TRUE(verify_recipe(parse_recipe("direct-token"), weights, dense, whole, {}).passed());
      expect_same_bits(*experts, dense, whole);
      Rows masked = make_masked(g, dense);
      make_token(masked);
      // The same rows elsewhere; what lies between them stays as it is.
      std::vector<std::uint16_t> moved(masked.load.x.size(), kNan);
      for (std::size_t e = 0; e < kRows.size(); ++e) {
        std::copy_n(&whole[static_cast<std::size_t>(dense.row_begin[e] * hidden)],
                    kRows[e] * hidden,
                    &moved[static_cast<std::size_t>(masked.row_begin[e] * hidden)]);
      }
      EXPECT_TRUE(run(*experts, masked) == moved);
      expect_same_bits(*experts, masked, moved);
    }
  }
}

TEST_F(CudaExpertsTest, OneKernelAndTwoGiveTheSameBitsInBothLayouts) {
  const ModelGeometry g = geometry(1792, 384);
  const ExpertWeights weights = random_experts(g, DType::kFloat32, 6);
  const auto experts = ops_->prepare(weights);
  for (const bool masked : {false, true}) {
    const Rows r = make_rows(g, kRows, InputKind::kRealistic, masked);
    const auto whole = run(*experts, r);
    EXPECT_TRUE(verify(weights, r, whole).passed());
    backend_->copy_from_host(r.y->data(), std::vector<std::uint16_t>(whole.size(), kNan).data(),
                             whole.size() * 2, stream_);
    for (const ExpertHalf half : {ExpertHalf::kGateUp, ExpertHalf::kDown}) {
      ASSERT_TRUE(
          ops_->expert_half(half, *experts, r.in, r.rows, r.h, as<std::uint16_t>(r.y), stream_));
    }
    EXPECT_TRUE(download<std::uint16_t>(*r.y, whole.size()) == whole);
  }
}

/// What the receiver quantizes lies in the rows that GEMM2 then writes: one kernel and two (static
/// scale for GEMM1, groups for GEMM2), many token tiles of one expert, again and again.
TEST_F(CudaExpertsTest, RowsThatLieInTheOutputGiveTheSameBits) {
  const ModelGeometry g = geometry(1792, 384);
  const ExpertWeights weights = random_experts(g, DType::kBFloat16, 12);
  const auto experts = ops_->prepare(weights);
  const std::vector<std::int32_t> many = {4, 0, 9, 1, 64, 0, 2, 2, 2, 700, 1, 1, 1, 0, 0, 129, 33};
  for (const auto& num_rows : {kRows, many}) {
    for (const bool masked : {false, true}) {
      Rows r = make_rows(g, num_rows, InputKind::kRealistic, masked);
      const auto moved = upload(std::vector<std::uint8_t>(r.load.x.size(), 0xa5));
      for (const int kind : {0, 1, 2}) {  // Groups; static scales; static by way of groups.
        if (kind == 1) (void)make_static(*experts, r);
        if (kind == 2) r.h.scale = as<float>(r.h_scale), r.h.static_scale = 0;
        Fp8Rows in_y = r.in;
        in_y.codes = as<std::uint8_t>(r.y), in_y.stride = 2 * r.in.width;
        Fp8Rows sent = r.in;  // What kind 2 moves to its static scale.
        sent.scale = as<float>(r.scale), sent.static_scale = 0;
        if (kind == 2) {
          ops_->quantize(as<std::uint16_t>(r.x), r.rows, false, sent, stream_);
          Fp8Rows dense = r.in;
          dense.codes = as<std::uint8_t>(moved);
          ops_->requantize(sent, r.rows, dense, stream_);
          ops_->expert_stage(*experts, dense, r.rows, r.h, as<std::uint16_t>(r.y), stream_,
                             nullptr);
        } else {
          ops_->quantize(as<std::uint16_t>(r.x), r.rows, false, r.in, stream_);
          ops_->expert_stage(*experts, r.in, r.rows, r.h, as<std::uint16_t>(r.y), stream_, nullptr);
        }
        const auto expected = download<std::uint16_t>(*r.y, r.load.x.size());
        for (int i = 0; i < 50; ++i) {
          if (kind == 2) {
            ops_->requantize(sent, r.rows, in_y, stream_);
          } else {
            ops_->quantize(as<std::uint16_t>(r.x), r.rows, false, in_y, stream_);
          }
          ops_->expert_stage(*experts, in_y, r.rows, r.h, as<std::uint16_t>(r.y), stream_, nullptr);
          ASSERT_TRUE(download<std::uint16_t>(*r.y, expected.size()) == expected)
              << "kind " << kind << " masked " << masked << " round " << i;
        }
      }
    }
  }
}

/// One expert's buffer is as long as its rows may be, yet its rows need not begin at the first.
TEST_F(CudaExpertsTest, OneExpertsRowsBeginWhereTheRangesSay) {
  ModelGeometry g = geometry(256, 128);
  g.num_experts = 1;
  const ExpertWeights weights = random_experts(g, DType::kBFloat16, 8);
  const auto experts = ops_->prepare(weights);
  const Rows all = make_rows(g, {12}, InputKind::kGaussian, false);
  const auto expected = run(*experts, all);
  const auto hidden = static_cast<std::size_t>(g.hidden);

  Rows late = make_rows(g, {12}, InputKind::kGaussian, false);
  const auto begin = upload(std::vector<std::int64_t>{3});
  const auto count = upload(std::vector<std::int32_t>{9});
  late.rows.begin = as<std::int64_t>(begin), late.rows.count = as<std::int32_t>(count);
  const auto y = run(*experts, late);
  for (std::size_t i = 0; i < y.size(); ++i) {
    ASSERT_EQ(y[i], i < 3 * hidden ? kNan : expected[i]) << "row " << i / hidden;
  }

  // Without begin and count every row is valid.
  const auto codes = backend_->allocate(y.size()), scale = backend_->allocate(y.size() / 32);
  ops_->quantize(as<std::uint16_t>(all.x),
                 {.num_experts = 1, .max_rows = 12, .max_rows_per_expert = 12}, false,
                 {.codes = as<std::uint8_t>(codes), .scale = as<float>(scale), .width = g.hidden},
                 stream_);
  EXPECT_EQ(download<std::uint8_t>(*codes, y.size()), download<std::uint8_t>(*all.codes, y.size()));
}

/// Kernels that start early must still see what the kernels before them wrote.
TEST_F(CudaExpertsTest, ReplaysOfAChainGiveTheSameBits) {
  const ModelGeometry g = geometry(384, 384);
  const ExpertWeights weights = random_experts(g, DType::kBFloat16, 7);
  const auto experts = ops_->prepare(weights);
  const Rows a = make_rows(g, kRows, InputKind::kGaussian, false);
  const Rows b = make_rows(g, {4, 0, 9, 1, 64, 0, 2, 2, 2, 300, 1, 1, 1, 0, 0, 5, 33},
                           InputKind::kOutliers, false);
  const auto expected_a = run(*experts, a), expected_b = run(*experts, b);
  const auto recording = ops_->record(stream_, [&](const std::function<void()>& mark) {
    mark();
    for (const Rows* r : {&a, &b}) {
      ops_->quantize(as<std::uint16_t>(r->x), r->rows, false, r->in, stream_);
      ops_->expert_stage(*experts, r->in, r->rows, r->h, as<std::uint16_t>(r->y), stream_, nullptr);
    }
    mark();
  });
  for (int i = 0; i < 200; ++i) recording->replay();
  EXPECT_GT(recording->marks_us().at(0), 0);
  EXPECT_TRUE(download<std::uint16_t>(*a.y, expected_a.size()) == expected_a);
  EXPECT_TRUE(download<std::uint16_t>(*b.y, expected_b.size()) == expected_b);
}

TEST_F(CudaExpertsTest, CeilingsAreThoseOfTheDevice) {
  const double reads = backend_->measure_read_bandwidth(),
               fp8 = backend_->measure_arithmetic_rate();
  std::printf("reads %.0f GB/s, FP8 %.0f TFLOPS\n", reads * 1e-9, fp8 * 1e-12);
  EXPECT_GT(reads, 1e12);
  EXPECT_LT(reads, 6e12);
  EXPECT_GT(fp8, 5e14);
  EXPECT_LT(fp8, 2.2e15);  // 4096 multiply-adds per SM and cycle, 132 SMs, 1.98 GHz.
}

}  // namespace
}  // namespace sluice::testing
