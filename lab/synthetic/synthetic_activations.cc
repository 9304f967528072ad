#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/fail.h"
#include "sluice/lab/synthetic.h"
#include "sluice/quant.h"
#include "synthetic/random_weights.h"

namespace sluice {
namespace {

constexpr int kNumMassiveChannels = 3;
constexpr std::uint64_t kMassiveTokenEvery = 128;

// Domains of stream_key(), apart from the weights' (seed, layer, expert, matrix).
constexpr std::uint64_t kGainDomain = 0x6761696e, kTokenDomain = 0x746f6b656e,
                        kRouteDomain = 0x726f757465, kCalibrationTokens = 0x63616c6962;

/// What a layer does to each channel of its normalized input.
struct ChannelGains {
  std::vector<float> gain;  // [hidden]
  std::array<std::size_t, kNumMassiveChannels> massive{};
};

ChannelGains channel_gains(std::uint64_t seed, int layer, int hidden) {
  RandomStream random(stream_key({seed, static_cast<std::uint64_t>(layer), kGainDomain}));
  ChannelGains result{.gain = std::vector<float>(static_cast<std::size_t>(hidden))};
  for (float& gain : result.gain) {
    // 0.6 * e^(z / 2); with the outlier channels the input has a size of about one.
    gain = 0.6f * exp2_portable(0.72f * random.normal());
    if (random.next() % 512 == 0) gain *= 10.0f + 40.0f * random.uniform();
  }
  for (std::size_t& channel : result.massive) {
    channel = random.next() % result.gain.size();
    result.gain[channel] = 0.5f;
  }
  return result;
}

/// One token before the gains: normal, perhaps with one massive channel, then RMS-normalized.
void fill_token(RandomStream random, bool is_massive, const ChannelGains& gains, float* x) {
  const std::size_t hidden = gains.gain.size();
  const std::size_t channel = gains.massive[random.next() % kNumMassiveChannels];
  const float size = 300.0f + 700.0f * random.uniform();
  double sum = 0;
  for (std::size_t c = 0; c < hidden; ++c) {
    x[c] = random.normal();
    if (is_massive && c == channel) x[c] = random.next() & 1 ? size : -size;
    sum += static_cast<double>(x[c]) * x[c];
  }
  const auto inverse = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(hidden)));
  for (std::size_t c = 0; c < hidden; ++c) x[c] *= inverse * gains.gain[c];
}

/// x: [hidden], the token at `position` of the stream.
void fill_token_at(const SyntheticTokens& tokens, const ChannelGains& gains, std::int64_t position,
                   float* x) {
  RandomStream random(
      stream_key({tokens.seed, static_cast<std::uint64_t>(tokens.layer), kTokenDomain,
                  tokens.token_seed, static_cast<std::uint64_t>(position)}));
  const bool is_massive = random.next() % kMassiveTokenEvery == 0 || position == 0;
  fill_token(random, is_massive, gains, x);
}

constexpr int kNumCalibrationTokens = 512;
/// Tokens of one expert that are run through gate and up; a constant so that the loop vectorizes.
constexpr int kBatch = 16;

/// dot(row of `m`, x[:, t]) for all t; x is [k, kBatch].
std::array<float, kBatch> multiply_row(const SyntheticMatrix& m, int row, const float* x) {
  std::array<float, kBatch> sums{};
  const auto offset = static_cast<std::size_t>(row) * static_cast<std::size_t>(m.k);
  const std::uint8_t* codes = m.codes.data() + offset / 2;
  const float* scales = m.scales.data() + offset / static_cast<std::size_t>(m.group);
  for (int k = 0; k < m.k; ++k) {
    const float w = static_cast<float>(unpack_int4(codes, k)) * scales[k / m.group];
    for (int t = 0; t < kBatch; ++t) sums[static_cast<std::size_t>(t)] += w * x[k * kBatch + t];
  }
  return sums;
}

/// The rows most likely to hold the largest product, and some ordinary ones.
std::vector<int> rows_to_try(const SyntheticMatrix& gate, const SyntheticMatrix& up) {
  constexpr std::size_t kMaxLarge = 48, kMaxOrdinary = 16;
  std::vector<int> rows(static_cast<std::size_t>(gate.n));
  std::iota(rows.begin(), rows.end(), 0);
  const auto gain = [&](int r) {
    return gate.row_gains[static_cast<std::size_t>(r)] * up.row_gains[static_cast<std::size_t>(r)];
  };
  const std::size_t num_large = std::min(rows.size(), kMaxLarge);
  std::partial_sort(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(num_large), rows.end(),
                    [&](int a, int b) { return std::pair(-gain(a), a) < std::pair(-gain(b), b); });
  rows.resize(std::min(rows.size(), num_large + kMaxOrdinary));
  return rows;
}

