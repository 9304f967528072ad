// Weight format and activation as values: names, definitions, and refusals of what there is not.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "sluice/activation.h"
#include "sluice/error.h"
#include "sluice/weight_format.h"

namespace sluice {
namespace {

template <class Function>
void expect_unsupported(Function&& function, const char* text) {
  try {
    function();
    ADD_FAILURE() << "not refused: " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_THAT(error.what(), testing::HasSubstr(text));
  }
}

TEST(WeightFormats, NamesRoundTripAndOthersAreRefusedByName) {
  EXPECT_STREQ(to_string(WeightFormat::kInt4), "int4");
  EXPECT_EQ(parse_weight_format("int4"), WeightFormat::kInt4);
  EXPECT_STREQ(to_string(WeightFormat::kMxfp4), "mxfp4");
  EXPECT_EQ(parse_weight_format("mxfp4"), WeightFormat::kMxfp4);
  for (const char* name : {"nvfp4", "INT4", ""}) {
    expect_unsupported([&] { (void)parse_weight_format(name); },
                       ("'" + std::string(name) + "' is none of: int4, mxfp4").c_str());
  }
}

TEST(WeightFormats, Int4IsTwosComplementInGroupsOf128Or32) {
  std::array<std::uint8_t, 8> codes{};
  for (std::size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<std::uint8_t>(2 * i | (2 * i + 1) << 4);  // 0 1 | 2 3 | ... | 14 15
  }
  float largest = 0;
  for (int code = 0; code < 16; ++code) {
    const float value = code_value(WeightFormat::kInt4, codes.data(), code);
    EXPECT_EQ(value, static_cast<float>(code < 8 ? code : code - 16));
    largest = std::max(largest, std::fabs(value));
  }
  EXPECT_EQ(max_code_value(WeightFormat::kInt4), largest);
  EXPECT_EQ(code_bytes(WeightFormat::kInt4, 16), codes.size());
  for (const int group : {0, 16, 32, 64, 127, 128, 256}) {
    EXPECT_EQ(allows_group_size(WeightFormat::kInt4, group), group == 32 || group == 128) << group;
  }
}

TEST(WeightFormats, Mxfp4IsE2M1InGroupsOf32WithE8M0Scales) {
  std::array<std::uint8_t, 8> codes{};
  for (std::size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<std::uint8_t>(2 * i | (2 * i + 1) << 4);
  }
  float largest = 0;
  for (int code = 0; code < 16; ++code) {
    // The definition in words: bit 3 is the sign; exponent e in bits 2 and 1 (bias 1), mantissa m
    // in bit 0: (1 + m / 2) * 2^(e - 1), and m / 2 where e is 0.
    const int e = code >> 1 & 3, m = code & 1;
    const double size = e == 0 ? m / 2.0 : std::ldexp(1 + m / 2.0, e - 1);
    const float value = code_value(WeightFormat::kMxfp4, codes.data(), code);
    EXPECT_EQ(value, code < 8 ? size : -size) << code;
    EXPECT_EQ(std::signbit(value), code >= 8) << code;
    largest = std::max(largest, std::fabs(value));
  }
  EXPECT_EQ(max_code_value(WeightFormat::kMxfp4), largest);
  EXPECT_EQ(code_bytes(WeightFormat::kMxfp4, 16), codes.size());
  for (const int group : {0, 16, 32, 64, 127, 128, 256}) {
    EXPECT_EQ(allows_group_size(WeightFormat::kMxfp4, group), group == 32) << group;
  }
}

TEST(WeightFormats, EachHasItsTypesOfCodesAndScales) {
  EXPECT_EQ(code_dtype(WeightFormat::kInt4), DType::kPackedInt4);
  EXPECT_EQ(code_dtype(WeightFormat::kMxfp4), DType::kPackedE2M1);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat8E8M0, DType::kUInt8,
                            DType::kFloat8E4M3, DType::kFloat64}) {
    EXPECT_EQ(allows_scale_dtype(WeightFormat::kInt4, dtype),
              dtype == DType::kFloat32 || dtype == DType::kBFloat16);
    EXPECT_EQ(allows_scale_dtype(WeightFormat::kMxfp4, dtype), dtype == DType::kFloat8E8M0);
  }
}

