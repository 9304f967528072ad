// Widths that are no multiples of 128 on a device: rows of the model's own width go in and come out
// through a copy that pads them, with the bits of rows that the caller padded, within the bounds of
// float64, in graphs, and in a call that was kept.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "layer/layer_fixture.h"
#include "sluice/layer.h"
#include "sluice/local_experts.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

constexpr std::int64_t kTokens = 5;

/// A format of 32-wide groups, and a model's own widths.
struct Widths {
  const char* format;
  int hidden, intermediate;
};

SyntheticCheckpoint spec_of(const Widths& c) {
  ModelGeometry g{.name = "test", .num_experts = 6, .num_topk = 2, .group_size = 32};
  g.set_widths(c.hidden, c.intermediate);
  const bool is_int4 = std::string(c.format) == "kimi-int4";
  return {.geometry = g,
          .format = c.format,
          .scale_dtype = is_int4 ? DType::kBFloat16 : DType::kFloat8E8M0};
}

class CudaLayerWidths : public CudaBackendTest, public ::testing::WithParamInterface<Widths> {
 protected:
  void SetUp() override {
    CudaBackendTest::SetUp();
    if (!backend_) return;
    geometry_ = checkpoint_.geometry();
    load_ = make_workload({.num_experts = geometry_.num_experts,
                           .num_topk = geometry_.num_topk,
                           .hidden = geometry_.hidden,
                           .num_channels = geometry_.token_width()},
                          0, kTokens);
    wide_ = static_cast<std::size_t>(geometry_.hidden);
    own_ = static_cast<std::size_t>(geometry_.token_width());
    std::vector<std::uint16_t> narrow;
    for (std::size_t i = 0; i < load_.x.size(); ++i) {
      if (i % wide_ < own_) narrow.push_back(load_.x[i]);
    }
    x_wide_ = upload(load_.x), x_own_ = upload(narrow);
    idx_ = upload(load_.topk_idx), weights_ = upload(load_.topk_weights);
    y_wide_ = upload(poison(wide_)), y_own_ = upload(poison(own_));
  }
  [[nodiscard]] static std::vector<std::uint16_t> poison(std::size_t width) {
    return std::vector<std::uint16_t>(kTokens * width, 0x7fc1);
  }
  [[nodiscard]] TensorView x(const DeviceBuffer& rows, std::size_t width) const {
    return {rows.data(),
            DType::kBFloat16,
            {kTokens, static_cast<std::int64_t>(width)},
            backend_->device()};
  }
  [[nodiscard]] MutableTensorView y(DeviceBuffer& rows, std::size_t width) const {
    MutableTensorView view;
    view.data = rows.data(), view.dtype = DType::kBFloat16, view.device = backend_->device();
    view.shape = {kTokens, static_cast<std::int64_t>(width)};
    return view;
  }
  [[nodiscard]] Routing routing() const {
    Routing r = load_.routing_view();
    r.topk_idx.data = idx_->data(), r.topk_idx.device = backend_->device();
    r.topk_weights.data = weights_->data(), r.topk_weights.device = backend_->device();
    return r;
  }
  /// Both outputs: channels of the model are the same in both, the others are zeros.
  void expect_same_channels() {
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const auto wide = download<std::uint16_t>(*y_wide_, kTokens * wide_);
    const auto own = download<std::uint16_t>(*y_own_, kTokens * own_);
    for (std::size_t i = 0; i < wide.size(); ++i) {
      ASSERT_EQ(wide[i], i % wide_ < own_ ? own[i / wide_ * own_ + i % wide_] : 0)
          << "row " << i / wide_ << " channel " << i % wide_;
    }
    const auto again = poison(own_);
    backend_->copy_from_host(y_own_->data(), again.data(), again.size() * 2, stream_);
  }
  void expect_within_bounds(const LayerRecipe& recipe) {
    const LayerReference reference(checkpoint_.load_experts(layer_, 0, geometry_.num_experts),
                                   recipe, 1.0f, error_model(Device::Kind::kCuda));
    const auto rows = download<std::uint16_t>(*y_wide_, kTokens * wide_);
    VerifyReport report;
    const auto topk = static_cast<std::size_t>(geometry_.num_topk);
    for (std::size_t t = 0; t < kTokens; ++t) {
      compare_row(reference.row(&load_.x[t * wide_], &load_.topk_idx[t * topk],
                                &load_.topk_weights[t * topk], geometry_.num_topk),
                  &rows[t * wide_], static_cast<std::int64_t>(t), report);
    }
    EXPECT_TRUE(report.passed()) << report.worst_ratio;
  }

