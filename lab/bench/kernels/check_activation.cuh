// check_activation.cuh - the kernels' activation functions by themselves: against the scalar
// definition where numbers end, and against float64 over many random pairs. And elements of h that
// the expert kernel made of sums.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "backend/cuda/activation.cuh"
#include "bench/kernels/layer.cuh"

namespace sluice::cuda::bench {

inline const char* const kActivations[] = {
    "swiglu", "swiglu:limit=10", "swiglu-oai:alpha=1.702,limit=7", "situ:beta=4,linear_beta=25"};

/// h = gate_factor * up_factor, in float64; `gate` has met its limit already.
inline double gate_factor(const ActivationFn& fn, double gate) {
  const double a = fn.kind == ActivationKind::kSwigluOai ? double{fn.alpha} : 1.0;
  const double g = fn.kind == ActivationKind::kSitu ? fn.beta * std::tanh(gate / fn.beta) : gate;
  return g / (1 + std::exp(-a * gate));
}
inline double up_factor(const ActivationFn& fn, double up) {
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
      return up;
    case ActivationKind::kSwigluLimit:
      return std::clamp(up, -double{fn.limit}, double{fn.limit});
    case ActivationKind::kSwigluOai:
      return std::clamp(up, -double{fn.limit}, double{fn.limit}) + 1;
    case ActivationKind::kSitu:
      return fn.linear_beta * std::tanh(up / fn.linear_beta);
  }
  return std::nan("");
}

template <Activations Set>
__global__ void activate_all(ActivationParams params, const float* gate, const float* up, float* h,
                             int n) {
  visit_activation<Set>(params, [&](const auto& activate) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
      h[i] = activate(gate[i], up[i]);
    }
  });
}

inline std::vector<float> activate_on_device(const ActivationFn& fn, const std::vector<float>& gate,
                                             const std::vector<float>& up) {
  Buffer<float> g(gate.size()), u(up.size()), h(gate.size());
  g.upload(gate), u.upload(up);
  const auto n = static_cast<int>(gate.size());
  if (fn.kind == ActivationKind::kSwiglu) {
    activate_all<Activations::kSwiglu>
        <<<256, 256>>>(activation_params(fn), g.data, u.data, h.data, n);
  } else {
    activate_all<Activations::kOthers>
        <<<256, 256>>>(activation_params(fn), g.data, u.data, h.data, n);
  }
  SLUICE_CUDA_CHECK(cudaDeviceSynchronize());
  return h.download();
}

/// Around the limits, subnormal, huge, infinite and NaN, both signs.
inline std::vector<float> edge_values() {
  std::vector<float> list = {0,     1e-45f,  1e-40f,  1.2e-38f, 1e-20f,  1e-4f, 0.03f,
                             0.25f, 0.9f,    1,       1.001f,   1.999f,  2,     2.001f,
                             2.4f,  4,       6.25,    12.4999,  12.5001, 20,    25,
                             80,    88.6f,   88.7f,   88.8,     104,     1000,  1e20f,
                             1e38f, 2.36e38, 2.37e38, 3.4e38f,  INFINITY};
  for (const float limit : {7.0f, 10.0f}) {
    list.push_back(std::nextafter(limit, 0.0f));
    list.push_back(limit);
    list.push_back(std::nextafter(limit, 100.0f));
  }
  const std::size_t count = list.size();
  for (std::size_t i = 0; i < count; ++i) list.push_back(-list[i]);
  list.push_back(std::numeric_limits<float>::quiet_NaN());
  return list;
}

/// Every pair of edge values: NaN where the definition has NaN, infinity where it has infinity,
/// else within 32 half ulp of it (and 2^-126, below which factors have lost bits).
inline int check_edges(const char* text) {
  const ActivationFn fn = parse_activation(text);
  const std::vector<float> list = edge_values();
  std::vector<float> gate, up;
  for (const float g : list) {
    for (const float u : list) gate.push_back(g), up.push_back(u);
  }
  const std::vector<float> h = activate_on_device(fn, gate, up);
  int failures = 0;
  for (std::size_t i = 0; i < h.size(); ++i) {
    const float want = activate(fn, gate[i], up[i]);
    // A subnormal factor is exact to 2^-149 only, and the other one multiplies that. Where exp() is
    // about to overflow it has no correction.
    const double lost = 0x1p-126 + 0x1p-148 * (std::isinf(up[i]) ? 0 : std::fabs(double{up[i]}));
    const double relative = gate[i] * std::max(1.0f, fn.alpha) < -88 ? 0x1p-17 : 0x1p-19;
    const bool same = std::isnan(want) ? std::isnan(h[i])
                      : std::isinf(want)
                          ? h[i] == want
                          : std::fabs(double{h[i]} - want) <= std::fabs(want) * relative + lost;
    if (same) continue;
    if (++failures <= 5) {
      std::printf("  FAIL %s(%g, %g): got %g want %g\n", text, gate[i], up[i], h[i], want);
    }
  }
  std::printf("%s %-32s %zu pairs of edge values against the definition\n",
              failures == 0 ? "ok  " : "FAIL", text, h.size());
  return failures;
}

