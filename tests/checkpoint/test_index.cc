// model.safetensors.index.json decides where a tensor is; what it cannot decide is an error.
#include "spelled_checks.h"

namespace sluice {
namespace {

using testing::expect_cases;
using testing::expect_error;
using testing::expect_loads;
using testing::expect_refused;
using testing::f32_bytes;
using testing::kCorrupt;
using testing::kStorages;
using testing::kUnsupported;
using testing::SpelledFiles;
using testing::Spelling;
using testing::Storage;
using testing::TempDir;

TEST(Index, DecidesWhichOfTwoTensorsCounts) {
  for (const char* const dtype : {"U8", "F8_E4M3", "I8"}) {
    for (const bool is_first : {false, true}) {  // The stray one is read before the other.
      SpelledFiles files;
      const int e = is_first ? 1 : 0;
      const std::string name = files.codes_name(e, 0);
      files.files[SpelledFiles::file(1 - e)][name] = {dtype, {2}, "ab"};
      expect_loads(files, 1,
                   name + ": in " + SpelledFiles::file(1 - e) +
                       ": model.safetensors.index.json gives it to another file");
      files.weight_map = nullptr;
      expect_refused(files, kUnsupported, {name, "is also in", "would say which"});
    }
  }
}

TEST(Index, TensorsThatItDoesNotNameAreLeftOut) {
  SpelledFiles files;
  for (const char* const part : {"0.gate_proj.weight_packed", "1.up_proj.bias", "2.x", "w13"}) {
    files.files["1.safetensors"][files.experts() + part] = {"U8", {1}, "x"};
  }
  files.files["1.safetensors"]["model.norm.weight"] = {"U8", {1}, "x"};
  expect_loads(files, 1,
               "model.layers.3.mlp.experts.0.gate_proj.weight_packed: in 1.safetensors: "
               "model.safetensors.index.json does not name it, so it is left out (5 tensors");
}

TEST(Index, DecidesBetweenInputScales) {
  for (const char* const file : {"0.safetensors", "act_scales.safetensors", "zzz.safetensors"}) {
    SpelledFiles files;
    const std::string name = files.experts() + "1.w1.input_scale";
    files.files[file][name] = {"F32", {1}, f32_bytes({9})};
    expect_loads(files, 1, name + ": in " + file);
    const TempDir dir;
    files.write(dir.path());
    EXPECT_EQ(Checkpoint::open(dir.path()).input_scales(3)[1].w1, 0.0078125f) << file;
    files.files[file][name].bytes = f32_bytes({0.0078125f});
    expect_loads(files);
  }
}

TEST(Index, FaultsThatStayErrors) {
  expect_cases({
      {"names a tensor that is nowhere",
       {},
       [](SpelledFiles& f) { f.weight_map["model.norm.weight"] = "1.safetensors"; },
       kCorrupt,
       {"1.safetensors", "model.norm.weight is missing"}},
      {"names the wrong file",
       {},
       [](SpelledFiles& f) { f.weight_map[f.codes_name(0, 0)] = "1.safetensors"; },
       kCorrupt,
       {"1.safetensors", "0.gate_proj.weight is missing", "but it is in 0.safetensors"}},
      {"names a file that is not there",
       {},
       [](SpelledFiles& f) { f.weight_map["x"] = "9.safetensors"; },
       ErrorCode::kIo,
       {"9.safetensors: missing"}},
      {"leaves out a tensor that is needed",
       {},
       [](SpelledFiles& f) { f.weight_map.erase(f.codes_name(0, 0)); },
       kUnsupported,
       {"0.gate_proj.weight is missing", "does not name"}},
  });
}

TEST(Index, AShardCutInHalfIsRefused) {
  for (const Storage storage : kStorages) {
    const SpelledFiles files(Spelling{.storage = storage});
    const TempDir dir;
    files.write(dir.path());
    std::filesystem::resize_file(dir / "1.safetensors",
                                 std::filesystem::file_size(dir / "1.safetensors") / 2);
    expect_error(kCorrupt, {"1.safetensors", "data_offsets", "truncated?"},
                 [&] { (void)Checkpoint::open(dir.path()); });
  }
}

}  // namespace
}  // namespace sluice
