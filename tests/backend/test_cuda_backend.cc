// The CUDA backend against the formats' definitions, byte for byte, and whole layers against
// float64. Skips itself where there is no device.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <thread>

#include "backend/ops.h"
#include "core/counter_rng.h"
#include "layer/layer_fixture.h"
#include "sluice/quant.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

constexpr int kWidth = 640;  // Five groups: the last unit of a row is short.

/// Rows of five experts, uneven, with gaps between them; the rest is padding.
struct Layout {
  std::vector<std::int32_t> num_rows = {0, 7, 1, 0, 40};
  std::vector<std::int64_t> row_begin = {0, 3, 11, 12, 20};
  std::int64_t max_rows = 61;
  [[nodiscard]] bool valid(std::int64_t row) const {
    for (std::size_t e = 0; e < num_rows.size(); ++e) {
      if (row >= row_begin[e] && row < row_begin[e] + num_rows[e]) return true;
    }
    return false;
  }
};

/// bf16 rows in which every bit pattern occurs: all classes of numbers, NaN and infinities
/// included.
std::vector<std::uint16_t> every_pattern(std::int64_t max_rows, bool with_specials) {
  std::vector<std::uint16_t> x(static_cast<std::size_t>(max_rows * kWidth));
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<std::uint16_t>(i * 40503u);
    if (!with_specials && (x[i] & 0x7f80) == 0x7f80) x[i] = 0x3f80;
    const std::size_t group = i / 128;
    if (group % 7 == 3) x[i] = 0;                                          // All zero.
    if (group % 7 == 5) x[i] = static_cast<std::uint16_t>(x[i] & 0x83ff);  // All tiny.
    if (group % 7 >= 1 && group % 7 <= 2)
      x[i] = static_cast<std::uint16_t>((x[i] & 0x87ff) | 0x3c00);
  }
  return x;
}

TEST_F(CudaBackendTest, QuantizeGivesTheDefinedBytesAndTouchesNothingElse) {
  const Layout layout;
  for (const bool with_specials : {false, true}) {
    const auto x = every_pattern(layout.max_rows, with_specials);
    const auto dx = upload(x), begin = upload(layout.row_begin), count = upload(layout.num_rows);
    const RowRanges rows{.num_experts = 5,
                         .begin = as<std::int64_t>(begin),
                         .count = as<std::int32_t>(count),
                         .max_rows = layout.max_rows,
                         .max_rows_per_expert = layout.max_rows,
                         .expected_m = 10};
    for (const int kind : {0, 1, 2, 3}) {  // Group, power of two, static, token.
      const auto codes = upload(std::vector<std::uint8_t>(x.size(), 0xa5));
      const auto scale = upload(std::vector<float>(x.size() / 128, -7.0f));
      const Fp8Rows out{.codes = as<std::uint8_t>(codes),
                        .scale = kind == 2 ? nullptr : as<float>(scale),
                        .static_scale = kind == 2 ? 0.013f : 0.0f,
                        .width = kWidth,
                        .scale_per_row = kind == 3};
      ops_->quantize(as<std::uint16_t>(dx), rows, kind == 1, out, stream_);
      const auto got = download<std::uint8_t>(*codes, x.size());
      const auto got_scale = download<float>(*scale, x.size() / 128);
      for (std::size_t g = 0; g < x.size() / 128; ++g) {
        const auto row = static_cast<std::int64_t>(g * 128 / kWidth);
        std::vector<std::uint8_t> expected(128, 0xa5);
        float expected_scale = -7.0f;
        if (layout.valid(row)) {
          const std::size_t size = kind == 3 ? kWidth : 128, first = g * 128 / size * size;
          std::vector<float> v(size);
          for (std::size_t i = 0; i < size; ++i) v[i] = bf16_to_float(x[first + i]);
          expected.resize(size);
          if (kind == 0 || kind == 3) expected_scale = quantize_group(v, expected);
          if (kind == 1) expected_scale = quantize_group_pow2(v, expected);
          if (kind == 2) quantize_static(v, 0.013f, expected);
          expected.erase(expected.begin(), expected.begin() + static_cast<long>(g * 128 - first));
          expected.resize(128);
        }
        const std::vector<std::uint8_t> actual(got.begin() + g * 128, got.begin() + (g + 1) * 128);
        ASSERT_EQ(actual, expected) << "kind " << kind << " row " << row << " group " << g;
        const std::size_t at = kind == 3 ? static_cast<std::size_t>(row) : g;
        ASSERT_EQ(got_scale[at], expected_scale) << "kind " << kind << " row " << row;
      }
    }
  }
}