/// Random pairs over 30 octaves: the largest error in units of 2^-24 of h, which must stay below
/// the 16 (two tanh(): 32) that the float64 reference allows.
inline int check_precision(const char* text) {
  const ActivationFn fn = parse_activation(text);
  constexpr int kPairs = 1 << 21;
  std::vector<float> gate(kPairs), up(kPairs);
  for (int i = 0; i < kPairs; ++i) {
    const auto value = [&](std::uint64_t seed) {
      const std::uint32_t r = hash(seed * kPairs + i);
      const float x = std::exp2((r >> 8) * 0x1p-24f * 30 - 24);  // 2^-24 .. 2^6
      return (r & 1) != 0 ? -x : x;
    };
    gate[i] = value(1), up[i] = value(2);
  }
  const std::vector<float> h = activate_on_device(fn, gate, up);
  double worst = 0;
  int worst_at = 0;
  for (int i = 0; i < kPairs; ++i) {
    const double g = fn.limit > 0 ? std::fmin(gate[i], fn.limit) : gate[i];
    const double want = gate_factor(fn, g) * up_factor(fn, up[i]);
    // Where exp() overflows in float32, h is 0. alpha * gate is rounded before exp().
    if (g * std::fmax(1.0, fn.alpha) < -88) continue;
    const double slack = fn.alpha > 0 && g < 0 ? std::fabs(fn.alpha * g) : 0;
    const double error = std::fabs(h[i] - want) / std::fabs(want) * 0x1p24 - slack;
    if (want != 0 && error > worst) worst = error, worst_at = i;
  }
  const bool ok = worst < (fn.kind == ActivationKind::kSitu ? 32 : 16);
  std::printf("%s %-32s %d random pairs: worst error %.1f of 2^-24, at (%g, %g)\n",
              ok ? "ok  " : "FAIL", text, kPairs, worst, gate[worst_at], up[worst_at]);
  return ok ? 0 : 1;
}

inline constexpr double kAccumulator = 0x1p-12;  // stated constant: error / sum |a||w|

struct Sum {
  double value = 0, magnitude = 0;
};

struct Report {
  double worst_y = 0, worst_h = 0;
  long long checked = 0, failures = 0;
  long long num_hidden = 0;
  long long bitten = 0, num_nan = 0;  ///< Elements of h beyond a limit; that are NaN.
  void fail(const char* what, int e, int row, int col, double got, double want) {
    if (++failures <= 5)
      std::printf("  FAIL %s expert %d row %d column %d: got %g want %g\n", what, e, row, col, got,
                  want);
  }
};

/// What float32 makes of a sum: infinite beyond its largest number.
inline double as_float32(double x) {
  return std::fabs(x) > 3.4028235e38 ? std::copysign(INFINITY, x) : x;
}

/// A number known up to +-error; `error` is NaN where float32 may or may not have it.
struct Bounded {
  double value, error;
};

/// The image of a sum under a function that never falls and is not steeper than 1.
template <class Function>
Bounded image(const Sum& sum, const Function& f) {
  const double error = kAccumulator * sum.magnitude;
  const double low = f(as_float32(sum.value - error)), high = f(as_float32(sum.value + error));
  const double value = f(as_float32(sum.value));
  return {value, low == high ? 0 : std::max(value - low, high - value)};
}

/// One element of h, `code` as it was decoded, against the activation in float64.
template <class Fail>
void check_hidden(const ActivationFn& fn, const Sum& gate, const Sum& up, double code, double s,
                  Report& r, const Fail& fail) {
  const double limit = fn.limit > 0 ? fn.limit : INFINITY;
  const Bounded g = image(gate, [&](double x) { return std::min(x, limit); });
  const Bounded u = image(up, [&](double x) { return up_factor(fn, x); });
  const double a = gate_factor(fn, g.value), want = a * u.value, got = code * s;
  ++r.checked, ++r.num_hidden;
  r.bitten += gate.value > std::max(fn.limit, fn.beta) ||
              std::fabs(up.value) > std::max(fn.limit, fn.linear_beta);
  r.num_nan += std::isnan(got);
  if (std::isnan(g.error) || std::isinf(g.error) || std::isnan(u.error) || std::isinf(u.error))
    return;  // At float32's end.
  if (std::isnan(want) || std::isnan(got)) {
    if (std::isnan(want) != std::isnan(got)) fail(got, want);
    return;
  }
  const double input =
      (1.1 * g.error * (std::fabs(u.value) + u.error) + std::fabs(a) * u.error) / kAccumulator;
  const double round = std::max(std::fabs(want) * 0x1p-4, s * 0x1p-10) * 1.0001;
  if (std::fabs(want) > 447.9 * s && std::fabs(got) > 447 * s && (want > 0) == (got > 0))
    return;  // Saturated.
  const double err = std::fabs(got - want);
  if (input > 0) r.worst_h = std::max(r.worst_h, (err - round) / input);
  if (!(err <= round + kAccumulator * input)) fail(got, want);
}

}  // namespace sluice::cuda::bench
