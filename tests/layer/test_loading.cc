// Layers that go from the files straight to the backend have the bytes of those that were mapped
// and repacked; host memory is bounded; and a failure on one rank is everybody's, and leaves
// nothing.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <limits>
#include <map>
#include <numeric>
#include <string>

#include "checkpoint/expert_reader.h"
#include "checkpoint/safetensors.h"
#include "core/mmap.h"
#include "layer/group_fixture.h"
#include "multirank/run_ranks.h"
#include "sluice/loading.h"
#include "sluice/local_experts.h"
#include "support/counting.h"
#include "support/scalar_backend.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;

std::vector<int> layers_of(const Checkpoint& checkpoint) {
  return checkpoint.moe_layers();
}

/// Every layout, group size and dtype of scales that there is.
struct Case {
  const char* format;
  int group;
  DType scale_dtype;
};
constexpr Case kCases[] = {{"w4afp8", 128, DType::kFloat32},
                           {"w4afp8", 128, DType::kBFloat16},
                           {"compressed-tensors", 128, DType::kBFloat16},
                           {"compressed-tensors", 32, DType::kFloat32},
                           {"kimi-int4", 32, DType::kBFloat16},
                           {"angelslim", 128, DType::kBFloat16},
                           {"modelopt-w4a8-awq", 128, DType::kFloat32},
                           {"modelopt-w4a8-awq", 32, DType::kBFloat16}};

SyntheticCheckpoint spec_of(const Case& c, int num_layers = 2) {
  ModelGeometry geometry = group_geometry();
  geometry.group_size = c.group;
  return {.geometry = geometry,
          .format = c.format,
          .num_layers = num_layers,
          .scale_dtype = c.scale_dtype};
}

TEST(Loading, GivesTheBytesOfMappedWeightsInEveryLayout) {
  for (const Case& c : kCases) {
    SCOPED_TRACE(std::string(c.format) + " in groups of " + std::to_string(c.group));
    const LayersOnDisk files(spec_of(c));
    run_ranks(2, [&](Transport& transport) {
      const auto backend = make_backend({.num_threads = 1});
      LayerGroup group = LayerGroup::create(group_config(), transport, *backend);
      std::vector<Layer> loaded =
          group.add_layers(files.checkpoint(), layers_of(files.checkpoint()));
      ASSERT_EQ(loaded.size(), 2U);
      for (std::size_t i = 0; i < loaded.size(); ++i) {
        Layer mapped = group.add_layer(read_layer(
            files.checkpoint(), files.layer(static_cast<int>(i)), group.rank(), group.num_ranks()));
        EXPECT_EQ(loaded[i].name(), mapped.name());
        EXPECT_EQ(loaded[i].weight_bytes(), mapped.weight_bytes());
        EXPECT_EQ(loaded[i].weight_digest(), mapped.weight_digest());
        const Workload load = tokens_of(transport.rank());
        EXPECT_EQ(forward(loaded[i], Mode::kNormal, load), forward(mapped, Mode::kNormal, load));
      }
      EXPECT_NE(loaded[0].weight_digest(), loaded[1].weight_digest());
    });
  }
}

TEST(Loading, MemoryOfTheGroupIsThatOfMappedWeights) {
  const LayersOnDisk files(spec_of(kCases[0]));
  const auto transports = make_inproc_transports(1);
  const auto backend = make_backend({.num_threads = 1});
  LayerGroup one = LayerGroup::create(group_config(), *transports[0], *backend);
  LayerGroup other = LayerGroup::create(group_config(), *transports[0], *backend);
  const std::vector<Layer> loaded =
      one.add_layers(files.checkpoint(), layers_of(files.checkpoint()));
  std::vector<Layer> mapped;
  for (const int layer : layers_of(files.checkpoint())) {
    mapped.push_back(other.add_layer(read_layer(files.checkpoint(), layer, 0, 1)));
  }
  const LayerGroupMemory a = one.memory(), b = other.memory();
  EXPECT_EQ(a.num_layers, b.num_layers);
  EXPECT_EQ(a.codes_bytes, b.codes_bytes);
  EXPECT_EQ(a.scales_bytes, b.scales_bytes);
  EXPECT_EQ(a.prepared_bytes, b.prepared_bytes);
  EXPECT_EQ(a.scratch_bytes, b.scratch_bytes);
}

/// Bytes of the tensors of experts [first, first + count), by the headers.
std::uint64_t bytes_of(const Checkpoint& checkpoint, int layer, int first, int count) {
  return ExpertReader(checkpoint, layer, first, count).file_bytes();
}

TEST(Loading, ARankReadsItsOwnExpertsAlone) {
  const LayersOnDisk files(spec_of(kCases[0]));
  const std::vector<int> layers = layers_of(files.checkpoint());
  for (const int num_ranks : {1, 2, 4}) {
    run_ranks(num_ranks, [&](Transport& transport) {
      const auto backend = make_backend({.num_threads = 1});
      LayerGroup group = LayerGroup::create(group_config(), transport, *backend);
      const std::vector<Layer> made = group.add_layers(files.checkpoint(), layers);
      const int count = group_geometry().num_experts / num_ranks;
      std::uint64_t expected = 0;
      for (const int layer : layers) {
        expected += bytes_of(files.checkpoint(), layer, transport.rank() * count, count);
      }
      EXPECT_EQ(group.load_stats().file_bytes, expected);
      EXPECT_EQ(group.load_stats().prepared_bytes, group.memory().prepared_bytes);
      EXPECT_GT(group.load_stats().seconds, 0);
    });
  }
}