TEST_F(CudaBackendTest, RequantizeGivesTheDefinedBytesAndTouchesNothingElse) {
  const Layout layout;
  std::vector<std::uint8_t> q(static_cast<std::size_t>(layout.max_rows * kWidth));
  for (std::size_t i = 0; i < q.size(); ++i)
    q[i] = static_cast<std::uint8_t>(i * 151u);  // All codes.
  const CounterRng rng(1, 1);
  std::vector<float> scale(q.size() / 128);
  for (std::size_t i = 0; i < scale.size(); ++i) {
    scale[i] = static_cast<float>(std::exp2(-12.0 * rng.uniform(i)));
    if (i % 3 == 0) scale[i] = std::exp2(static_cast<float>(-static_cast<int>(i % 11)));
  }
  const auto dq = upload(q), begin = upload(layout.row_begin), count = upload(layout.num_rows);
  const auto dscale = upload(scale);
  const RowRanges rows{.num_experts = 5,
                       .begin = as<std::int64_t>(begin),
                       .count = as<std::int32_t>(count),
                       .max_rows = layout.max_rows,
                       .max_rows_per_expert = layout.max_rows,
                       .expected_m = 10};
  for (const float s1 : {0.013f, 0.0078125f}) {
    const auto codes = upload(std::vector<std::uint8_t>(q.size(), 0xa5));
    ops_->requantize({.codes = as<std::uint8_t>(dq), .scale = as<float>(dscale), .width = kWidth},
                     rows, {.codes = as<std::uint8_t>(codes), .static_scale = s1, .width = kWidth},
                     stream_);
    const auto got = download<std::uint8_t>(*codes, q.size());
    for (std::size_t g = 0; g < q.size() / 128; ++g) {
      std::vector<std::uint8_t> expected(128, 0xa5);
      if (layout.valid(static_cast<std::int64_t>(g * 128 / kWidth))) {
        requantize({&q[g * 128], 128}, scale[g], s1, expected);
      }
      const std::vector<std::uint8_t> actual(got.begin() + g * 128, got.begin() + (g + 1) * 128);
      ASSERT_EQ(actual, expected) << "group " << g;
    }
  }
}

