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
  for (const char* name : {"mxfp4", "INT4", ""}) {
    expect_unsupported([&] { (void)parse_weight_format(name); },
                       ("'" + std::string(name) + "' is none of: int4").c_str());
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

TEST(WeightFormats, AValueThatIsNoFormatHasNoMeaning) {
  const auto other = static_cast<WeightFormat>(7);
  const std::uint8_t code = 0;
  EXPECT_THROW((void)to_string(other), Error);
  EXPECT_THROW((void)code_value(other, &code, 0), Error);
  EXPECT_THROW((void)max_code_value(other), Error);
  EXPECT_THROW((void)code_bytes(other, 2), Error);
  EXPECT_THROW((void)allows_group_size(other, 128), Error);
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
