// Interrupted, split and repeated conversions end in the same bytes as one that ran through.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <fstream>
#include <latch>
#include <thread>
#include <vector>

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

/// Two trainings of one model: the same config and headers, other weights.
TEST_F(Resume, RefusesAnotherSourceOfTheSameHeaders) {
  for (const std::string format : {"bf16", "fp8-block", "w4afp8", "gpt-oss"}) {
    SCOPED_TRACE(format);
    const fs::path mine = dir_ / (format + "-mine"), theirs = dir_ / (format + "-theirs");
    SyntheticCheckpoint spec = small_spec(format, format == "gpt-oss" ? 32 : 128);
    if (format == "gpt-oss") {
      spec.scale_dtype = DType::kFloat8E8M0, spec.geometry.has_bias = true;
    }
    write_synthetic_checkpoint(spec, mine);
    spec.seed = 2;
    write_synthetic_checkpoint(spec, theirs);
    testing::write_file(theirs / "config.json", testing::read_file(mine / "config.json"));
    ASSERT_EQ(Checkpoint::open(mine).identity(), Checkpoint::open(theirs).identity());
    const std::string to = "from-" + format;
    ConvertOptions part{.from = mine, .to = dir_ / to, .format = "compressed-tensors"};
    if (format == "bf16" || format == "fp8-block") part.scale_rule = ScaleRule::kAmax7;
    part.verify = false;
    ConvertOptions whole = part;
    whole.to = dir_ / (to + "-whole");
    if (format == "gpt-oss") whole.format = part.format = format;
    (void)convert_checkpoint(whole);
    part.num_experts = 2;
    (void)convert_checkpoint(part);
    part.from = theirs;
    for (const int first : {2, 0}) {
      part.first_expert = first;
      expect_error(ErrorCode::kInvalidArgument,
                   {work(to).string(), "another source", "layer 3", theirs.string(), "remove"},
                   [&] { (void)convert_checkpoint(part); });
    }
    part.from = mine;
    part.first_expert = 2;
    EXPECT_TRUE(convert_checkpoint(part).is_complete);
    EXPECT_EQ(file_contents(part.to), file_contents(whole.to));
  }
}

TEST_F(Resume, RefusesASourceThatChangesMeanwhile) {
  SyntheticCheckpoint spec = small_spec("bf16");
  spec.num_layers = 2;
  spec.seed = 2;
  write_synthetic_checkpoint(spec, dir_ / "other");
  ConvertOptions part = options("cut");
  part.verify = false;
  int count = 0;
  const auto change = [&](double) {
    if (++count != 3) return;
    for (const auto& [name, content] : file_contents(dir_ / "other")) {
      std::fstream(dir_ / "from" / name, std::ios::binary | std::ios::in | std::ios::out)
          .write(content.data(), static_cast<std::streamsize>(content.size()));
    }
  };
  expect_error(ErrorCode::kInvalidArgument, {work("cut").string(), "another source"},
               [&] { (void)convert_checkpoint(part, change); });
  EXPECT_FALSE(fs::exists(dir_ / "cut"));
}

TEST_F(Resume, AJobOfTwoSourcesIsRefused) {
  run_until("cut", 2);
  std::ofstream(work("cut") / Journal::kFileName, std::ios::app)
      << "0 0000000000000001 0000000000000002\n";
  expect_error(ErrorCode::kInvalidArgument, {work("cut").string(), "two sources"},
               [&] { (void)convert_checkpoint(options("cut")); });
}

