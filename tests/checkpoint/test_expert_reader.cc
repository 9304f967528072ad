// Matrices read one by one: the same bytes as mapped ones, of the own experts alone, and refusals
// that name file and tensor also where the file changes under the reader.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <limits>
#include <thread>
#include <vector>

#include "checkpoint/expert_reader.h"
#include "expect_error.h"
#include "format_fixture.h"
#include "model_files.h"
#include "sluice/checkpoint.h"
#include "sluice/lab/synthetic.h"
#include "temp_dir.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::expect_reads_alike;
using testing::MatrixReader;
using testing::ModelFiles;
using testing::spec_of;
using testing::TempDir;

constexpr MatrixRole kRoles[] = {MatrixRole::kGate, MatrixRole::kUp, MatrixRole::kDown};

TEST(ExpertReader, HalfScalesAndUnsignedBytesAreReadAlike) {
  const TempDir dir;
  ModelFiles files;
  for (const char* stem : {"gate_proj", "up_proj", "down_proj"}) {
    for (int e = 0; e < ModelFiles::kNumExperts; ++e) {
      auto& scale = files.tensor(e, std::string(stem) + ".weight_scale_inv");
      std::string halves;
      for (std::size_t i = 0; i < scale.bytes.size() / 4; ++i) {
        halves += {static_cast<char>(i), 0x21};
      }
      scale.dtype = "F16", scale.bytes = halves;
    }
  }
  files.write(dir.path());
  expect_reads_alike(Checkpoint::open(dir.path()), ModelFiles::kLayer, 0, 2);
}

TEST(ExpertReader, ReadsTheBytesOfItsOwnExpertsAndNoOthers) {
  const TempDir dir;
  ModelFiles files;
  std::uint64_t own = 0;
  for (const char* stem : {"gate_proj", "up_proj", "down_proj"}) {
    auto& scales = files.tensor(1, std::string(stem) + ".weight_scale_inv");
    scales.bytes = testing::f32_bytes(std::vector<float>(scales.bytes.size() / 4, std::nanf("")));
    own += files.tensor(0, std::string(stem) + ".weight").bytes.size();
    own += files.tensor(0, std::string(stem) + ".weight_scale_inv").bytes.size();
  }
  files.write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  ExpertReader reader(checkpoint, ModelFiles::kLayer, 0, 1);
  MatrixReader matrices(reader);
  for (const MatrixRole role : kRoles) (void)matrices.read(0, role);
  EXPECT_EQ(reader.bytes_read(), own);
  EXPECT_EQ(reader.file_bytes(), own);
  ExpertReader other(checkpoint, ModelFiles::kLayer, 1, 1);
  MatrixReader others(other);
  expect_error(ErrorCode::kCorruptFile,
               {ModelFiles::shard_name(1), "experts.1.gate_proj.weight_scale_inv", "nan"},
               [&] { (void)others.read(0, MatrixRole::kGate); });
}

TEST(ExpertReader, AFileThatIsCutAfterItWasOpenedIsNamed) {
  const TempDir dir;
  ModelFiles files;
  files.write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  ExpertReader reader(checkpoint, ModelFiles::kLayer, 0, 2);
  MatrixReader matrices(reader, 32);
  const auto shard = dir / ModelFiles::shard_name(1);
  const auto bytes = std::filesystem::file_size(shard);
  ASSERT_EQ(::truncate(shard.c_str(), static_cast<off_t>(bytes - 1)), 0);
  for (const MatrixRole role : kRoles) (void)matrices.read(0, role);
  std::size_t num_refused = 0;
  for (const MatrixRole role : kRoles) {
    const auto tensors = reader.tensors(1, role);
    const bool is_cut = std::ranges::any_of(
        tensors, [&](const TensorRef& t) { return t.data_begin + t.entry.end == bytes; });
    if (!is_cut) {
      (void)matrices.read(1, role);
      continue;
    }
    ++num_refused;
    expect_error(ErrorCode::kCorruptFile,
                 {ModelFiles::shard_name(1), "experts.1.", "has been cut since it was opened"},
                 [&] { (void)matrices.read(1, role); });
  }
  EXPECT_EQ(num_refused, 1U);
}

TEST(Checkpoint, ShardCutAfterItWasOpened) {
  const TempDir dir;
  ModelFiles files;
  files.write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  const auto shard = dir / ModelFiles::shard_name(0);
  const std::uintmax_t whole = std::filesystem::file_size(shard);
  {
    // The byte whose page a handler of SIGBUS would ask for.
    const ExpertWeights weights = checkpoint.load_experts(ModelFiles::kLayer, 0, 1);
    const auto* const code = weights.experts.front().gate.codes.as<std::byte>();
    const auto mapped = find_mapped(code);
    ASSERT_TRUE(mapped);
    EXPECT_EQ(std::filesystem::path(mapped->path), shard);
    EXPECT_EQ(mapped->bytes_mapped, whole);
    EXPECT_EQ(mapped->bytes_now, whole);
    EXPECT_FALSE(find_mapped(&whole));
    ASSERT_EQ(::truncate(shard.c_str(), 100), 0);
    EXPECT_EQ(find_mapped(code)->bytes_now, 100U);
  }
  const auto refused = [&](const auto& call) {
    expect_error(ErrorCode::kCorruptFile,
                 {ModelFiles::shard_name(0), "has been cut since it was opened"}, call);
  };
  refused([&] { (void)checkpoint.load_experts(ModelFiles::kLayer, 0, 1); });
  std::vector<float> floats(static_cast<std::size_t>(checkpoint.geometry().hidden) *
                            static_cast<std::size_t>(checkpoint.geometry().intermediate));
  refused([&] { checkpoint.load_floats(ModelFiles::kLayer, 0, MatrixRole::kGate, floats); });
  const std::array layers{ModelFiles::kLayer};
  const CheckpointReview review = checkpoint.review(layers);
  EXPECT_TRUE(std::ranges::any_of(review.warnings, [](const CheckpointWarning& warning) {
    return warning.kind == "unreadable";
  }));
}

TEST(ExpertReader, ManyThreadsReadOneLayer) {
  const TempDir dir;
  SyntheticCheckpoint spec = spec_of("kimi-int4", 32);
  spec.geometry.num_experts = 16;
  write_synthetic_checkpoint(spec, dir / "model");
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  const ExpertWeights mapped = checkpoint.load_experts(testing::kLayer, 0, 16);
  ExpertReader reader(checkpoint, testing::kLayer, 0, 16);
  std::atomic<int> next{0}, num_wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      MatrixReader matrices(reader, 16);
      for (int job; (job = next++) < 48;) {
        const QuantMatrix read = matrices.read(job / 3, kRoles[job % 3]);
        const auto& expected =
            testing::matrix_of(mapped.experts[static_cast<std::size_t>(job / 3)], kRoles[job % 3]);
        num_wrong += std::memcmp(read.codes.data, expected.codes.data, read.codes.bytes()) != 0 ||
                     std::memcmp(read.scales.data, expected.scales.data, read.scales.bytes()) != 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_wrong, 0);
  EXPECT_EQ(reader.bytes_read(), reader.file_bytes());
}

}  // namespace
}  // namespace sluice
