// Widths that are no multiples of 128, and biases: from a checkpoint's files to the outputs of the
// layer. What is padded inside changes no bit, and gpt-oss' layer agrees with float64.
#include <gtest/gtest.h>

#include "layer_fixture.h"
#include "raw_checkpoint.h"
#include "sluice/layer.h"
#include "sluice/local_experts.h"
#include "temp_dir.h"

namespace sluice::testing {
namespace {

SyntheticCheckpoint spec_of(const char* format, int hidden, int intermediate) {
  ModelGeometry g{.name = "test", .num_experts = 6, .num_topk = 2, .group_size = 32};
  g.set_widths(hidden, intermediate);
  const bool is_int4 = std::string(format) == "kimi-int4";
  return {.geometry = g,
          .format = format,
          .scale_dtype = is_int4 ? DType::kBFloat16 : DType::kFloat8E8M0};
}

SyntheticCheckpoint gpt_oss_spec(int hidden, int intermediate) {
  SyntheticCheckpoint spec = synthetic_preset("gpt-oss-20b");
  spec.geometry.num_experts = 6, spec.geometry.num_topk = 2;
  spec.geometry.activation.limit = 0.5f;  // It bites: gate and up are about 1.
  spec.geometry.set_widths(hidden, intermediate);
  return spec;
}

/// Rows of `row` bytes, each made as long as `to` bytes, and as many as `rows`, by bytes of `fill`.
void widen(RawTensor& tensor, std::size_t to, std::size_t rows, const std::string& fill) {
  const std::size_t own = tensor.bytes.size() / tensor.shape[0];
  std::string out;
  for (std::size_t r = 0; r < rows; ++r) {
    std::string row = r < tensor.shape[0] ? tensor.bytes.substr(r * own, own) : "";
    while (row.size() < to) row += fill;
    out += row;
  }
  tensor.shape = {rows, tensor.shape[1] * to / own};
  tensor.bytes = out;
}

/// The same model as somebody else would pad it: codes of 0 (int4) or -0 (e2m1), scales of 2.
void pad_by_hand(const std::filesystem::path& from, const std::filesystem::path& to, bool is_int4,
                 std::size_t hidden, std::size_t intermediate) {
  RawCheckpoint raw(from);
  raw.config["hidden_size"] = hidden;
  raw.config["moe_intermediate_size"] = intermediate;
  for (auto& [file, tensors] : raw.files) {
    for (auto& [name, tensor] : tensors) {
      const bool is_down = name.find("down_proj") != std::string::npos;
      const std::size_t n = is_down ? hidden : intermediate, k = is_down ? intermediate : hidden;
      if (name.ends_with("weight_packed")) widen(tensor, k / 2, n, "\x88");
      if (name.ends_with("weight_scale")) {
        is_int4 ? widen(tensor, k / 32 * 2, n, std::string("\x00\x40", 2))
                : widen(tensor, k / 32, n, "\x80");
      }
      if (name.ends_with("weight_shape")) {
        const std::int64_t shape[] = {static_cast<std::int64_t>(n), static_cast<std::int64_t>(k)};
        tensor.bytes.assign(reinterpret_cast<const char*>(shape), sizeof shape);
      }
    }
  }
  raw.write(to);
}

TEST(LayerWidths, WhatIsPaddedInsideChangesNoBit) {
  for (const char* const format : {"kimi-mxfp4", "kimi-int4"}) {
    for (const auto& [hidden, inner] : {std::pair{160, 128}, {256, 96}, {288, 224}}) {
      const TempDir dir;
      write_synthetic_checkpoint(spec_of(format, hidden, inner), dir / "narrow");
      const bool is_int4 = std::string(format) == "kimi-int4";
      const Checkpoint narrow = Checkpoint::open(dir / "narrow");
      const ModelGeometry& g = narrow.geometry();
      EXPECT_EQ(g.token_width(), hidden);
      EXPECT_EQ(g.inner_width(), inner);
      EXPECT_EQ(g.hidden % 128, 0);
      EXPECT_EQ(g.intermediate % 128, 0);
      pad_by_hand(dir / "narrow", dir / "wide", is_int4, static_cast<std::size_t>(g.hidden),
                  static_cast<std::size_t>(g.intermediate));
      const Checkpoint wide = Checkpoint::open(dir / "wide");
      EXPECT_EQ(wide.geometry().token_width(), g.hidden);
      for (const char* const recipe : {"direct", "direct-token", "direct-bf16"}) {
        SCOPED_TRACE(::testing::Message() << format << ' ' << hidden << ' ' << inner << recipe);
        LayerCase c{.tokens = {5, 2, 4}, .mode = Mode::kNormal, .recipe = parse_recipe(recipe)};
        const auto clear = [&](int, Workload& load) {
          for (std::size_t i = 0; i < load.x.size(); ++i) {
            if (static_cast<int>(i % static_cast<std::size_t>(g.hidden)) >= hidden) load.x[i] = 0;
          }
        };
        c.edit = clear;
        const LayerOutcome padded = run_layer(narrow, c), by_hand = run_layer(wide, c);
        EXPECT_EQ(padded.all_y(), by_hand.all_y());
        EXPECT_EQ(padded.digest, by_hand.digest);
        const VerifyReport report = verify_all(narrow, c, padded);
        EXPECT_TRUE(report.passed()) << report.worst_ratio;
      }
    }
  }
}

TEST(LayerWidths, GptOssAgreesWithFloat64AndNotWithoutItsBiases) {
  const TempDir dir;
  write_synthetic_checkpoint(gpt_oss_spec(288, 160), dir / "model");
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  EXPECT_EQ(to_string(checkpoint.geometry().activation), "swiglu-oai:alpha=1.702,limit=0.5");
  EXPECT_TRUE(checkpoint.geometry().has_bias);
  for (const char* const recipe : {"direct", "direct-token", "direct-bf16"}) {
    for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
      SCOPED_TRACE(::testing::Message() << recipe << ' ' << to_string(mode));
      const LayerCase c{.tokens = {5, 2, 4}, .mode = mode, .recipe = parse_recipe(recipe)};
      const LayerOutcome outcome = run_layer(checkpoint, c);
      const VerifyReport report = verify_all(checkpoint, c, outcome);
      EXPECT_TRUE(report.passed()) << report.worst_ratio;
      EXPECT_EQ(report.num_rows, 11);
      ExpertWeights bare = checkpoint.load_experts(0, 0, 6);
      for (Expert& e : bare.experts) e.gate.bias = e.up.bias = e.down.bias = {};
      const LayerReference without(bare, outcome.recipe, 1.0f);
      VerifyReport other;
      const Workload& load = outcome.loads[0];
      compare_row(without.row(load.x.data(), load.topk_idx.data(), load.topk_weights.data(), 2),
                  outcome.y[0].data(), 0, other);
      EXPECT_GT(other.num_wrong, other.num_elements / 4);
    }
  }
}

/// The same call with rows of the model's own width, in and out, gives the same channels.
TEST(LayerWidths, CallersBringTheModelsWidth) {
  const TempDir dir;
  write_synthetic_checkpoint(gpt_oss_spec(160, 96), dir / "model");
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  const ModelGeometry& g = checkpoint.geometry();
  const auto transports = make_inproc_transports(1);
  const auto backend = make_backend({.num_threads = 1});
  const LayerGroupConfig config{.geometry = g, .normal = {.max_tokens_per_rank = 4}};
  LayerGroup group = LayerGroup::create(config, *transports[0], *backend);
  Layer layer = group.add_layer(checkpoint, 0);
  // By the other way into a group, whose experts lie in memory.
  Layer mapped = group.add_layer(read_layer(checkpoint, 0, 0, 1));
  EXPECT_EQ(layer.weight_digest(), mapped.weight_digest());
  const Workload load = make_workload({.num_experts = g.num_experts,
                                       .num_topk = g.num_topk,
                                       .hidden = g.hidden,
                                       .num_channels = g.token_width()},
                                      0, 4);
  const auto wide = static_cast<std::size_t>(g.hidden), own = std::size_t{160};
  std::vector<std::uint16_t> x, y(4 * own, 0x7fc1), expected(load.x.size(), 0x7fc1);
  for (std::size_t i = 0; i < load.x.size(); ++i) {
    if (i % wide < own) x.push_back(load.x[i]);
  }
  const auto view = [](std::vector<std::uint16_t>& rows, std::int64_t width) {
    MutableTensorView out;
    out.data = rows.data(), out.dtype = DType::kBFloat16;
    out.shape = {static_cast<std::int64_t>(rows.size()) / width, width};
    return out;
  };
  layer.forward(Mode::kNormal, load.x_view(), load.routing_view(), view(expected, g.hidden), {});
  for (int times = 0; times < 2; ++times) {
    layer.forward(Mode::kNormal, view(x, 160), load.routing_view(), view(y, 160), {});
    for (std::size_t i = 0; i < expected.size(); ++i) {
      ASSERT_EQ(expected[i], i % wide < own ? y[i / wide * own + i % wide] : 0) << i;
    }
  }
  const LayerGroupMemory held = group.memory();
  const PlannedLayer planned{.recipes = {},
                             .weight_format = WeightFormat::kMxfp4,
                             .scale_dtype = DType::kFloat8E8M0,
                             .group_size = 32};
  const std::array layers{planned, planned};
  const LayerGroupMemory plan = LayerGroup::plan_memory(config, layers, Device::Kind::kHost, 1);
  EXPECT_EQ(held.total_bytes(), plan.total_bytes());
  EXPECT_EQ(held.prepared_bytes, plan.prepared_bytes);
  std::vector<std::uint16_t> more(5 * own);
  Workload five = make_workload({.num_experts = 6, .num_topk = 2, .hidden = g.hidden}, 0, 5);
  EXPECT_THROW(
      layer.forward(Mode::kNormal, view(more, 160), five.routing_view(), view(more, 160), {}),
      Error);
}

/// The same of experts without an exchange, which take both widths too.
TEST(LayerWidths, LocalExpertsTakeTheModelsWidth) {
  const TempDir dir;
  write_synthetic_checkpoint(gpt_oss_spec(160, 96), dir / "model");
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  const ModelGeometry& g = checkpoint.geometry();
  const auto backend = make_backend({.num_threads = 1});
  LocalGroup group = LocalGroup::create(
      {.hidden = g.hidden, .intermediate = g.intermediate, .max_entries = 4}, *backend);
  LocalExperts experts =
      std::move(group.add_layers(checkpoint, std::array{0}, 0, g.num_experts).front());
  group.reserve(8);  // Room grows, and what pads stays zero.
  const Workload load = make_workload({.num_experts = g.num_experts,
                                       .num_topk = g.num_topk,
                                       .hidden = g.hidden,
                                       .num_channels = g.token_width()},
                                      0, 4);
  std::vector<std::uint16_t> x, y(4 * 160), wide(load.x.size());
  for (std::size_t i = 0; i < load.x.size(); ++i) {
    if (i % 256 < 160) x.push_back(load.x[i]);
  }
  MutableTensorView out;
  out.dtype = DType::kBFloat16;
  out.data = wide.data(), out.shape = {4, 256};
  experts.forward(load.x_view(), load.routing_view(), out, {});
  out.data = y.data(), out.shape = {4, 160};
  const TensorView narrow(x.data(), DType::kBFloat16, {4, 160});
  experts.forward(narrow, load.routing_view(), out, {});
  LocalCall kept = experts.keep(narrow, load.routing_view(), out);
  for (int times = 0; times < 2; ++times) {
    for (std::size_t i = 0; i < wide.size(); ++i) {
      ASSERT_EQ(wide[i], i % 256 < 160 ? y[i / 256 * 160 + i % 256] : 0) << i;
    }
    std::fill(y.begin(), y.end(), std::uint16_t{0x7fc1});
    kept.run({});
  }
}

/// A backend that does not add biases says so, and names the tensors; there is no plan for it.
TEST(LayerWidths, BiasesAreRefusedWhereTheyAreNotAdded) {
  const ModelGeometry g = preset_geometry("gpt-oss-20b");
  const PlannedLayer planned{.recipes = {},
                             .weight_format = WeightFormat::kMxfp4,
                             .scale_dtype = DType::kFloat8E8M0,
                             .group_size = 32};
  const std::array layers{planned};
  try {
    (void)LayerGroup::plan_memory({.geometry = g, .normal = {.max_tokens_per_rank = 4}}, layers,
                                  Device::Kind::kCuda, 1);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("gate_up_proj_bias"), std::string::npos);
  }
}

}  // namespace
}  // namespace sluice::testing