/// More rows than expected, narrow and wide ones, few and many experts, two rows of padding
/// between.
TEST_F(CudaBackendTest, ElementwiseKernelsFindEveryRowOfEveryExpert) {
  struct Case {
    int width, num_experts, expected_m;
  };
  for (const Case& c :
       {Case{128, 70, 1}, Case{7168, 32, 1}, Case{3584, 1024, 4}, Case{384, 1, 64}}) {
    const CounterRng rng(9, static_cast<std::uint64_t>(c.width));
    std::vector<std::int32_t> num_rows;
    std::vector<std::int64_t> row_begin;
    std::int64_t total = 2;
    for (int e = 0; e < c.num_experts; ++e) {  // Empty experts at both ends and between.
      const bool is_empty = c.num_experts > 1 && (e < 2 || e % 5 == 3 || e > c.num_experts - 3);
      num_rows.push_back(
          is_empty ? 0 : 1 + static_cast<int>(rng.bits(e) % (c.num_experts > 100 ? 5 : 90)));
      row_begin.push_back(total);
      total += num_rows.back() + 2;
    }
    const auto width = static_cast<std::size_t>(c.width);
    std::vector<std::uint16_t> x(static_cast<std::size_t>(total) * width);
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] = bf16_from_float(
          static_cast<float>(static_cast<int>(i * 2654435761u >> 16 & 0xfff) - 2048) / 512.0f);
    }
    const auto dx = upload(x), begin = upload(row_begin), count = upload(num_rows);
    const auto codes = upload(std::vector<std::uint8_t>(x.size(), 0xa5));
    const auto moved = upload(std::vector<std::uint8_t>(x.size(), 0xa5));
    const auto scale = upload(std::vector<float>(x.size() / 128, -7.0f));
    const RowRanges rows{.num_experts = c.num_experts,
                         .begin = as<std::int64_t>(begin),
                         .count = as<std::int32_t>(count),
                         .max_rows = total,
                         .max_rows_per_expert = total,
                         .expected_m = c.expected_m};
    const Fp8Rows q{.codes = as<std::uint8_t>(codes), .scale = as<float>(scale), .width = c.width};
    ops_->quantize(as<std::uint16_t>(dx), rows, false, q, stream_);
    ops_->requantize(q, rows,
                     {.codes = as<std::uint8_t>(moved), .static_scale = 0.01f, .width = c.width},
                     stream_);
    const auto got = download<std::uint8_t>(*codes, x.size());
    const auto got_moved = download<std::uint8_t>(*moved, x.size());
    const auto got_scale = download<float>(*scale, x.size() / 128);
    std::vector<std::uint8_t> expected(x.size(), 0xa5), expected_moved(x.size(), 0xa5);
    std::vector<float> expected_scale(x.size() / 128, -7.0f), v(128);
    for (int e = 0; e < c.num_experts; ++e) {
      const auto first = static_cast<std::size_t>(row_begin[e]) * width;
      for (std::size_t at = first; at < first + static_cast<std::size_t>(num_rows[e]) * width;
           at += 128) {
        for (std::size_t i = 0; i < 128; ++i) v[i] = bf16_to_float(x[at + i]);
        expected_scale[at / 128] = quantize_group(v, {&expected[at], 128});
        requantize({&expected[at], 128}, expected_scale[at / 128], 0.01f,
                   {&expected_moved[at], 128});
      }
    }
    EXPECT_TRUE(got == expected) << c.width << " wide, " << c.num_experts << " experts";
    EXPECT_TRUE(got_moved == expected_moved) << c.width << " wide, " << c.num_experts << " experts";
    EXPECT_TRUE(got_scale == expected_scale) << c.width << " wide, " << c.num_experts << " experts";
  }
}

/// One rank on the device; the same tokens on the CPU. Returns the device's outputs as an outcome.
class CudaLayerTest : public CudaBackendTest {
 protected:
  LayerOutcome run(const Checkpoint& checkpoint, const LayerCase& c, int repeats = 1) {
    const ModelGeometry& g = checkpoint.geometry();
    auto transports = make_inproc_transports(1);
    const bool low_latency = c.mode == Mode::kLowLatency;
    const std::optional<Recipe> recipe = c.recipe;
    Engine engine = Engine::create(
        {.layer = checkpoint.moe_layers().front(),
         .low_latency = low_latency ? recipe : std::nullopt,
         .normal = low_latency ? std::nullopt : recipe,
         .max_tokens_per_rank = c.max_tokens_per_rank ? c.max_tokens_per_rank
                                                      : std::max(1, static_cast<int>(c.tokens[0])),
         .max_m = c.max_m,
         .routed_scaling_factor = c.routed_scaling_factor},
        checkpoint, *transports[0], *backend_);
    LayerOutcome out;
    Workload load = make_workload({.num_experts = g.num_experts,
                                   .num_topk = g.num_topk,
                                   .hidden = g.hidden,
                                   .routing = c.routing,
                                   .seed = 7},
                                  0, c.tokens[0]);
    if (c.edit) c.edit(0, load);
    const auto x = upload(load.x), weights = upload(load.topk_weights);
    const auto idx = upload(load.topk_idx);
    const auto y = upload(std::vector<std::uint16_t>(load.x.size(), 0x7fc1));
    const Device device = backend_->device();
    const Shape slots{load.num_tokens, load.num_topk};
    MutableTensorView out_view;
    out_view.data = y->data(), out_view.dtype = DType::kBFloat16;
    out_view.shape = load.x_view().shape, out_view.device = device;
    engine.record_gemm_input_digest(true);
    engine.record_stats(true);
    for (int i = 0; i < repeats; ++i) {
      engine.forward(c.mode, {x->data(), DType::kBFloat16, load.x_view().shape, device},
                     {.topk_idx = {idx->data(), DType::kInt32, slots, device},
                      .topk_weights = {weights->data(), DType::kFloat32, slots, device}},
                     out_view, stream_);
      const auto bits = download<std::uint16_t>(*y, load.x.size());
      if (i == 0) {
        out.y.push_back(bits);
      } else if (bits != out.y[0]) {
        ADD_FAILURE() << "repeat " << i << " gave other bits";
      }
    }
    out.recipe = engine.recipe(c.mode);
    out.digest = engine.gemm_input_digest();
    out.stats.push_back(engine.stats());
    out.loads.push_back(std::move(load));
    return out;
  }

