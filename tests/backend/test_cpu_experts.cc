// The expert stage of the CPU backend: bits it promises, bounds it keeps, rows it leaves alone.
#include <gtest/gtest.h>
#include <hwy/highway.h>

#include <cstring>
#include <set>
#include <string>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_features.h"
#include "backend/cpu/gemm_tile.h"
#include "expert_fixture.h"
#include "sluice/backend.h"
#include "sluice/error.h"

namespace sluice::testing {
namespace {

std::unique_ptr<Backend> backend(int num_threads = 1) {
  return make_backend({.num_threads = num_threads});
}

StageBuffers run(const StageCase& c, Backend& device) {
  const ExpertWeights weights = random_experts(c.geometry, c.scale_dtype, c.seed);
  StageBuffers b(c);
  const auto prepared = ops(device).prepare(weights);
  ops(device).expert_stage(*prepared, b.in(), b.rows(), b.h(), b.out.data(), {}, nullptr);
  return b;
}

/// Largest |error| / bound over GEMM1 (through h) and GEMM2, checked element by element.
struct Worst {
  double ratio = 0;
  std::string where;
  void see(double error, double bound, const std::string& at) {
    const double r = error / bound;
    if (!(r <= ratio)) ratio = r, where = at;
  }
};

void check_row(const StageCase& c, const Expert& expert, StageBuffers& b, std::int64_t row,
               Worst& worst) {
  const std::uint8_t* x = &b.codes[static_cast<std::size_t>(row * b.hidden)];
  const float* xs = c.s1 != 0 ? nullptr : &b.scale[static_cast<std::size_t>(row * b.hidden / 128)];
  std::uint8_t* h = &b.h_codes[static_cast<std::size_t>(row * b.inner)];
  float* hs = c.s2 != 0 ? nullptr : &b.h_scale[static_cast<std::size_t>(row * b.inner / 128)];
  for (std::int64_t first = 0; first < b.inner; first += 128) {
    std::vector<float> value(128), low(128), high(128);
    for (std::int64_t i = 0; i < 128; ++i) {
      const DotProduct gate = dot(expert.gate, first + i, x, xs, c.s1);
      const DotProduct up = dot(expert.up, first + i, x, xs, c.s1);
      ASSERT_LE(std::fabs(gate.promised - gate.exact), 0x1p-20 * gate.magnitude);
      value[static_cast<std::size_t>(i)] =
          activate(c.geometry.activation, gate.promised, up.promised);
    }
    float scale = c.s2;
    std::vector<std::uint8_t> codes(128);
    if (c.s2 != 0) {
      quantize_static(value, c.s2, codes);
    } else {
      scale = quantize_group(value, codes);
      ASSERT_NEAR(hs[first / 128] / scale, 1.0, 1e-6) << "row " << row << " group " << first / 128;
    }
    for (std::size_t i = 0; i < 128; ++i) {
      // exp() may differ in its last bits and tip a rounding: one code away at most.
      const int a = codes[i] & 0x7f, z = h[first + static_cast<std::int64_t>(i)] & 0x7f;
      ASSERT_LE(std::abs(a - z), 1) << "row " << row << " h " << first + static_cast<int>(i);
    }
  }
  for (std::int64_t n = 0; n < b.hidden; ++n) {
    const DotProduct d = dot(expert.down, n, h, hs, c.s2);
    const std::uint16_t y = b.out[static_cast<std::size_t>(row * b.hidden + n)];
    ASSERT_EQ(y, bf16_from_float(d.promised)) << "row " << row << " element " << n;
    const double bound = std::fabs(d.exact) * 0x1p-8 + 0x1p-20 * d.magnitude + 1e-38;
    worst.see(std::fabs(static_cast<double>(bf16_to_float(y)) - d.exact), bound,
              "row " + std::to_string(row) + " element " + std::to_string(n));
  }
}

void check(const StageCase& c, int num_threads = 1) {
  const auto device = backend(num_threads);
  StageBuffers b = run(c, *device);
  const ExpertWeights weights = random_experts(c.geometry, c.scale_dtype, c.seed);
  Worst worst;
  std::vector<bool> valid(static_cast<std::size_t>(b.max_rows));
  for (std::size_t e = 0; e < c.rows.size(); ++e) {
    for (std::int32_t r = 0; r < c.rows[e]; ++r) {
      const std::int64_t row = b.row_begin[e] + r;
      valid[static_cast<std::size_t>(row)] = true;
      // First, last and a few rows of each expert keep the float64 work small.
      if (r > 2 && r + 2 < c.rows[e] && r % 29 != 0) continue;
      check_row(c, weights.experts[e], b, row, worst);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
  EXPECT_LE(worst.ratio, 1.0) << worst.where;
  for (std::int64_t row = 0; row < b.max_rows; ++row) {
    if (valid[static_cast<std::size_t>(row)]) continue;
    for (std::int64_t i = 0; i < b.hidden; ++i) {
      ASSERT_EQ(b.out[static_cast<std::size_t>(row * b.hidden + i)], 0xa5a5) << "row " << row;
    }
    for (std::int64_t i = 0; i < b.inner; ++i) {
      ASSERT_EQ(b.h_codes[static_cast<std::size_t>(row * b.inner + i)], StageBuffers::kSentinel);
    }
  }
}

TEST(CpuExperts, ShapesAndRowCounts) {
  for (const int hidden : {128, 384, 640, 1792}) {
    for (const int inner : {128, 384}) {
      StageCase c;
      c.geometry.num_experts = 4;
      c.geometry.hidden = hidden, c.geometry.intermediate = inner;
      c.rows = {0, 3, 1, 0};
      check(c);
    }
  }
  for (const int m : {0, 1, 3, 7, 8, 9, 16, 17, 63, 64, 65}) {
    StageCase c;
    c.geometry.num_experts = 2;
    c.geometry.hidden = 256, c.geometry.intermediate = 128;
    c.rows = {m, 1};
    check(c);
  }
}

TEST(CpuExperts, GroupsScalesAndLayouts) {
  for (const int group : {128, 32}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const bool is_static : {false, true}) {
        StageCase c;
        c.geometry.num_experts = 3, c.geometry.group_size = group;
        c.geometry.hidden = 384, c.geometry.intermediate = 256;
        c.scale_dtype = dtype;
        c.rows = {5, 0, 9};
        c.max_m = 12;
        if (is_static) c.s1 = 0.0087f, c.s2 = 0.31f;
        check(c, 2);
      }
    }
  }
}

StageCase mxfp4_case() {
  StageCase c;
  c.geometry.weight_format = WeightFormat::kMxfp4;
  c.geometry.group_size = 32;
  c.scale_dtype = DType::kFloat8E8M0;
  return c;
}

TEST(CpuExperts, Mxfp4ShapesAndRowCounts) {
  for (const int hidden : {128, 384, 640}) {
    for (const bool is_static : {false, true}) {
      StageCase c = mxfp4_case();
      c.geometry.num_experts = 4;
      c.geometry.hidden = hidden, c.geometry.intermediate = 256;
      c.rows = {0, 3, 1, 9};
      c.max_m = 11;
      if (is_static) c.s1 = 0.0087f, c.s2 = 0.31f;
      check(c, 2);
    }
  }
  for (const int m : {0, 1, 2, 3, 7, 8, 9, 17, 64, 65}) {
    StageCase c = mxfp4_case();
    c.geometry.num_experts = 2;
    c.geometry.hidden = 256, c.geometry.intermediate = 128;
    c.rows = {m, 1};
    check(c);
  }
}

/// Every weight of gate and up has this byte of codes, every input that code.
void expect_largest_sums(std::uint8_t weight, std::uint8_t code, int rows) {
  StageCase c = mxfp4_case();
  c.geometry.hidden = 256;
  c.rows = {rows};
  const auto device = backend();
  const ExpertWeights weights = random_experts(c.geometry, c.scale_dtype, c.seed);
  for (const QuantMatrix* m : {&weights.experts[0].gate, &weights.experts[0].up}) {
    std::memset(const_cast<void*>(m->codes.data), weight, m->codes.bytes());
  }
  StageBuffers b(c);
  std::fill(b.codes.begin(), b.codes.end(), code);
  const auto prepared = ops(*device).prepare(weights);
  ops(*device).expert_stage(*prepared, b.in(), b.rows(), b.h(), b.out.data(), {}, nullptr);
  Worst worst;
  for (int r = 0; r < rows; ++r) check_row(c, weights.experts[0], b, r, worst);
  EXPECT_LE(worst.ratio, 1.0) << worst.where;
}

/// Every product as large as it can be, of one sign: what the int16 sums of AVX2 must hold.
TEST(CpuExperts, Mxfp4LargestSumsAreExact) {
  for (const std::uint8_t weight : {0x77, 0xff, 0x7f}) {
    for (const std::uint8_t code : {0x7e, 0xfe, 0x77, 0xf7}) {
      for (const int rows : {1, 9}) expect_largest_sums(weight, code, rows);
    }
  }
}

/// Stages of every format, whose experts have one row, some, two at once, and two tiles.
void check_every_format() {
  for (const bool is_mxfp4 : {true, false}) {
    for (const int group : {32, 128}) {
      if (is_mxfp4 && group == 128) continue;
      StageCase c = is_mxfp4 ? mxfp4_case() : StageCase{};
      c.geometry.group_size = group;
      c.geometry.num_experts = 4;
      c.geometry.hidden = 384, c.geometry.intermediate = 256;
      c.rows = {1, 9, 3, 21};
      check(c, 2);
      c.geometry.hidden = 256, c.geometry.intermediate = 128;  // One group of 128.
      c.rows = {4, 16, 64, 40};
      check(c, 2);
    }
  }
  for (const int rows : {9, 17}) expect_largest_sums(0x77, 0x7e, rows);
  expect_largest_sums(0xff, 0xfe, 1);
}

/// What machines without this one's instructions would run, one instruction set after the other,
/// then without VNNI, and with tiles: the kernels' sums have the bits that are promised on each.
TEST(CpuExperts, EveryInstructionSetThatThisMachineHas) {
  std::set<std::string> seen;
  std::size_t num_targets = 0;
  const cpu::CpuFeatures all = cpu::cpu_features();
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (target == HWY_SSSE3) continue;  // The kernels are not compiled for it.
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    SCOPED_TRACE(hwy::TargetName(target));
    ++num_targets;
    for (const bool vnni : {all.vnni, false}) {
      for (const cpu::TileUnit tiles : {all.tiles, cpu::TileUnit::kNone, cpu::TileUnit::kScalar}) {
        cpu::set_cpu_features_for_test(
            cpu::CpuFeatures{.vnni = vnni, .bf16 = all.bf16, .tiles = tiles});
        if (!seen.insert(cpu::instruction_set()).second) continue;
        SCOPED_TRACE(cpu::instruction_set());
        check_every_format();
      }
    }
  }
  cpu::set_cpu_features_for_test(std::nullopt);
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  EXPECT_GE(seen.size(), num_targets);
  std::string names;
  for (const std::string& name : seen) names += name + "; ";
  RecordProperty("instruction_sets", names);
}

/// Scales from 2^-127, which is no normal float32, on; zeros of either sign; a NaN is refused.
TEST(CpuExperts, Mxfp4ScalesAtTheEnds) {
  const auto stage = [](std::uint8_t scale_code, std::uint8_t codes) {
    StageCase c = mxfp4_case();
    const ExpertWeights weights = random_experts(c.geometry, c.scale_dtype, c.seed);
    const Expert& e = weights.experts[0];
    std::memset(const_cast<void*>(e.down.scales.data), scale_code, e.down.scales.bytes());
    if (codes != 0x21)
      std::memset(const_cast<void*>(e.down.codes.data), codes, e.down.codes.bytes());
    const auto device = backend();
    StageBuffers b(c);
    const auto prepared = ops(*device).prepare(weights);
    ops(*device).expert_stage(*prepared, b.in(), b.rows(), b.h(), b.out.data(), {}, nullptr);
    Worst worst;
    check_row(c, e, b, 0, worst);
    EXPECT_LE(worst.ratio, 1.0) << worst.where;
    return b.out;
  };
  for (const int scale_code : {0, 1, 2, 3, 100, 127, 200}) {
    (void)stage(static_cast<std::uint8_t>(scale_code), 0x21);
  }
  for (const std::uint8_t zeros : {0x00, 0x88, 0x80}) {
    for (const std::uint16_t y : stage(127, zeros)) EXPECT_EQ(y & 0x7fff, 0);
  }
  for (const std::uint8_t bad : {255, 245}) {  // NaN, 2^118
    try {
      (void)stage(bad, 0x21);
      ADD_FAILURE() << "not refused";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(std::string(error.what()).find("down: scale [0, 0]"), std::string::npos);
    }
  }
}

/// One expert has more rows than are read at once; others follow it.
TEST(CpuExperts, RowsThatLieInTheOutputGiveTheSameBits) {
  for (const bool is_static : {false, true}) {
    StageCase c;
    c.geometry.num_experts = 4;
    c.geometry.hidden = 256, c.geometry.intermediate = 128;
    c.rows = {5, 700, 0, 9};
    if (is_static) c.s1 = 0.0087f, c.s2 = 0.31f;
    for (const std::int64_t max_m : {std::int64_t{0}, std::int64_t{701}}) {
      c.max_m = max_m;
      const auto device = backend(2);
      const StageBuffers apart = run(c, *device);
      StageBuffers b(c);
      const auto width = static_cast<std::size_t>(b.hidden);
      for (std::size_t e = 0; e < c.rows.size(); ++e) {
        for (std::int64_t r = 0; r < c.rows[e]; ++r) {
          const std::int64_t row = b.row_begin[e] + r;
          std::memcpy(b.in_out().row(row), &b.codes[static_cast<std::size_t>(row) * width], width);
        }
      }
      const auto prepared = ops(*device).prepare(random_experts(c.geometry, c.scale_dtype, c.seed));
      ops(*device).expert_stage(*prepared, b.in_out(), b.rows(), b.h(), b.out.data(), {}, nullptr);
      EXPECT_TRUE(b.out == apart.out) << "static " << is_static << " max_m " << max_m;
      EXPECT_TRUE(b.h_codes == apart.h_codes) << "static " << is_static << " max_m " << max_m;
    }
  }
}

TEST(CpuExperts, RowsAreQuantizedAtAnyStride) {
  const auto device = backend(2);
  constexpr std::int64_t kRows = 9, kWidth = 384, kStride = 800;
  std::vector<std::uint16_t> x(kRows * kWidth);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = bf16_from_float(static_cast<float>(i * 37 % 1009) * 0.01f - 5.0f);
  }
  const std::int32_t count = kRows - 1;  // The last row is not valid.
  const RowRanges rows{
      .num_experts = 1, .count = &count, .max_rows = kRows, .max_rows_per_expert = kRows};
  for (const bool pow2 : {false, true}) {
    std::vector<std::uint8_t> dense(kRows * kWidth, 0xa5), apart(kRows * kStride, 0xa5);
    std::vector<std::uint8_t> moved(kRows * kWidth, 0xa5), moved_apart(kRows * kStride, 0xa5);
    std::vector<float> scale(kRows * kWidth / 128, -7), scale_apart = scale;
    const Fp8Rows a{.codes = dense.data(), .scale = scale.data(), .width = kWidth};
    const Fp8Rows b{
        .codes = apart.data(), .scale = scale_apart.data(), .width = kWidth, .stride = kStride};
    ops(*device).quantize(x.data(), rows, pow2, a, {});
    ops(*device).quantize(x.data(), rows, pow2, b, {});
    EXPECT_TRUE(scale == scale_apart);
    const Fp8Rows c{.codes = moved.data(), .static_scale = 0.01f, .width = kWidth};
    const Fp8Rows d{
        .codes = moved_apart.data(), .static_scale = 0.01f, .width = kWidth, .stride = kStride};
    ops(*device).requantize(a, rows, c, {});
    ops(*device).requantize(b, rows, d, {});
    for (std::int64_t row = 0; row < kRows; ++row) {
      ASSERT_EQ(std::memcmp(a.row(row), b.row(row), kWidth), 0) << row;
      ASSERT_EQ(std::memcmp(c.row(row), d.row(row), kWidth), 0) << row;
      for (std::int64_t i = kWidth; i < kStride; ++i) {
        ASSERT_EQ(b.row(row)[i], 0xa5) << "row " << row << " byte " << i;
        ASSERT_EQ(d.row(row)[i], 0xa5) << "row " << row << " byte " << i;
      }
    }
    ASSERT_NE(std::memcmp(b.row(0), b.row(count), kWidth), 0);  // Something was written.
  }
}

/// prepare() refuses weights that `edit` has changed.
template <class Edit>
void expect_unsupported(const Edit& edit) {
  ExpertWeights weights = random_experts(StageCase{}.geometry, DType::kFloat32, 1);
  edit(weights);
  const auto device = backend();
  try {
    (void)ops(*device).prepare(weights);
    ADD_FAILURE() << "not refused";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported) << error.what();
  }
}

TEST(CpuExperts, OtherFormatsAndActivationsAreRefused) {
  expect_unsupported(
      [](ExpertWeights& w) { w.experts[0].down.format = static_cast<WeightFormat>(7); });
  expect_unsupported(
      [](ExpertWeights& w) { w.geometry.activation = {static_cast<ActivationKind>(7)}; });
}

}  // namespace
}  // namespace sluice::testing