/// silu(g) * u without libm.
float portable_swiglu(float g, float u) noexcept {
  const float exponent = std::clamp(-g * 1.442695f, -80.0f, 80.0f);
  return g / (1.0f + exp2_portable(exponent)) * u;
}

}  // namespace

void synthetic_activations(const SyntheticTokens& tokens, MutableTensorView x) {
  check_argument(
      x.shape.rank() == 2 && x.dtype == DType::kBFloat16 && x.dim(1) >= 1 && x.dim(1) <= 1 << 20,
      "synthetic activations go to [num_tokens, hidden] bfloat16, not {} {}", x.shape.to_string(),
      to_string(x.dtype));
  check_argument(tokens.first_token >= 0, "first_token {} is negative", tokens.first_token);
  const auto hidden = static_cast<std::size_t>(x.dim(1));
  std::vector<float> row(hidden);
  const ChannelGains gains = channel_gains(tokens.seed, tokens.layer, static_cast<int>(hidden));
  auto* out = x.as<std::uint16_t>();
  for (std::int64_t t = 0; t < x.dim(0); ++t) {
    fill_token_at(tokens, gains, tokens.first_token + t, row.data());
    for (const float value : row) *out++ = bf16_from_float(value);
  }
}

Calibration::Calibration(const SyntheticCheckpoint& spec, int layer)
    : seed_(spec.seed), layer_(layer), geometry_(spec.geometry) {
  const auto hidden = static_cast<std::size_t>(geometry_.token_width());
  x_.resize(kNumCalibrationTokens * hidden);
  const SyntheticTokens tokens{.seed = seed_, .layer = layer_, .token_seed = kCalibrationTokens};
  const ChannelGains gains = channel_gains(seed_, layer_, geometry_.token_width());
  for (int t = 0; t < kNumCalibrationTokens; ++t) {
    float* const x = x_.data() + static_cast<std::size_t>(t) * hidden;
    fill_token_at(tokens, gains, t, x);
    float amax = 0;
    for (std::size_t c = 0; c < hidden; ++c) amax = std::max(amax, std::fabs(x[c]));
    token_amax_.push_back(amax);
  }
}

/// Tokens that a random router sends to `expert`, at least kBatch of them.
std::vector<int> Calibration::tokens_of(int expert) const {
  RandomStream random(stream_key({seed_, static_cast<std::uint64_t>(layer_), kRouteDomain,
                                  static_cast<std::uint64_t>(expert)}));
  const int expected = kNumCalibrationTokens * geometry_.num_topk / geometry_.num_experts;
  std::vector<int> tokens(static_cast<std::size_t>(std::max(expected, kBatch)));
  for (int& t : tokens) t = static_cast<int>(random.next() % kNumCalibrationTokens);
  return tokens;
}

InputScales Calibration::input_scales(int expert, const SyntheticExpert& weights) const {
  /// Few rows and tokens are tried, so the true maximum is somewhat larger; e4m3 does not mind.
  constexpr float kHeadroom = 2.0f;
  const auto hidden = static_cast<std::size_t>(geometry_.token_width());
  std::vector<int> tokens = tokens_of(expert);
  const auto amax_of = [&](int t) { return token_amax_[static_cast<std::size_t>(t)]; };
  std::ranges::stable_sort(tokens, [&](int a, int b) { return amax_of(a) > amax_of(b); });
  const float x_amax = amax_of(tokens.front());

  std::vector<float> x(hidden * kBatch);
  for (std::size_t c = 0; c < hidden; ++c) {
    for (std::size_t t = 0; t < kBatch; ++t) {
      x[c * kBatch + t] = x_[static_cast<std::size_t>(tokens[t]) * hidden + c];
    }
  }
  const auto& [gate, up, down] = weights.matrices;
  float h_amax = 0;
  for (const int row : rows_to_try(gate, up)) {
    const auto g = multiply_row(gate, row, x.data());
    const auto u = multiply_row(up, row, x.data());
    for (std::size_t t = 0; t < kBatch; ++t) {
      h_amax = std::max(h_amax, std::fabs(portable_swiglu(g[t], u[t])));
    }
  }
  const float w1 = x_amax / kE4m3Max;
  return {.w1 = w1, .w2 = kHeadroom * std::max(h_amax, 1e-3f) / kE4m3Max, .w3 = w1};
}

}  // namespace sluice