  static VerifyReport verify(const Checkpoint& checkpoint, const LayerCase& c,
                             const LayerOutcome& outcome) {
    return verify_all(checkpoint, c, outcome, Device::Kind::kCuda);
  }
};

TEST_F(CudaLayerTest, EveryRecipeInBothModesAgainstFloat64) {
  double worst = 0;
  for (const DType scale_dtype : {DType::kFloat32, DType::kBFloat16}) {
    const TemporaryCheckpoint files({.geometry = small_geometry(), .scale_dtype = scale_dtype});
    const Checkpoint checkpoint = Checkpoint::open(files.path());
    for (const auto& [name, recipe] : named_recipes()) {
      std::vector<std::uint16_t> first;
      for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
        for (const std::int64_t tokens : {1, 17, 130}) {
          SCOPED_TRACE(::testing::Message()
                       << name << ' ' << to_string(mode) << " tokens " << tokens);
          const LayerCase c{.tokens = {tokens}, .mode = mode, .recipe = recipe};
          const LayerOutcome outcome = run(checkpoint, c);
          const VerifyReport report = verify(checkpoint, c, outcome);
          EXPECT_TRUE(report.passed())
              << report.num_wrong << " wrong; token " << report.worst_token << " element "
              << report.worst_element << " is " << report.worst_actual << ", float64 "
              << report.worst_expected << ", bound " << report.worst_bound;
          worst = std::max(worst, report.worst_ratio);
          // A token's bits depend on no other token, and on no mode.
          if (first.empty()) first = outcome.y[0];
          EXPECT_TRUE(std::equal(first.begin(), first.end(), outcome.y[0].begin()));
        }
      }
    }
  }
  std::printf("worst error: %.3f of its bound\n", worst);
}

TEST_F(CudaLayerTest, Gemm1ReadsTheSameBytesAsOnTheCpuAndByBothRoads) {
  const TemporaryCheckpoint files({.geometry = small_geometry()});
  const Checkpoint checkpoint = Checkpoint::open(files.path());
  for (const auto& [name, recipe] : named_recipes()) {
    const LayerCase c{.tokens = {33}, .recipe = recipe};
    const LayerOutcome cpu = run_layer(checkpoint, c);
    EXPECT_EQ(run(checkpoint, c).digest, cpu.digest) << name;
  }
  EXPECT_EQ(run(checkpoint, {.tokens = {33}, .recipe = parse_recipe("direct")}).digest,
            run(checkpoint, {.tokens = {33}, .recipe = parse_recipe("direct-bf16")}).digest);
}

TEST_F(CudaLayerTest, UglyCases) {
  const TemporaryCheckpoint files({.geometry = small_geometry()});
  const Checkpoint checkpoint = Checkpoint::open(files.path());
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    (void)run(checkpoint, {.tokens = {0}, .mode = mode, .max_tokens_per_rank = 4});
    const LayerCase one{.tokens = {70}, .mode = mode, .routing = RoutingKind::kOneExpert};
    EXPECT_TRUE(verify(checkpoint, one, run(checkpoint, one)).passed());
    const LayerCase empty{.tokens = {5}, .mode = mode, .edit = [](int, Workload& load) {
                            std::ranges::fill(load.topk_idx, -1);
                          }};
    const LayerOutcome nothing = run(checkpoint, empty);
    for (const std::uint16_t bits : nothing.y[0]) ASSERT_EQ(bits, 0);
    const LayerCase scaled{.tokens = {9}, .mode = mode, .routed_scaling_factor = 2.5f};
    EXPECT_TRUE(verify(checkpoint, scaled, run(checkpoint, scaled)).passed());
  }
  const LayerCase met{.tokens = {9}, .max_m = 9, .routing = RoutingKind::kOneExpert};
  EXPECT_TRUE(verify(checkpoint, met, run(checkpoint, met)).passed());
  const LayerCase exceeded{.tokens = {9}, .max_m = 8, .routing = RoutingKind::kOneExpert};
  EXPECT_THROW((void)run(checkpoint, exceeded, 2), Error);  // Told by the call after.
}

