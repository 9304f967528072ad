// The headers of a whole model: 58 layers of 256 experts in 163 shards, 133 632 tensors. The data
// are holes in sparse files.
#include <gtest/gtest.h>

#include <ctime>

#include "model_files.h"
#include "sluice/checkpoint.h"
#include "temp_dir.h"

namespace sluice {
namespace {

constexpr int kFirstLayer = 3, kNumLayers = 58, kNumExperts = 256, kNumShards = 163;
constexpr int kHidden = 256, kIntermediate = 128;

/// Appends `count` bytes under a new name.
void add(std::string& header, std::uint64_t& at, const std::string& name, const char* dtype,
         const std::string& shape, std::uint64_t count) {
  header += (header.empty() ? "{\"" : ",\"") + name + "\":{\"dtype\":\"" + dtype +
            "\",\"shape\":" + shape + ",\"data_offsets\":[" + std::to_string(at) + "," +
            std::to_string(at + count) + "]}";
  at += count;
}

void write_model(const std::filesystem::path& dir) {
  std::vector<std::string> headers(kNumShards);
  std::vector<std::uint64_t> sizes(kNumShards);
  std::string index = "{\"weight_map\":{\"model.norm.weight\":\"0.safetensors\"";
  add(headers[0], sizes[0], "model.norm.weight", "U8", "[1]", 1);
  for (int i = 0; i < kNumLayers * kNumExperts; ++i) {
    const int s = i * kNumShards / (kNumLayers * kNumExperts);
    const std::string expert = "model.layers." + std::to_string(kFirstLayer + i / kNumExperts) +
                               ".mlp.experts." + std::to_string(i % kNumExperts) + ".";
    for (const char* const stem : {"gate_proj", "up_proj", "down_proj"}) {
      const bool is_down = *stem == 'd';
      const std::string name = expert + stem;
      const auto us = static_cast<std::size_t>(s);
      add(headers[us], sizes[us], name + ".weight", "I8", is_down ? "[256,64]" : "[128,128]",
          kHidden * kIntermediate / 2);
      add(headers[us], sizes[us], name + ".weight_scale_inv", "F32",
          is_down ? "[256,1]" : "[128,2]", kHidden * kIntermediate / 128 * 4);
      const std::string input = expert +
                                (is_down        ? "w2"
                                 : *stem == 'g' ? "w1"
                                                : "w3") +
                                ".input_scale";
      add(headers[us], sizes[us], input, "F32", "[1]", 4);
      for (const std::string& t : {name + ".weight", name + ".weight_scale_inv", input}) {
        index += ",\"" + t + "\":\"" + std::to_string(s) + ".safetensors\"";
      }
    }
  }
  testing::write_file(dir / "model.safetensors.index.json", index + "}}");
  for (std::size_t s = 0; s < kNumShards; ++s) {
    const auto path = dir / (std::to_string(s) + ".safetensors");
    testing::write_file(path, testing::safetensors_bytes(headers[s] + "}", ""));
    std::filesystem::resize_file(path, std::filesystem::file_size(path) + sizes[s]);
  }
  const nlohmann::json config = {{"hidden_size", kHidden},
                                 {"moe_intermediate_size", kIntermediate},
                                 {"n_routed_experts", kNumExperts},
                                 {"num_experts_per_tok", 8},
                                 {"quantization_config", {{"quant_method", "w4afp8"}}}};
  testing::write_file(dir / "config.json", config.dump());
}

/// Of the processor, which other work on the machine does not change much.
TEST(ManyTensors, OpenInLessThanThreeSeconds) {
  const testing::TempDir dir;
  write_model(dir.path());
  const auto begin = std::clock();
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  const double took = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
  EXPECT_EQ(checkpoint.moe_layers().size(), static_cast<std::size_t>(kNumLayers));
  EXPECT_TRUE(checkpoint.warnings().empty());
  std::printf("133633 tensors in %d shards: %.3f s of the processor\n", kNumShards, took);
  RecordProperty("open_ms", static_cast<int>(took * 1e3));
#ifndef __SANITIZE_ADDRESS__
  EXPECT_LT(took, 3.0);
#endif
}

}  // namespace
}  // namespace sluice