TEST(WeightFormats, AScaleIsReadByItsType) {
  const float f32[] = {1.25f, 3e-39f};
  const std::uint16_t bf16[] = {0x3f80, 0x0001};
  const std::uint8_t e8m0[] = {0, 1, 126, 127, 254, 255};
  const TensorView of_f32(f32, DType::kFloat32, {1, 2}), of_bf16(bf16, DType::kBFloat16, {1, 2});
  const TensorView of_e8m0(e8m0, DType::kFloat8E8M0, {2, 3});
  EXPECT_EQ(scale_value(of_f32, 0), 1.25f);
  EXPECT_EQ(scale_value(of_f32, 1), 3e-39f);
  EXPECT_EQ(scale_value(of_bf16, 0), 1.0f);
  EXPECT_EQ(scale_value(of_bf16, 1), 0x1p-133f);
  EXPECT_EQ(scale_value(of_e8m0, 0), 0x1p-127f);
  EXPECT_EQ(scale_value(of_e8m0, 1), 0x1p-126f);
  EXPECT_EQ(scale_value(of_e8m0, 2), 0.5f);
  EXPECT_EQ(scale_value(of_e8m0, 3), 1.0f);
  EXPECT_EQ(scale_value(of_e8m0, 4), 0x1p127f);
  EXPECT_TRUE(std::isnan(scale_value(of_e8m0, 5)));
  EXPECT_THROW((void)scale_value({e8m0, DType::kUInt8, {6}}, 0), Error);
}

TEST(WeightFormats, AValueThatIsNoFormatHasNoMeaning) {
  const auto other = static_cast<WeightFormat>(7);
  const std::uint8_t code = 0;
  EXPECT_THROW((void)to_string(other), Error);
  EXPECT_THROW((void)code_value(other, &code, 0), Error);
  EXPECT_THROW((void)max_code_value(other), Error);
  EXPECT_THROW((void)code_bytes(other, 2), Error);
  EXPECT_THROW((void)allows_group_size(other, 128), Error);
  EXPECT_THROW((void)group_size_refusal(other), Error);
  EXPECT_THROW((void)code_dtype(other), Error);
  EXPECT_THROW((void)allows_scale_dtype(other, DType::kFloat32), Error);
  EXPECT_THROW((void)scale_dtype_names(other), Error);
}

TEST(Activations, NamesRoundTripAndOthersAreRefusedByName) {
  EXPECT_EQ(to_string(ActivationFn{}), "swiglu");
  EXPECT_EQ(parse_activation("swiglu"), ActivationFn{});
  for (const char* name : {"gelu", "relu2", "SwiGLU", ""}) {
    expect_unsupported([&] { (void)parse_activation(name); },
                       ("'" + std::string(name) + "' is none of: swiglu").c_str());
  }
}

TEST(Activations, SwigluIsTheOneOfQuant) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float gate : {-200.0f, -1.5f, -0.0f, 0.0f, 1e-40f, 0.75f, 88.0f, kInfinity}) {
    for (const float up : {-3.0f, 0.0f, 1e-40f, 2.0f}) {
      const float h = activate({ActivationKind::kSwiglu}, gate, up), expected = swiglu(gate, up);
      EXPECT_TRUE(h == expected || (std::isnan(h) && std::isnan(expected))) << gate << ' ' << up;
      EXPECT_EQ(std::signbit(h), std::signbit(expected));
    }
  }
}

TEST(Activations, AValueThatIsNoActivationHasNoMeaning) {
  const ActivationFn other{static_cast<ActivationKind>(7)};
  EXPECT_NE(other, ActivationFn{});
  EXPECT_THROW((void)to_string(other), Error);
  EXPECT_THROW((void)activate(other, 1, 1), Error);
}

}  // namespace
}  // namespace sluice
