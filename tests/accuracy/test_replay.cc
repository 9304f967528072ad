// Dumps: what is written is read, and what does not fit is refused by the name of its field.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <fstream>
#include <span>

#include "checkpoint/safetensors.h"
#include "sluice/error.h"
#include "sluice/lab/accuracy.h"
#include "sluice/quant.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;

ModelGeometry geometry() {
  return {.name = "dump", .num_experts = 8, .num_topk = 2, .hidden = 256, .intermediate = 128};
}

class Replay : public ::testing::Test {
 protected:
  ~Replay() override {
    std::error_code ignored;
    std::filesystem::remove(file_, ignored);
  }
  /// Writes tensors of the given names, dtypes, shapes and bytes.
  void write(std::vector<SafetensorsEntry> entries, const std::vector<std::string>& data) const {
    std::ofstream out(file_, std::ios::binary);
    out << make_safetensors_header(entries);
    for (const std::string& bytes : data) out << bytes;
  }
  template <class T>
  static std::string bytes_of(const std::vector<T>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
  }
  [[nodiscard]] std::string refusal() const {
    try {
      (void)read_dump(file_, geometry());
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return error.what();
    }
    return "not refused";
  }

  std::filesystem::path file_ = std::filesystem::temp_directory_path() /
                                ("sluice-dump-" + std::to_string(::getpid()) + ".safetensors");
  std::vector<float> x_ = std::vector<float>(3 * 256, 1.5f);
  std::vector<std::int64_t> idx_ = {0, 7, -1, 3, 2, 1};
  std::vector<float> weights_ = {0.5f, 0.5f, 0, 1, 0.25f, 0.75f};
};

TEST_F(Replay, RoundTrip) {
  const Workload tokens = make_suite("outliers", geometry(), 7, 4).tokens;
  write_dump(file_, tokens);
  const TokenSuite back = read_dump(file_, geometry());
  EXPECT_EQ(back.name, "replay");
  EXPECT_EQ(back.tokens.x, tokens.x);
  EXPECT_EQ(back.tokens.topk_idx, tokens.topk_idx);
  EXPECT_EQ(back.tokens.topk_weights, tokens.topk_weights);
  EXPECT_EQ(back.tokens.num_tokens, 7);
  EXPECT_EQ(back.calibration.num_tokens, 0);
}

TEST_F(Replay, Float32AndInt64) {
  write({{.name = "x", .dtype = "F32", .shape = {3, 256}},
         {.name = "topk_idx", .dtype = "I64", .shape = {3, 2}},
         {.name = "topk_weights", .dtype = "F32", .shape = {3, 2}}},
        {bytes_of(x_), bytes_of(idx_), bytes_of(weights_)});
  const Workload tokens = read_dump(file_, geometry()).tokens;
  EXPECT_EQ(tokens.x[5], bf16_from_float(1.5f));
  EXPECT_EQ(tokens.topk_idx, (std::vector<std::int32_t>{0, 7, -1, 3, 2, 1}));
}

TEST_F(Replay, RefusedByFieldName) {
  const auto dump = [&](const char* x_type, std::uint64_t hidden, std::uint64_t topk) {
    write({{.name = "x", .dtype = x_type, .shape = {3, hidden}},
           {.name = "topk_idx", .dtype = "I64", .shape = {3, topk}},
           {.name = "topk_weights", .dtype = "F32", .shape = {3, 2}}},
          {bytes_of(x_).substr(0, 3 * hidden * 4), bytes_of(idx_).substr(0, 3 * topk * 8),
           bytes_of(weights_)});
  };
  dump("I32", 256, 2);
  EXPECT_THAT(refusal(), HasSubstr("tensor x is I32"));
  dump("F32", 128, 2);
  EXPECT_THAT(refusal(), HasSubstr("x has shape [3, 128], but the layer's hidden is 256"));
  dump("F32", 256, 1);
  EXPECT_THAT(refusal(), HasSubstr("topk_idx has shape [3, 1]"));
  idx_[3] = 8;
  dump("F32", 256, 2);
  EXPECT_THAT(refusal(), HasSubstr("topk_idx[1, 1] = 8"));
  idx_[3] = std::int64_t{1} << 32;  // Must not wrap to 0.
  dump("F32", 256, 2);
  EXPECT_THAT(refusal(), HasSubstr("topk_idx[1, 1] = 4294967296"));
  idx_[3] = 3, x_[256] = HUGE_VALF;
  dump("F32", 256, 2);
  EXPECT_THAT(refusal(), HasSubstr("x[1, 0]"));
  x_[256] = 1, weights_[5] = NAN;
  dump("F32", 256, 2);
  EXPECT_THAT(refusal(), HasSubstr("topk_weights[2, 1]"));
  write({{.name = "x", .dtype = "F32", .shape = {3, 256}}}, {bytes_of(x_)});
  EXPECT_THAT(refusal(), HasSubstr("topk_idx is missing"));
}

TEST_F(Replay, AFileThatIsNotThereIsAnIoError) {
  try {
    (void)read_dump(file_, geometry());
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kIo);
  }
}

}  // namespace
}  // namespace sluice::testing