/// What no sample sees, verification does, and says what is in the way.
TEST_F(Resume, AFailedVerificationNamesTheDirectory) {
  run_until("cut", 8);
  int count = 0;
  // As bytes that a disk lost after they were compared with the journal.
  const auto damage = [&](double) {
    if (++count != 8) return;
    for (const auto& [name, content] : file_contents(work("cut"))) {
      if (!name.ends_with(".safetensors")) continue;
      const std::string zeros(content.size() / 2, '\0');
      std::fstream file(work("cut") / name, std::ios::binary | std::ios::in | std::ios::out);
      file.seekp(static_cast<std::streamoff>(content.size() - zeros.size()));
      file.write(zeros.data(), static_cast<std::streamsize>(zeros.size()));
    }
  };
  expect_error(ErrorCode::kCorruptFile,
               {"what was made stays in " + work("cut").string(), "remove"},
               [&] { (void)convert_checkpoint(options("cut"), damage); });
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

/// Runs of the same result at once: one finishes it, all say that it is there.
TEST_F(Resume, TheSameConversionSeveralTimesAtOnce) {
  constexpr int kRuns = 4;
  for (int round = 0; round < 8; ++round) {
    std::array<ConvertReport, kRuns> reports;
    std::array<std::string, kRuns> errors;
    std::latch begin(kRuns);
    std::vector<std::thread> runs;
    for (std::size_t i = 0; i < kRuns; ++i) {
      runs.emplace_back([&, i] {
        begin.arrive_and_wait();
        try {
          reports[i] = convert_checkpoint(options("same"));
        } catch (const Error& error) {
          errors[i] = error.what();
        }
      });
    }
    for (std::thread& run : runs) run.join();
    int finished = 0;
    for (std::size_t i = 0; i < kRuns; ++i) {
      // One that begins after the end is refused, as ever.
      if (errors[i].find("already holds a checkpoint") != std::string::npos) continue;
      EXPECT_EQ(errors[i], "");
      EXPECT_TRUE(reports[i].is_complete);
      EXPECT_NE(reports[i].is_made_by_another, reports[i].is_verified);
      finished += reports[i].is_verified ? 1 : 0;
    }
    EXPECT_EQ(finished, 1);
    expect_as_whole("same");
    fs::remove_all(dir_ / "same");
  }
}

/// The first is verifying when the second begins.
TEST_F(Resume, ASecondRunWaitsForOneThatFinishes) {
  ConvertReport second;
  std::string problem;
  std::thread run;
  const ConvertReport first = convert_checkpoint(options("same"), [&](double done) {
    if (done < 0.6 || run.joinable()) return;
    std::latch begun(1);
    run = std::thread([&] {
      ConvertOptions own = options("same");
      begun.count_down();
      try {
        second = convert_checkpoint(own);
      } catch (const Error& error) {
        problem = error.what();
      }
    });
    begun.wait();
    std::this_thread::sleep_for(std::chrono::milliseconds(500));  // It finds the lock taken.
  });
  run.join();
  EXPECT_EQ(problem, "");
  EXPECT_TRUE(first.is_verified);
  EXPECT_TRUE(second.is_complete);
  EXPECT_TRUE(second.is_made_by_another);
  EXPECT_EQ(second.experts_written, 0);
  expect_as_whole("same");
}

TEST_F(Resume, RangesSideBySideMakeTheSameResult) {
  for (int round = 0; round < 4; ++round) {
    std::array<ConvertReport, 4> reports;
    std::vector<std::thread> runs;
    for (int i = 0; i < 4; ++i) {
      runs.emplace_back([&, i] {
        ConvertOptions part = options("parts");
        part.first_expert = i, part.num_experts = 1;
        reports[static_cast<std::size_t>(i)] = convert_checkpoint(part);
      });
    }
    for (std::thread& run : runs) run.join();
    EXPECT_EQ(std::ranges::count_if(reports, [](const auto& r) { return r.is_verified; }), 1);
    expect_as_whole("parts");
    fs::remove_all(dir_ / "parts");
  }
}

/// What a killed run had begun to write does not end up among the results.
TEST_F(Resume, LeavesNoTemporaryFiles) {
  run_until("cut", 3);
  testing::write_file(work("cut") / ".config.json.1-0.tmp", "{");
  (void)convert_checkpoint(options("cut"));
  expect_as_whole("cut");
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