TEST(Loading, HostMemoryIsAPieceForEachThreadHoweverManyExperts) {
  SyntheticCheckpoint spec = spec_of(kCases[4], 3);
  spec.geometry.num_experts = 32;
  const LayersOnDisk files(spec);
  ExpertReader reader(files.checkpoint(), files.layer(0), 0, 32);
  const auto transports = make_inproc_transports(1);
  for (const int threads : {1, 3, 8}) {
    CountingBackend backend({.num_threads = 1});
    LayerGroupConfig config = group_config();
    config.geometry.num_experts = 32;
    LayerGroup group = LayerGroup::create(config, *transports[0], backend);
    const std::size_t before = backend.allocated_bytes;
    const auto made = group.add_layers(files.checkpoint(), layers_of(files.checkpoint()), {},
                                       {.num_threads = threads});
    EXPECT_EQ(group.load_stats().num_threads, threads);
    const auto count = static_cast<std::size_t>(threads);
    EXPECT_EQ(backend.slots_bytes, count * (reader.scales_bytes() + reader.piece_bytes()));
    EXPECT_EQ(group.load_stats().host_bytes, backend.slots_bytes + count * reader.piece_bytes());
    // Little more than the codes and scales of a matrix.
    EXPECT_LT((reader.scales_bytes() + reader.piece_bytes()) * 32 * 3, 2 * reader.file_bytes());
    EXPECT_LT(before, backend.allocated_bytes);
  }
}

/// Puts a NaN into the first scale of a matrix.
void spoil_scale(const std::filesystem::path& dir, const std::string& tensor) {
  for (const auto& file : std::filesystem::directory_iterator(dir)) {
    if (file.path().extension() != ".safetensors") continue;
    const auto mapped = MappedFile::open(file.path());
    const auto header = parse_safetensors_header(mapped->bytes(), file.path().string());
    for (const SafetensorsEntry& t : header.tensors) {
      if (t.name != tensor) continue;
      const float nan = std::numeric_limits<float>::quiet_NaN();
      std::fstream out(file.path(), std::ios::in | std::ios::out | std::ios::binary);
      out.seekp(static_cast<std::streamoff>(header.data_begin + t.begin));
      out.write(reinterpret_cast<const char*>(&nan), sizeof nan);
      if (!out.flush()) throw std::runtime_error("cannot spoil " + tensor);
      return;
    }
  }
  throw std::runtime_error("no tensor " + tensor);
}

TEST(Loading, AFailureOnOneRankIsNamedByAllAndLeavesTheGroupAsItWas) {
  const LayersOnDisk files(spec_of(kCases[0], 3));
  const std::vector<int> layers = layers_of(files.checkpoint());
  // Expert 6 of 8 is rank 1's of 2.
  const std::string tensor =
      "model.layers." + std::to_string(layers[1]) + ".mlp.experts.6.up_proj.weight_scale_inv";
  spoil_scale(files.checkpoint().path(), tensor);
  run_ranks(2, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    LayerGroup group = LayerGroup::create(group_config(), transport, *backend);
    Layer before = group.add_layer(files.checkpoint(), layers[0]);
    const LayerGroupMemory memory = group.memory();
    for (int attempt = 0; attempt < 2; ++attempt) {
      try {
        (void)group.add_layers(files.checkpoint(), layers);
        ADD_FAILURE() << "nothing was refused";
      } catch (const Error& error) {
        if (transport.rank() == 1) {
          EXPECT_EQ(error.code(), ErrorCode::kCorruptFile) << error.what();
          EXPECT_THAT(error.what(), HasSubstr(".safetensors: tensor " + tensor));
        } else {
          EXPECT_EQ(error.code(), ErrorCode::kTransport) << error.what();
          EXPECT_EQ(error.ranks(), std::vector<int>{1});
          EXPECT_THAT(error.what(), HasSubstr("rank(s) 1 could not load their experts"));
        }
      }
      EXPECT_EQ(group.memory().num_layers, memory.num_layers);
      EXPECT_EQ(group.memory().total_bytes(), memory.total_bytes());
    }
    Layer after = group.add_layer(files.checkpoint(), layers[2]);
    const Workload load = tokens_of(transport.rank());
    EXPECT_NE(forward(before, Mode::kLowLatency, load), forward(after, Mode::kLowLatency, load));
  });
}

