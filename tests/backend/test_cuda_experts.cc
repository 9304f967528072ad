// The expert stage on a CUDA device against float64, by shape, rows per expert and kind of input.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <thread>
#include <tuple>

#include "bench/random_experts.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/workload.h"
#include "sluice/quant.h"
#include "sluice/recipe.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

/// Every boundary of a token tile, with empty experts first and last.
const std::vector<std::int32_t> kRows = {0,  1,  3,   7,   8,   9,    16,   17, 63,
                                         64, 65, 127, 128, 129, 1000, 1024, 0};
constexpr std::int64_t kCheckedRows = 3;  // Of each expert: first, middle, last.

class CudaExpertsTest : public CudaBackendTest {
 protected:
  /// The rows of `num_rows`, quantized and on the device.
  struct Rows {
    Workload load;
    std::vector<std::int32_t> num_rows;
    std::vector<std::int64_t> row_begin;
    std::unique_ptr<DeviceBuffer> x, begin, count, codes, scale, h_codes, h_scale, y;
    RowRanges rows;
    Fp8Rows in, h;
  };

  /// Masked: every expert has as many rows reserved as the largest needs.
  Rows make_rows(const ModelGeometry& g, const std::vector<std::int32_t>& num_rows, InputKind kind,
                 bool masked) {
    Rows r;
    r.num_rows = num_rows;
    const std::int64_t max_m = *std::ranges::max_element(num_rows);
    const auto count = static_cast<std::int64_t>(num_rows.size());
    std::int64_t total = 0;
    for (const std::int32_t n : num_rows) {
      r.row_begin.push_back(total);
      total += masked ? max_m : n;
    }
    const auto elements = static_cast<std::size_t>(total) * static_cast<std::size_t>(g.hidden);
    const auto inner = static_cast<std::size_t>(total) * static_cast<std::size_t>(g.intermediate);
    r.load = make_workload(
        {.num_experts = g.num_experts, .num_topk = 1, .hidden = g.hidden, .input = kind, .seed = 3},
        0, total);
    r.x = upload(r.load.x), r.begin = upload(r.row_begin), r.count = upload(num_rows);
    r.codes = backend_->allocate(elements), r.scale = backend_->allocate(elements / 32);
    r.h_codes = backend_->allocate(inner), r.h_scale = backend_->allocate(inner / 32);
    r.y = upload(std::vector<std::uint16_t>(elements, 0x7fc1));
    r.rows = {.num_experts = g.num_experts,
              .begin = masked ? nullptr : as<std::int64_t>(r.begin),
              .count = as<std::int32_t>(r.count),
              .max_rows = total,
              .max_rows_per_expert = masked ? max_m : total,
              .expected_m = static_cast<int>(total / count)};
    r.in = {.codes = as<std::uint8_t>(r.codes), .scale = as<float>(r.scale), .width = g.hidden};
    r.h = {.codes = as<std::uint8_t>(r.h_codes),
           .scale = as<float>(r.h_scale),
           .width = g.intermediate};
    ops_->quantize(as<std::uint16_t>(r.x), r.rows, false, r.in, stream_);
    return r;
  }

  std::vector<std::uint16_t> run(const PreparedExperts& experts, const Rows& r) {
    ops_->expert_stage(experts, r.in, r.rows, r.h, as<std::uint16_t>(r.y), stream_, nullptr);
    return download<std::uint16_t>(*r.y, r.load.x.size());
  }

  /// Gives the same rows static scales, the smallest at which nothing saturates.
  StaticScales make_static(const PreparedExperts& experts, Rows& r) {
    (void)run(experts, r);
    float amax = 0;
    for (const std::uint16_t v : r.load.x) amax = std::max(amax, std::fabs(bf16_to_float(v)));
    const auto groups = static_cast<std::size_t>(r.rows.max_rows * (r.h.width / kActivationGroup));
    const std::vector<float> h_scale = download<float>(*r.h_scale, groups);
    const StaticScales scales{amax / kE4m3Max, *std::ranges::max_element(h_scale)};
    r.in.scale = nullptr, r.in.static_scale = scales.s1;
    r.h.scale = nullptr, r.h.static_scale = scales.s2;
    ops_->quantize(as<std::uint16_t>(r.x), r.rows, false, r.in, stream_);
    return scales;
  }

  /// Gives the same rows one scale each, and h scales of its own.
  void make_token(Rows& r) {
    r.in.scale = as<float>(r.scale), r.in.static_scale = 0, r.in.scale_per_row = true;
    r.h.scale = as<float>(r.h_scale), r.h.static_scale = 0;
    ops_->quantize(as<std::uint16_t>(r.x), r.rows, false, r.in, stream_);
  }

