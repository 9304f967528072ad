// Verification finds what it is there to find.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "convert/verify.h"
#include "convert_fixture.h"
#include "sluice/lab/synthetic.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::RawCheckpoint;
using testing::small_spec;
using testing::TempDir;

/// Compares `from` with a result that `spoil` has changed after it was made.
void expect_found(const std::string& format, std::optional<ScaleRule> rule,
                  const std::function<void(RawCheckpoint&)>& spoil,
                  const std::vector<std::string>& parts) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec(format), dir / "from");
  (void)convert_checkpoint(
      {.from = dir / "from", .to = dir / "to", .format = "w4afp8", .scale_rule = rule});
  RawCheckpoint raw(dir / "to");
  raw.write(dir / "same");
  spoil(raw);
  raw.write(dir / "bad");
  const CheckpointData source = CheckpointData::open(dir / "from");
  ThreadPool pool(2, available_cores());
  const VerifySpec spec = {
      .layers = {3}, .is_requantized = rule.has_value(), .expects_input_scales = !rule};
  (void)verify_result(source, CheckpointData::open(dir / "same"), spec, pool, [](double) {});
  expect_error(ErrorCode::kCorruptFile, parts, [&] {
    (void)verify_result(source, CheckpointData::open(dir / "bad"), spec, pool, [](double) {});
  });
}

std::string name_of(const std::string& part) {
  return "model.layers.3.mlp.experts.2." + part;
}

TEST(Verify, OneWrongNibble) {
  const auto spoil = [](RawCheckpoint& raw) {
    raw.at(name_of("up_proj.weight")).bytes[5 * 128 + 7] ^= 0x10;  // Row 5, element 15.
  };
  expect_found("compressed-tensors", std::nullopt, [&](RawCheckpoint& raw) { spoil(raw); },
               {"experts.2.up_proj [5, 15]", "source"});
}

TEST(Verify, OneScaleThatIsOffByABit) {
  const auto spoil = [](RawCheckpoint& raw) {
    raw.at(name_of("down_proj.weight_scale_inv")).bytes[4 * 17] ^= 1;
  };
  expect_found("angelslim", std::nullopt, spoil, {"experts.2.down_proj [17, ", "in the source"});
}

TEST(Verify, OneInputScale) {
  const auto spoil = [](RawCheckpoint& raw) { raw.at(name_of("w3.input_scale")).bytes[0] ^= 1; };
  expect_found("modelopt-w4a8-awq", std::nullopt, spoil, {"layer 3, expert 2", "input scale"});
}

TEST(Verify, OneCodeThatIsNotTheNearest) {
  for (const char* format : {"bf16", "fp8-block"}) {
    const auto spoil = [](RawCheckpoint& raw) {
      char& byte = raw.at(name_of("gate_proj.weight")).bytes[3 * 128];
      byte = static_cast<char>(byte ^ 0x02);  // Element 0 of row 3: two steps off.
    };
    expect_found(format, ScaleRule::kAmax7, spoil, {"experts.2.gate_proj [3, 0]", "half a step"});
  }
}

}  // namespace
}  // namespace sluice