  TemporaryCheckpoint files_{spec_of(GetParam())};
  Checkpoint checkpoint_ = Checkpoint::open(files_.path());
  int layer_ = checkpoint_.moe_layers().front();
  ModelGeometry geometry_;
  Workload load_;
  std::size_t wide_ = 0, own_ = 0;
  std::unique_ptr<DeviceBuffer> x_wide_, x_own_, idx_, weights_, y_wide_, y_own_;
};

TEST_P(CudaLayerWidths, ALayerTakesTheModelsWidth) {
  const auto transports = make_inproc_transports(1);
  for (const char* const name : {"direct", "direct-token", "direct-bf16"}) {
    for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
      SCOPED_TRACE(::testing::Message() << name << ' ' << to_string(mode));
      const bool is_fast = mode == Mode::kLowLatency;
      const std::optional<Recipe> recipe = parse_recipe(name);
      Engine engine = Engine::create({.layer = layer_,
                                      .low_latency = is_fast ? recipe : std::nullopt,
                                      .normal = is_fast ? std::nullopt : recipe,
                                      .max_tokens_per_rank = kTokens + 2},
                                     checkpoint_, *transports[0], *backend_);
      const auto narrow = [&] {
        engine.forward(mode, x(*x_own_, own_), routing(), y(*y_own_, own_), stream_);
      };
      engine.forward(mode, x(*x_wide_, wide_), routing(), y(*y_wide_, wide_), stream_);
      narrow();
      expect_same_channels();
      expect_within_bounds(engine.recipe(mode));
      const auto replay = capture(narrow);
      for (int times = 0; times < 2; ++times) {
        replay();
        expect_same_channels();
      }
      engine.check();
    }
  }
}

TEST_P(CudaLayerWidths, LocalExpertsTakeTheModelsWidth) {
  LocalGroup group = LocalGroup::create({.hidden = geometry_.hidden,
                                         .intermediate = geometry_.intermediate,
                                         .max_entries = kTokens * geometry_.num_topk},
                                        *backend_);
  LocalExperts experts = std::move(
      group.add_layers(checkpoint_, std::array{layer_}, 0, geometry_.num_experts).front());
  group.reserve(4 * kTokens * geometry_.num_topk);  // Room grows, and what pads stays zero.
  experts.forward(x(*x_wide_, wide_), routing(), y(*y_wide_, wide_), stream_);
  experts.forward(x(*x_own_, own_), routing(), y(*y_own_, own_), stream_);
  expect_same_channels();
  LocalCall kept = experts.keep(x(*x_own_, own_), routing(), y(*y_own_, own_));
  for (int times = 0; times < 3; ++times) {
    kept.run(stream_);
    expect_same_channels();
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, CudaLayerWidths,
                         ::testing::Values(Widths{"kimi-mxfp4", 160, 128},
                                           Widths{"kimi-mxfp4", 288, 224},
                                           Widths{"kimi-int4", 256, 96},
                                           Widths{"kimi-int4", 288, 224}),
                         [](const auto& c) {
                           std::string name = c.param.format;
                           name.erase(name.find('-'), 1);
                           return name + "_" + std::to_string(c.param.hidden) + "_" +
                                  std::to_string(c.param.intermediate);
                         });

}  // namespace
}  // namespace sluice::testing
