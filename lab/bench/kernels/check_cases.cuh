// check_cases.cuh - what check_w4a8 checks: a case, its host copy of a matrix, the list of cases.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "bench/kernels/check_activation.cuh"
#include "bench/kernels/layer.cuh"

namespace sluice::cuda::bench {

inline double decode_e4m3(std::uint8_t c) {
  const int e = (c >> 3) & 15, m = c & 7;
  if ((c & 0x7f) == 0x7f) return std::nan("");
  const double v = e == 0 ? std::ldexp(m, -9) : std::ldexp(8 + m, e - 10);
  return (c & 0x80) != 0 ? -v : v;
}
inline double decode_bf16(std::uint16_t b) {
  const std::uint32_t bits = std::uint32_t{b} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

struct Case {
  int hidden, intermediate;
  std::vector<int> rows;
  int group;
  ScaleType scale_type;
  WeightCode code;
  bool is_contiguous, is_static;
  const char* activation = "swiglu";
  float x_static = 0.004f;
  bool is_token = false;         // x has one scale per row, h its own per 128; not with is_static
  Spread spread = Spread::kFew;  // of mxfp4
  std::string scale_text() const {
    if (code == WeightCode::kE2M1) {
      return " mxfp4 spread " + std::to_string(static_cast<int>(spread));
    }
    return std::string(scale_type == ScaleType::kBf16 ? " bf16" : " f32") +
           (code == WeightCode::kOnesComplement ? " 7-instr" : " 3-instr");
  }
  std::string name() const {
    return "H " + std::to_string(hidden) + " I " + std::to_string(intermediate) + " E " +
           std::to_string(rows.size()) + " g" + std::to_string(group) + scale_text() +
           (is_contiguous ? " contiguous" : " masked") +
           (is_token       ? " token "
            : !is_static   ? " group "
            : x_static > 1 ? " huge "
                           : " static ") +
           activation;
  }
};

/// Host copy of one matrix of all experts.
struct HostMatrix {
  std::vector<std::uint8_t> codes, scales;
  int n, k, group;
  ScaleType scale_type;
  double scale(std::size_t e, int row, int col) const {
    const std::size_t at = (e * n + row) * (k / group) + col / group;
    if (scale_type == ScaleType::kE8M0) return std::ldexp(1.0, scales[at] - 127);
    if (scale_type == ScaleType::kBf16)
      return decode_bf16(reinterpret_cast<const std::uint16_t*>(scales.data())[at]);
    return reinterpret_cast<const float*>(scales.data())[at];
  }
  double weight(std::size_t e, int row, int col) const {
    constexpr double kE2M1[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    const int v = codes[((e * n + row) * k + col) / 2] >> (col % 2 * 4) & 15;
    if (scale_type == ScaleType::kE8M0) return v >= 8 ? -kE2M1[v - 8] : kE2M1[v];
    return v >= 8 ? v - 16 : v;
  }
};

/// Row `row` of matrix times activation codes x with scales xs: one for each `x_group` channels, or
/// null for a static one.
inline Sum dot(const HostMatrix& m, std::size_t e, int row, const std::uint8_t* x, const float* xs,
               float static_scale, int x_group = 128) {
  static const auto table = [] {
    std::vector<double> t(256);
    for (int i = 0; i < 256; ++i) t[i] = decode_e4m3(static_cast<std::uint8_t>(i));
    return t;
  }();
  Sum sum;
  for (int g = 0; g < m.k; g += m.group) {
    double part = 0, magnitude = 0;
    for (int k = g; k < g + m.group; ++k) {
      const double t = table[x[k]] * m.weight(e, row, k);
      part += t;
      magnitude += std::fabs(t);
    }
    const double s = m.scale(e, row, g) * (xs != nullptr ? xs[g / x_group] : static_scale);
    sum.value += part * s;
    sum.magnitude += magnitude * s;
  }
  return sum;
}

/// Which cases.
struct CaseChoice {
  bool is_short = false, is_tiny = false, is_carried = false;
  bool has_int4 = true, has_mxfp4 = true;
};

inline const std::vector<int> kAllRows{0,  1,  3,   7,   8,   9,    16,   17, 63,
                                       64, 65, 127, 128, 129, 1000, 1024, 2,  0};
inline const std::vector<int> kFewRows{0, 5, 0, 9, 33, 70, 0};
inline const std::vector<int> kTurns{9, 40, 0, 64, 17, 130, 12, 33};
inline const char* const kLimits[] = {"swiglu:limit=0.25", "swiglu-oai:alpha=1.702,limit=0.25",
                                      "situ:beta=0.5,linear_beta=0.25"};

/// Down tiles of one and two steps, so many that a ticket has several: uneven, the last one short.
inline std::vector<int> many_experts() {
  std::vector<int> many(160);
  for (int e = 0; e < 160; ++e) many[e] = e % 4;
  many[9] = 70;
  return many;
}

/// So many token tiles that phases with short K take turns, also with all CTAs: one expert has
/// several, some have none.
inline std::vector<int> busy_experts() {
  std::vector<int> busy(180);
  for (int e = 0; e < 180; ++e) busy[e] = e % 9 == 4 ? 0 : 9 + e * 5 % 56;
  busy[7] = 300;
  busy[171] = 130;
  return busy;
}

inline Case token(Case c) {
  c.is_token = true;
  return c;
}

/// Few and small, for sanitizers: K of down is long enough for every finished row to leave by the
/// producers' warp (Config::kFewestSteps); the last row tile of y is half a tile.
inline std::vector<Case> carried_cases(const CaseChoice& choice) {
  const auto kBf16 = ScaleType::kBf16, kF32 = ScaleType::kF32;
  const auto k7 = WeightCode::kOnesComplement, k3 = WeightCode::kSignMagnitude;
  const std::vector<int> rows{5, 0, 33, 130};
  std::vector<Case> cases;
  if (choice.has_int4) {
    cases.push_back({384, 1024, rows, 128, kBf16, k3, false, false});
    cases.push_back({384, 1024, rows, 32, kBf16, k3, false, false});
    cases.push_back({384, 1024, rows, 128, kF32, k7, true, true});
    cases.push_back(token({384, 1024, rows, 128, kBf16, k3, true, false}));
  }
  if (choice.has_mxfp4) {
    cases.push_back({384, 1024, rows, 32, ScaleType::kE8M0, WeightCode::kE2M1, false, false});
    cases.push_back({384, 1024, rows, 32, ScaleType::kE8M0, WeightCode::kE2M1, true, true});
    cases.back().spread = Spread::kOneFar;
  }
  return cases;
}

inline std::vector<Case> int4_cases(const CaseChoice& choice) {
  const std::vector<int>&all = kAllRows, &few = kFewRows;
  const auto kBf16 = ScaleType::kBf16, kF32 = ScaleType::kF32;
  const auto k7 = WeightCode::kOnesComplement, k3 = WeightCode::kSignMagnitude;
  std::vector<Case> cases{
      {128, 128, few, 128, kBf16, k7, false, false}, {384, 128, few, 128, kBf16, k3, true, false},
      {128, 384, few, 128, kF32, k7, false, true},   {384, 1792, few, 32, kBf16, k7, true, false},
      {384, 384, few, 32, kF32, k3, false, true},    {1792, 384, few, 128, kF32, k3, true, true},
      {128, 128, {0}, 128, kBf16, k7, false, false}, {128, 128, {1}, 128, kBf16, k3, false, true},
  };
  const std::vector<int> many = many_experts();
  cases.push_back({3456, 128, many, 128, kBf16, k3, false, false});
  cases.push_back({3456, 256, many, 32, kF32, k7, true, false});
  cases.push_back({3456, 128, many, 128, kBf16, k7, false, true});
  cases.push_back({640, 256, busy_experts(), 128, kBf16, k3, false, false});
  cases.push_back({384, 128, busy_experts(), 32, kBf16, k7, true, false});
  for (const char* const fn : kLimits) {
    cases.push_back({384, 384, few, 128, kBf16, k3, false, false, fn});
    cases.push_back({1792, 256, few, 32, kF32, k7, true, false, fn});
    cases.push_back({384, 256, few, 128, kBf16, k7, true, true, fn});
    cases.push_back({384, 256, few, 128, kF32, k3, false, true, fn, 1e38f});  // Infinite sums.
  }
  cases.push_back({384, 256, few, 128, kBf16, k3, false, true, "swiglu", 1e38f});
  cases.insert(cases.begin() + 4, token({384, 384, few, 32, kBf16, k7, true, false}));
  cases.insert(cases.begin() + 5, token({1792, 384, few, 128, kF32, k3, false, false}));
  cases.push_back(token({128, 128, few, 128, kBf16, k7, false, false}));
  cases.push_back(token({3456, 256, many, 128, kBf16, k3, true, false}));
  cases.push_back(token({384, 256, few, 32, kF32, k3, false, false, kLimits[0]}));
  // Few CTAs compute it in turns, row tiles without a stop.
  cases.insert(cases.begin(), {640, 128, kTurns, 128, kBf16, k3, true, false});
  if (choice.is_tiny) cases.resize(8);  // all kinds of activation scales, both groups, both codes
  if (!choice.is_short && !choice.is_tiny) {
    cases.push_back({1792, 384, all, 128, kBf16, k7, false, false});
    cases.push_back({3584, 1792, all, 128, kBf16, k3, true, false});
    cases.push_back({7168, 2048, all, 128, kBf16, k7, false, false});
    cases.push_back({7168, 2048, all, 128, kBf16, k3, true, true});
    cases.push_back({7168, 384, all, 32, kBf16, k7, false, false});
    cases.push_back({7168, 384, all, 32, kBf16, k3, true, true});
    cases.push_back({1792, 7168, all, 128, kF32, k7, true, false});
    cases.push_back(token({7168, 384, all, 128, kBf16, k3, false, false}));
    cases.push_back(token({1792, 384, all, 32, kBf16, k7, true, false}));
  }
  return cases;
}

/// Near and far tiles under every kind of activation scales; wide and narrow matrices.
inline std::vector<Case> mxfp4_cases(const CaseChoice& choice) {
  const std::vector<int>&all = kAllRows, &few = kFewRows, many = many_experts();
  const auto fp4 = [&](int hidden, int inter, const std::vector<int>& rows, bool is_contiguous,
                       bool is_static, Spread spread, const char* fn = "swiglu") {
    Case c{hidden,        inter,     rows, 32, ScaleType::kE8M0, WeightCode::kE2M1,
           is_contiguous, is_static, fn};
    c.spread = spread;
    return c;
  };
  std::vector<Case> cases{fp4(128, 128, few, false, false, Spread::kMost),
                          token(fp4(384, 384, few, true, false, Spread::kOneFar)),
                          fp4(384, 256, few, false, true, Spread::kFar, kLimits[0]),
                          fp4(384, 1792, few, true, false, Spread::kFar),
                          fp4(1792, 384, few, false, false, Spread::kZeros, kLimits[0]),
                          fp4(384, 384, few, true, false, Spread::kAllBytes),
                          fp4(1792, 384, few, true, true, Spread::kOneFar),
                          fp4(1792, 256, few, true, false, Spread::kFew, kLimits[1]),
                          fp4(1792, 256, few, true, false, Spread::kMost, kLimits[2]),
                          token(fp4(1792, 384, few, false, false, Spread::kMost)),
                          fp4(3456, 128, many, false, false, Spread::kFew),
                          fp4(384, 256, busy_experts(), true, false, Spread::kFew),
                          token(fp4(3456, 256, many, true, false, Spread::kOneFar, kLimits[0]))};
  if (choice.is_tiny) cases.resize(3);
  if (choice.is_short || choice.is_tiny) return cases;
  cases.push_back(fp4(4096, 2048, all, false, false, Spread::kFew, kLimits[0]));
  cases.push_back(fp4(7168, 384, all, true, true, Spread::kMost));
  cases.push_back(token(fp4(7168, 384, all, false, false, Spread::kOneFar)));
  cases.push_back(fp4(3584, 3072, few, true, false, Spread::kFew, kLimits[2]));
  return cases;
}

inline std::vector<Case> all_cases(const CaseChoice& choice) {
  if (choice.is_carried) return carried_cases(choice);
  std::vector<Case> cases;
  if (choice.has_mxfp4) cases = mxfp4_cases(choice);
  if (!choice.has_int4) return cases;
  const std::vector<Case> int4 = int4_cases(choice);
  cases.insert(cases.end(), int4.begin(), int4.end());
  return cases;
}

}  // namespace sluice::cuda::bench
