// The activation functions: values against float64 around the limits, subnormal, huge and NaN;
// texts; refusals of parameters.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "sluice/activation.h"
#include "sluice/error.h"

namespace sluice {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

constexpr ActivationFn kSwiglu{};
constexpr ActivationFn kLimit{.kind = ActivationKind::kSwigluLimit, .limit = 10};
constexpr ActivationFn kOai{.kind = ActivationKind::kSwigluOai, .limit = 7, .alpha = 1.702f};
constexpr ActivationFn kSitu{.kind = ActivationKind::kSitu, .beta = 4, .linear_beta = 25};

/// From the words of the definition, in float64, for finite numbers.
double exact(const ActivationFn& fn, double gate, double up) {
  const double g = fn.limit > 0 ? std::fmin(gate, fn.limit) : gate;
  const double u = fn.limit > 0 ? std::fmax(std::fmin(up, fn.limit), -fn.limit) : up;
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
    case ActivationKind::kSwigluLimit:
      return g / (1 + std::exp(-g)) * u;
    case ActivationKind::kSwigluOai:
      return g / (1 + std::exp(-static_cast<double>(fn.alpha) * g)) * (u + 1);
    case ActivationKind::kSitu:
      return fn.beta * std::tanh(g / fn.beta) / (1 + std::exp(-g)) *
             (fn.linear_beta * std::tanh(u / fn.linear_beta));
  }
  return NAN;
}

std::vector<float> values() {
  std::vector<float> list = {0,    1e-45f, 1e-40f, 1.2e-38f, 1e-20f,  1e-4f,  0.03f, 0.25f,
                             0.9f, 1,      1.001f, 2.4f,     4,       6.25f,  20,    25,
                             80,   104,    1000,   1e20f,    2.5e38f, 3.4e38f};
  for (const float limit : {7.0f, 10.0f}) {
    list.push_back(std::nextafter(limit, 0.0f));
    list.push_back(limit);
    list.push_back(std::nextafter(limit, 100.0f));
  }
  const std::size_t count = list.size();
  for (std::size_t i = 0; i < count; ++i) list.push_back(-list[i]);
  return list;
}

TEST(Activation, IsItsDefinitionForFiniteNumbers) {
  for (const ActivationFn& fn : {kSwiglu, kLimit, kOai, kSitu}) {
    for (const float gate : values()) {
      for (const float up : values()) {
        const double expected = exact(fn, gate, up);
        const float h = activate(fn, gate, up);
        if (std::fabs(expected) > std::numeric_limits<float>::max()) {
          EXPECT_TRUE(std::isinf(h)) << to_string(fn) << ' ' << gate << ' ' << up;
          continue;
        }
        // alpha * gate is rounded before exp(): |t| roundings. Below the smallest normal number
        // factors have lost bits; the other factor multiplies that.
        const double t = std::fmin(std::fabs(1.702 * gate), 200.0);
        // float32's exp() overflows below -88.7: h is 0 there, and the exact one below 1e-36 |up|.
        const double lost = gate * std::fmax(1.0f, fn.alpha) < -88.7 ? std::fabs(expected) : 0;
        const double tolerance = lost + std::fabs(expected) * (16 + t) * 0x1p-24 +
                                 2 * 1.5e-45 * (2 + std::fabs(static_cast<double>(up))) + 1e-36;
        EXPECT_NEAR(h, expected, tolerance) << to_string(fn) << ' ' << gate << ' ' << up;
      }
    }
  }
}