TEST_F(CudaLayerTest, SameBitsAThousandTimes) {
  const TemporaryCheckpoint files({.geometry = small_geometry()});
  const Checkpoint checkpoint = Checkpoint::open(files.path());
  (void)run(checkpoint, {.tokens = {40}}, 1000);
}

TEST_F(CudaLayerTest, ACapturedGraphReplaysWithOtherRouting) {
  const TemporaryCheckpoint files({.geometry = small_geometry()});
  const Checkpoint checkpoint = Checkpoint::open(files.path());
  const ModelGeometry& g = checkpoint.geometry();
  constexpr std::int64_t kTokens = 37;
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    auto transports = make_inproc_transports(1);
    Engine engine =
        Engine::create({.layer = checkpoint.moe_layers().front(), .max_tokens_per_rank = kTokens},
                       checkpoint, *transports[0], *backend_);
    const auto load_of = [&](RoutingKind routing, std::uint64_t seed) {
      return make_workload({.num_experts = g.num_experts,
                            .num_topk = g.num_topk,
                            .hidden = g.hidden,
                            .routing = routing,
                            .seed = seed},
                           0, kTokens);
    };
    const Workload first = load_of(RoutingKind::kUniform, 1);
    const auto x = upload(first.x), weights = upload(first.topk_weights);
    const auto idx = upload(first.topk_idx);
    const auto y = backend_->allocate(first.x.size() * 2);
    const Device device = backend_->device();
    const Shape slots{kTokens, g.num_topk};
    MutableTensorView out;
    out.data = y->data(), out.dtype = DType::kBFloat16, out.shape = Shape{kTokens, g.hidden};
    out.device = device;
    const auto forward = [&] {
      engine.forward(mode, {x->data(), DType::kBFloat16, out.shape, device},
                     {.topk_idx = {idx->data(), DType::kInt32, slots, device},
                      .topk_weights = {weights->data(), DType::kFloat32, slots, device}},
                     out, stream_);
    };
    forward();  // Kernels load on their first launch, which may not be captured.
    backend_->synchronize(stream_);
    const auto launch = capture(forward);
    for (std::uint64_t seed = 1; seed <= 6; ++seed) {
      const auto routing = seed % 3 == 0   ? RoutingKind::kOneExpert
                           : seed % 3 == 1 ? RoutingKind::kUniform
                                           : RoutingKind::kZipf;
      const Workload load = load_of(routing, seed);
      const auto put = [&](const auto& buffer, const auto& host) {
        backend_->copy_from_host(buffer->data(), host.data(), host.size() * sizeof(host[0]),
                                 stream_);
      };
      put(x, load.x), put(idx, load.topk_idx), put(weights, load.topk_weights);
      launch();
      const auto replayed = download<std::uint16_t>(*y, load.x.size());
      put(y, std::vector<std::uint16_t>(load.x.size(), 0x7fc1));
      forward();
      EXPECT_EQ(download<std::uint16_t>(*y, load.x.size()), replayed) << "seed " << seed;
    }
  }
}

TEST_F(CudaLayerTest, WideLayer) {
  const TemporaryCheckpoint files(
      {.geometry = {
           .name = "wide", .num_experts = 8, .num_topk = 4, .hidden = 7168, .intermediate = 384}});
  const Checkpoint checkpoint = Checkpoint::open(files.path());
  const LayerCase c{.tokens = {24}};
  const VerifyReport report = verify(checkpoint, c, run(checkpoint, c));
  EXPECT_TRUE(report.passed()) << report.worst_ratio;
}

}  // namespace
}  // namespace sluice::testing