  /// Element by element, a few rows of each expert; the rest only against NaN.
  static VerifyReport verify(const ExpertWeights& weights, const Rows& r,
                             const std::vector<std::uint16_t>& y,
                             const std::optional<StaticScales>& scales = {}) {
    return verify_recipe(parse_recipe(scales ? "bf16-static" : "direct"), weights, r, y, scales);
  }

  static VerifyReport verify_recipe(const Recipe& recipe, const ExpertWeights& weights,
                                    const Rows& r, const std::vector<std::uint16_t>& y,
                                    const std::optional<StaticScales>& scales) {
    const LayerRecipe resolved =
        resolve_recipe(recipe, Mode::kNormal, DispatchDtype::kAuto, scales, "test");
    const LayerReference reference(weights, resolved, 1.0f, error_model(Device::Kind::kCuda));
    const auto hidden = static_cast<std::size_t>(r.in.width);
    std::vector<VerifyReport> reports(r.num_rows.size());
    std::vector<std::thread> threads;
    for (std::size_t e = 0; e < r.num_rows.size(); ++e) {
      threads.emplace_back([&, e] {
        const std::int64_t n = r.num_rows[e], checked = std::min(kCheckedRows, n);
        const auto expert = static_cast<std::int32_t>(e);
        const float weight = 1.0f;
        for (std::int64_t i = 0; i < checked; ++i) {
          const std::int64_t row =
              r.row_begin[e] + i * (n - 1) / std::max<std::int64_t>(1, checked - 1);
          const std::size_t at = static_cast<std::size_t>(row) * hidden;
          compare_row(reference.row(&r.load.x[at], &expert, &weight, 1), &y[at], row, reports[e]);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    VerifyReport all;
    for (const VerifyReport& one : reports) {
      all.num_rows += one.num_rows, all.num_wrong += one.num_wrong;
      if (one.worst_ratio >= all.worst_ratio) {
        all.worst_ratio = one.worst_ratio, all.worst_token = one.worst_token;
        all.worst_element = one.worst_element;
      }
    }
    return all;
  }
};

ModelGeometry geometry(int hidden, int intermediate, int group_size = 128) {
  return {.name = "shapes",
          .num_experts = static_cast<int>(kRows.size()),
          .num_topk = 1,
          .hidden = hidden,
          .intermediate = intermediate,
          .group_size = group_size};
}

TEST_F(CudaExpertsTest, EveryShapeAndInputWithinItsBound) {
  struct Shape {
    int hidden, intermediate, group_size;
  };
  for (const InputKind kind : {InputKind::kGaussian, InputKind::kOutliers, InputKind::kMassive,
                               InputKind::kRealistic, InputKind::kStudentT}) {
    double worst = 0;
    for (const Shape& shape :
         {Shape{128, 128, 128}, Shape{384, 1792, 128}, Shape{1792, 384, 32}, Shape{3584, 384, 128},
          Shape{7168, 128, 128}, Shape{128, 7168, 128}, Shape{384, 3584, 32}}) {
      const ModelGeometry g = geometry(shape.hidden, shape.intermediate, shape.group_size);
      for (const CodeRange range : {CodeRange::kAll, CodeRange::kSymmetric}) {
        const ExpertWeights weights = random_experts(g, DType::kBFloat16, 5, range);
        const auto experts = ops_->prepare(weights);
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
          worst = std::max(worst, report.worst_ratio);
        }
      }
    }
    std::printf("input %d: worst error %.3f of its bound\n", static_cast<int>(kind), worst);
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
      for (const bool masked : {false, true}) {
        SCOPED_TRACE(::testing::Message()
                     << "hidden " << hidden << " groups of " << group_size << " input "
                     << static_cast<int>(kind) << (masked ? " masked" : ""));
        Rows r = make_rows(g, kRows, kind, masked);
        make_token(r);
        const auto whole = run(*experts, r);
        EXPECT_TRUE(verify_recipe(parse_recipe("direct-token"), weights, r, whole, {}).passed());
        for (const ExpertHalf half : {ExpertHalf::kGateUp, ExpertHalf::kDown}) {
          ASSERT_TRUE(ops_->expert_half(half, *experts, r.in, r.rows, r.h, as<std::uint16_t>(r.y),
                                        stream_));
        }
        EXPECT_TRUE(download<std::uint16_t>(*r.y, whole.size()) == whole);
        for (const int expected_m : {1, 256}) {  // The decode kernel, and prefill's.
          r.rows.expected_m = expected_m;
          EXPECT_TRUE(run(*experts, r) == whole) << expected_m << " rows expected";
        }
      }
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
    backend_->copy_from_host(r.y->data(), std::vector<std::uint16_t>(whole.size(), 0x7fc1).data(),
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
    ASSERT_EQ(y[i], i < 3 * hidden ? 0x7fc1 : expected[i]) << "row " << i / hidden;
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