TEST(Activation, LimitsHoldExactlyAtTheirEdge) {
  for (const ActivationFn& fn : {kLimit, kOai}) {
    const float limit = fn.limit, below = std::nextafter(limit, 0.0f);
    for (const float beyond : {std::nextafter(limit, 100.0f), 30.0f, 3e38f, kInfinity}) {
      EXPECT_EQ(activate(fn, beyond, 2), activate(fn, limit, 2));
      EXPECT_EQ(activate(fn, 2, beyond), activate(fn, 2, limit));
      EXPECT_EQ(activate(fn, 2, -beyond), activate(fn, 2, -limit));
    }
    EXPECT_NE(activate(fn, 1, below), activate(fn, 1, limit));
    EXPECT_NE(activate(fn, 1, -below), activate(fn, 1, -limit));
    EXPECT_LT(activate(fn, below, limit), activate(fn, limit, limit));
    // The gate has no limit below: silu(-12) is not silu(-L).
    EXPECT_NE(activate(fn, -12, 2), activate(fn, -limit, 2));
  }
  EXPECT_EQ(activate(kSitu, kInfinity, kInfinity), 4 * 25);
  EXPECT_EQ(activate(kSitu, kInfinity, -kInfinity), -4 * 25);
  EXPECT_EQ(activate(kSitu, -kInfinity, 1), 0);
}

TEST(Activation, ANanStaysOne) {
  for (const ActivationFn& fn : {kSwiglu, kLimit, kOai, kSitu}) {
    for (const float other : {-1e30f, -1.0f, 0.0f, 2.0f, 1e30f, kNan}) {
      EXPECT_TRUE(std::isnan(activate(fn, kNan, other))) << to_string(fn) << ' ' << other;
      EXPECT_TRUE(std::isnan(activate(fn, other, kNan))) << to_string(fn) << ' ' << other;
    }
  }
}

TEST(Activation, TextsTellEveryFloatFromTheNext) {
  EXPECT_EQ(to_string(kSwiglu), "swiglu");
  EXPECT_EQ(to_string(kLimit), "swiglu:limit=10");
  EXPECT_EQ(to_string(kOai), "swiglu-oai:alpha=1.702,limit=7");
  EXPECT_EQ(to_string(kSitu), "situ:beta=4,linear_beta=25");
  for (const float limit : {1e-45f, 0.1f, 10.0f, 16777217.0f, 3.4e38f}) {
    for (const float value : {limit, std::nextafter(limit, kInfinity)}) {
      const ActivationFn fn{.kind = ActivationKind::kSwigluLimit, .limit = value};
      EXPECT_EQ(parse_activation(to_string(fn)), fn) << to_string(fn);
    }
  }
  for (const ActivationFn& fn : {kSwiglu, kLimit, kOai, kSitu}) {
    EXPECT_EQ(parse_activation(to_string(fn)), fn);
  }
  EXPECT_EQ(parse_activation("swiglu-oai:limit=7,alpha=1.702"), kOai);
}

TEST(Activation, WrongTextsAndParametersAreRefusedByName) {
  const auto refused = [](const std::string& text, const std::string& why) {
    try {
      (void)parse_activation(text);
      ADD_FAILURE() << "not refused: " << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << text;
      EXPECT_THAT(error.what(), testing::HasSubstr(why)) << text;
    }
  };
  refused("swiglu:limit=0", "limit = 0 must be finite and above 0");
  refused("swiglu:limit=-1", "limit = -1 must be");
  refused("swiglu:limit=inf", "limit = inf must be");
  refused("swiglu:limit=nan", "limit = nan must be");
  refused("swiglu:limit=ten", "limit = 'ten' is not a float32");
  refused("swiglu:limit=1e99", "limit = '1e99' is not a float32");
  refused("swiglu:limit", "'limit' is not alpha=");
  refused("swiglu:", "limit = 0 must be");
  refused("swiglu:limit=1,limit=2", "limit is given twice");
  refused("swiglu:limit=1,alpha=2", "alpha = 2 is not a parameter");
  refused("swiglu-oai:limit=7", "alpha = 0 must be");
  refused("situ", "beta = 0 must be");
  refused("situ:beta=4,linear_beta=25,limit=10", "limit = 10 is not a parameter");
  refused("situ:beta=4,gamma=1", "'gamma=1' is not alpha=");
}

}  // namespace
}  // namespace sluice