TEST(Loading, WeightsThatOneRankCannotRepackEndTheCallOnAll) {
  const LayersOnDisk files(spec_of(kCases[0], 1));
  /// Takes any shapes, and then has no memory.
  struct Full final : ScalarBackend {
    std::unique_ptr<PreparedExperts> prepare(const ExpertWeights&) override {
      throw Error(ErrorCode::kOutOfMemory, "full");
    }
  };
  run_ranks(2, [&](Transport& transport) {
    const auto real = make_backend({.num_threads = 1});
    Full full;
    Backend& backend = transport.rank() == 0 ? static_cast<Backend&>(full) : *real;
    LayerGroup group = LayerGroup::create(group_config(), transport, backend);
    try {
      (void)group.add_layer(read_layer(files.checkpoint(), files.layer(0), transport.rank(), 2));
      ADD_FAILURE() << "nothing was refused";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(),
                transport.rank() == 0 ? ErrorCode::kOutOfMemory : ErrorCode::kTransport);
    }
  });
}

/// Has memory for the experts of one layer.
struct RoomForOne final : ScalarBackend {
  std::unique_ptr<ExpertBuilder> make_builder(const ExpertWeights& shapes) override {
    if (num_made++ > 0) throw Error(ErrorCode::kOutOfMemory, "no room for a second layer");
    return ScalarBackend::make_builder(shapes);
  }
  int num_made = 0;
};

// Memory for a layer is taken while the layers before it are read. What fails first is told all the
// same, in the order of the layers.
TEST(Loading, ALayerWithoutMemoryEndsTheLoadUnlessOneBeforeItFails) {
  const LayersOnDisk files(spec_of(kCases[0], 3));
  const std::vector<int> layers = layers_of(files.checkpoint());
  const auto transports = make_inproc_transports(1);
  const auto refused = [&](ErrorCode code, const std::string& text) {
    for (int attempt = 0; attempt < 8; ++attempt) {
      RoomForOne backend;
      LayerGroup group = LayerGroup::create(group_config(), *transports[0], backend);
      try {
        (void)group.add_layers(files.checkpoint(), layers, {}, {.num_threads = 3});
        ADD_FAILURE() << "nothing was refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), code) << error.what();
        EXPECT_THAT(error.what(), HasSubstr(text));
      }
      EXPECT_EQ(group.memory().num_layers, 0);
    }
  };
  refused(ErrorCode::kOutOfMemory, "no room for a second layer");
  const std::string tensor =
      "model.layers." + std::to_string(layers[0]) + ".mlp.experts.7.down_proj.weight_scale_inv";
  spoil_scale(files.checkpoint().path(), tensor);
  refused(ErrorCode::kCorruptFile, tensor);
}

TEST(Loading, ProgressRisesToOneAndMayEndTheLoad) {
  const LayersOnDisk files(spec_of(kCases[2]));
  const std::vector<int> layers = layers_of(files.checkpoint());
  const auto transports = make_inproc_transports(1);
  const auto backend = make_backend({.num_threads = 1});
  LayerGroup group = LayerGroup::create(group_config(), *transports[0], *backend);
  std::vector<double> told;
  const auto made = group.add_layers(files.checkpoint(), layers, {},
                                     {.progress = [&](double done) { told.push_back(done); }});
  ASSERT_FALSE(told.empty());
  EXPECT_EQ(told.back(), 1.0);
  EXPECT_TRUE(std::ranges::is_sorted(told));

  struct Stop {};
  const LayerGroupMemory memory = group.memory();
  EXPECT_THROW((void)group.add_layers(files.checkpoint(), layers, {},
                                      {.progress = [](double) { throw Stop(); }}),
               Stop);
  EXPECT_EQ(group.memory().total_bytes(), memory.total_bytes());
  EXPECT_EQ(group.add_layer(files.checkpoint(), layers[0]).weight_digest(),
            made[0].weight_digest());
}

TEST(Loading, LocalExpertsAreThoseOfMappedWeights) {
  const LayersOnDisk files(spec_of(kCases[5]));
  const ModelGeometry g = group_geometry();
  const auto backend = make_backend({.num_threads = 1});
  LocalGroup group = LocalGroup::create(
      {.hidden = g.hidden, .intermediate = g.intermediate, .max_entries = 64}, *backend);
  const std::vector<int> layers = layers_of(files.checkpoint());
  const auto loaded = group.add_layers(files.checkpoint(), layers, 2, 3);
  ASSERT_EQ(loaded.size(), layers.size());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const LocalExperts mapped = group.add_layer(files.checkpoint().load_experts(layers[i], 2, 3));
    EXPECT_EQ(loaded[i].name(), mapped.name());
    EXPECT_EQ(loaded[i].first_expert(), 2);
    EXPECT_EQ(loaded[i].num_experts(), 3);
    EXPECT_EQ(loaded[i].weight_digest(), mapped.weight_digest());
  }
  EXPECT_EQ(group.load_stats().file_bytes, bytes_of(files.checkpoint(), layers[0], 2, 3) +
                                               bytes_of(files.checkpoint(), layers[1], 2, 3));
  EXPECT_THROW((void)group.add_layers(files.checkpoint(), layers, 6, 3), Error);
  EXPECT_THROW((void)group.add_layers(files.checkpoint(), layers, 0, 1, {}, {.num_threads = -1}),
               Error);
  EXPECT_TRUE(group.add_layers(files.checkpoint(), {}, 0, 1).empty());
}

}  // namespace
}  // namespace sluice::testing
