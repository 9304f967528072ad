// Every activation function from a checkpoint's config.json to the outputs of the layer: against
// float64 where limits bite, and by layer.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "layer_fixture.h"
#include "sluice/layer.h"

namespace sluice::testing {
namespace {

/// Parameters low enough to bite: gate and up are about 1.
const char* const kActivations[] = {"swiglu:limit=0.5", "swiglu-oai:alpha=1.702,limit=0.5",
                                    "situ:beta=1,linear_beta=0.5"};

SyntheticCheckpoint spec_with(const char* activation, int num_layers = 1) {
  SyntheticCheckpoint spec{.geometry = small_geometry(), .num_layers = num_layers};
  spec.geometry.name = "deepseek_test";  // The model type: it says what a limit limits.
  spec.geometry.activation = parse_activation(activation);
  return spec;
}

TEST(LayerActivations, EveryKindAgreesWithFloat64AndNotWithSwiglu) {
  const TemporaryCheckpoint plain_files(spec_with("swiglu"));
  const Checkpoint plain = Checkpoint::open(plain_files.path());
  for (const char* const activation : kActivations) {
    const TemporaryCheckpoint files(spec_with(activation));
    const Checkpoint checkpoint = Checkpoint::open(files.path());
    EXPECT_EQ(to_string(checkpoint.geometry().activation), activation);
    for (const char* const recipe : {"direct", "bf16-static"}) {
      for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
        SCOPED_TRACE(::testing::Message() << activation << ' ' << recipe << ' ' << to_string(mode));
        const LayerCase c{.tokens = {5, 2, 4}, .mode = mode, .recipe = parse_recipe(recipe)};
        const LayerOutcome outcome = run_layer(checkpoint, c);
        const VerifyReport report = verify_all(checkpoint, c, outcome);
        EXPECT_TRUE(report.passed()) << report.worst_ratio;
        EXPECT_EQ(report.num_rows, 11);
        // The same weights with plain SwiGLU are another layer, far beyond the bounds.
        const VerifyReport other = verify_all(plain, c, outcome);
        EXPECT_GT(other.num_wrong, other.num_elements / 4);
      }
    }
  }
}

std::vector<std::uint16_t> outputs_of(const Checkpoint& checkpoint, int layer, LayerGroup& group) {
  const ModelGeometry& g = checkpoint.geometry();
  const Workload load = make_workload(
      {.num_experts = g.num_experts, .num_topk = g.num_topk, .hidden = g.hidden, .seed = 7}, 0, 4);
  std::vector<std::uint16_t> y(load.x.size());
  MutableTensorView out;
  out.data = y.data(), out.dtype = DType::kBFloat16, out.shape = load.x_view().shape;
  Layer made = group.add_layer(read_layer(checkpoint, layer, 0, 1));
  made.forward(Mode::kNormal, load.x_view(), load.routing_view(), out, {});
  return y;
}

TEST(LayerActivations, LayersOfOneGroupHaveTheirOwn) {
  const TemporaryCheckpoint listed(spec_with("swiglu:limit=0.5", 3)),
      half(spec_with("swiglu:limit=0.5", 3)), plain(spec_with("swiglu", 3));
  const auto file = listed.path() / "config.json";
  nlohmann::ordered_json config = nlohmann::ordered_json::parse(std::ifstream(file));
  const int first = config.at("first_k_dense_replace");
  std::vector<double> limits(static_cast<std::size_t>(first) + 3, 0.25);
  limits[static_cast<std::size_t>(first)] = 0, limits[static_cast<std::size_t>(first) + 2] = 0.5;
  config["swiglu_limit"] = limits;
  std::ofstream(file) << config;

  const auto transports = make_inproc_transports(1);
  const auto backend = make_backend({.num_threads = 1});
  LayerGroup group =
      LayerGroup::create({.geometry = small_geometry(), .normal = {.max_tokens_per_rank = 4}},
                         *transports[0], *backend);
  const Checkpoint by_list = Checkpoint::open(listed.path());
  const Checkpoint by_half = Checkpoint::open(half.path()), none = Checkpoint::open(plain.path());
  const auto at = [&](const Checkpoint& c, int layer) {
    return outputs_of(c, first + layer, group);
  };
  EXPECT_EQ(at(by_list, 0), at(none, 0));
  EXPECT_NE(at(by_list, 1), at(none, 1));
  EXPECT_NE(at(by_list, 1), at(by_half, 1));
  EXPECT_EQ(at(by_list, 2), at(by_half, 2));
  EXPECT_NE(at(by_half, 2), at(none, 2));
}

}  // namespace
}  // namespace sluice::testing
