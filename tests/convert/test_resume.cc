// Interrupted, split and repeated conversions end in the same bytes as one that ran through.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "convert/journal.h"
#include "convert_fixture.h"
#include "sluice/lab/synthetic.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;
using testing::expect_error;
using testing::file_contents;
using testing::small_spec;
using testing::TempDir;

struct Stop {};

class Resume : public ::testing::Test {
 protected:
  Resume() {
    SyntheticCheckpoint spec = small_spec("bf16");
    spec.num_layers = 2;
    write_synthetic_checkpoint(spec, dir_ / "from");
    testing::write_file(dir_ / "from" / "tokenizer.json", "{}");
    (void)convert_checkpoint(options("whole"));
  }
  [[nodiscard]] ConvertOptions options(const std::string& to) const {
    return {.from = dir_ / "from",
            .to = dir_ / to,
            .format = "compressed-tensors",
            .scale_rule = ScaleRule::kAmax7,
            .max_shard_bytes = 150'000};  // Several shards.
  }
  /// Runs until `num_reports` experts are done.
  void run_until(const std::string& to, int num_reports) const {
    int count = 0;
    EXPECT_THROW((void)convert_checkpoint(options(to),
                                          [&](double) {
                                            if (++count == num_reports) throw Stop{};
                                          }),
                 Stop);
  }
  [[nodiscard]] fs::path work(const std::string& to) const {
    return dir_ / ("." + to + ".converting");
  }
  void expect_as_whole(const std::string& to) const {
    EXPECT_EQ(file_contents(dir_ / to), file_contents(dir_ / "whole"));
    EXPECT_FALSE(fs::exists(work(to)));
  }

  TempDir dir_;
};

TEST_F(Resume, AfterAnyNumberOfExperts) {
  EXPECT_GT(file_contents(dir_ / "whole").size(), 6U);
  // 8 experts, then verification of 8.
  for (const int stop : {1, 3, 8, 9, 15}) {
    run_until("cut", stop);
    EXPECT_FALSE(fs::exists(dir_ / "cut"));
    const ConvertReport report = convert_checkpoint(options("cut"));
    EXPECT_EQ(report.experts_kept, std::min(stop, 8));
    EXPECT_EQ(report.experts_written, 8 - std::min(stop, 8));
    expect_as_whole("cut");
    fs::remove_all(dir_ / "cut");
  }
}

TEST_F(Resume, BytesThatWereLostAreMadeAgain) {
  run_until("cut", 5);
  // As after a power failure: the journal knows more than the disk.
  fs::remove(work("cut") / "model-00001-of-00004.safetensors");
  std::size_t num_files = 0;
  for (const auto& [name, content] : file_contents(work("cut"))) {
    if (!name.ends_with(".safetensors") || name.find("00002") == std::string::npos) continue;
    std::string damaged = content;
    damaged[damaged.size() / 2] = static_cast<char>(damaged[damaged.size() / 2] ^ 1);
    testing::write_file(work("cut") / name, damaged);
    ++num_files;
  }
  EXPECT_EQ(num_files, 1U);
  const ConvertReport report = convert_checkpoint(options("cut"));
  EXPECT_LT(report.experts_kept, 5);
  expect_as_whole("cut");
}

TEST_F(Resume, AJournalLineThatWasCutShortIsNoLine) {
  run_until("cut", 4);
  const fs::path journal = work("cut") / Journal::kFileName;
  fs::resize_file(journal, fs::file_size(journal) - 5);
  const ConvertReport report = convert_checkpoint(options("cut"));
  EXPECT_EQ(report.experts_kept, 3);
  expect_as_whole("cut");
}

TEST_F(Resume, RefusesAnotherConversionsRemains) {
  run_until("cut", 2);
  ConvertOptions other = options("cut");
  other.scale_rule = ScaleRule::kAmax8;
  expect_error(ErrorCode::kInvalidArgument, {".cut.converting", "unfinished", "remove"},
               [&] { (void)convert_checkpoint(other); });
  other = options("cut");
  other.max_shard_bytes = 1 << 20;
  expect_error(ErrorCode::kInvalidArgument, {"unfinished"},
               [&] { (void)convert_checkpoint(other); });
}

TEST_F(Resume, ExpertRangesInAnyOrderMakeTheSameResult) {
  for (const auto& [first, count] : {std::pair{3, 1}, {1, 2}}) {
    ConvertOptions part = options("parts");
    part.first_expert = first, part.num_experts = count;
    const ConvertReport report = convert_checkpoint(part);
    EXPECT_FALSE(report.is_complete);
    EXPECT_FALSE(report.is_verified);
    EXPECT_EQ(report.experts_written, 2 * count);
    EXPECT_EQ(report.experts_left, first == 3 ? 6 : 2);
    EXPECT_FALSE(fs::exists(dir_ / "parts"));
  }
  ConvertOptions last = options("parts");
  last.num_experts = 1;
  const ConvertReport report = convert_checkpoint(last);
  EXPECT_TRUE(report.is_complete);
  EXPECT_TRUE(report.is_verified);
  expect_as_whole("parts");
}

TEST_F(Resume, ProgressGoesUpToOne) {
  double last = 0;
  (void)convert_checkpoint(options("to"), [&](double done) {
    EXPECT_GE(done, last);
    last = done;
  });
  EXPECT_EQ(last, 1.0);
}

}  // namespace
}  // namespace sluice
