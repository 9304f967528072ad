#include <bit>
#include <cmath>

#include "core/fail.h"
#include "synthetic/random_weights.h"

namespace sluice {
namespace {

/// Deviation of codes when each group of 128 normal weights is scaled so that its largest is 7. (In
/// groups of 32 it would be 3.3; they get the same codes, and more often a forced +-7.)
constexpr float kCodeDeviation = 2.6f;

/// How many of 256 bytes become the code 0, +-1, .. +-7: a normal distribution of that deviation.
constexpr std::array<int, 8> kCodeCounts = {40, 36, 29, 21, 13, 6, 2, 1};

constexpr std::array<std::uint8_t, 256> make_nibbles() {
  std::array<std::uint8_t, 256> nibbles{};
  std::size_t at = 0;
  for (int code = -7; code <= 7; ++code) {
    const int count = kCodeCounts[static_cast<std::size_t>(code < 0 ? -code : code)];
    for (int i = 0; i < count; ++i) nibbles[at++] = static_cast<std::uint8_t>(code & 0xf);
  }
  return nibbles;
}
constexpr auto kNibbles = make_nibbles();
static_assert([] {
  int sum = kCodeCounts[0];
  for (std::size_t i = 1; i < kCodeCounts.size(); ++i) sum += 2 * kCodeCounts[i];
  return sum;
}() == 256);

/// One group: a byte of two codes from two random bytes, and one code of all forced to +-7.
void fill_group(RandomStream& random, int group, std::uint8_t* codes) noexcept {
  for (int i = 0; i < group / 2; i += 4) {
    std::uint64_t bits = random.next();
    for (int j = 0; j < 4; ++j, bits >>= 16) {
      codes[i + j] =
          static_cast<std::uint8_t>(kNibbles[bits & 0xff] | kNibbles[(bits >> 8) & 0xff] << 4);
    }
  }
  const std::uint64_t pick = random.next();
  std::uint8_t& byte = codes[pick & static_cast<std::uint64_t>(group / 2 - 1)];
  const unsigned extreme = pick & 0x80 ? 0x9U : 0x7U;  // -7 or 7
  byte = static_cast<std::uint8_t>(pick & 0x100 ? (byte & 0x0fU) | extreme << 4
                                                : (byte & 0xf0U) | extreme);
}

/// Row gains: log-normal, one row in 512 four to twelve times that, and in one expert of 64 two
/// rows of down at thirty times: the experts that cause massive activations.
void fill_row_gains(RandomStream& random, SyntheticRole role, bool is_super,
                    std::vector<float>& gains) {
  constexpr float kLogDeviation = 0.43f;  // of log2: e^0.3
  for (float& gain : gains) {
    gain = exp2_portable(kLogDeviation * random.normal());
    if (random.next() % 512 == 0) gain *= 4.0f + 8.0f * random.uniform();
  }
  if (role != SyntheticRole::kDown || !is_super) return;
  for (int i = 0; i < 2; ++i) gains[random.next() % gains.size()] *= 30.0f;
}

void fill_matrix(std::uint64_t key, SyntheticRole role, bool is_super, int n, int k, int group,
                 SyntheticMatrix& out) {
  const int groups = k / group;
  out.n = n, out.k = k, out.group = group, out.key = key;
  out.codes.resize(static_cast<std::size_t>(n) * static_cast<std::size_t>(k) / 2);
  out.scales.resize(static_cast<std::size_t>(n) * static_cast<std::size_t>(groups));
  out.row_gains.resize(static_cast<std::size_t>(n));
  RandomStream random(key);
  fill_row_gains(random, role, is_super, out.row_gains);
  // silu(g) * u of two unit normals has size 0.6; the square root is exactly rounded everywhere.
  const float input_size = role == SyntheticRole::kDown ? 0.6f : 1.0f;
  const float base = 1.0f / (kCodeDeviation * input_size * std::sqrt(static_cast<float>(k)));
  std::vector<float> column_gains(static_cast<std::size_t>(groups));
  for (float& gain : column_gains) gain = exp2_portable(0.2f * random.normal());
  std::uint8_t* codes = out.codes.data();
  float* scales = out.scales.data();
  for (int row = 0; row < n; ++row) {
    for (int g = 0; g < groups; ++g, codes += group / 2) {
      fill_group(random, group, codes);
      *scales++ = base * out.row_gains[static_cast<std::size_t>(row)] *
                  column_gains[static_cast<std::size_t>(g)] * (0.85f + 0.3f * random.uniform());
    }
  }
}

}  // namespace

float RandomStream::normal() noexcept {
  const std::uint64_t bits = next();
  const auto sum = static_cast<std::int32_t>((bits & 0xffff) + ((bits >> 16) & 0xffff) +
                                             ((bits >> 32) & 0xffff) + (bits >> 48));
  constexpr float kMean = 131070.0f, kDeviation = 37837.2f;  // 4 * 65535 / 2, 65536 * sqrt(4 / 12)
  return (static_cast<float>(sum) - kMean) / kDeviation;
}

std::uint64_t stream_key(std::initializer_list<std::uint64_t> path) noexcept {
  std::uint64_t key = 0x736c75696365U;
  for (const std::uint64_t step : path) key = RandomStream(key ^ RandomStream(step).next()).next();
  return key;
}

float exp2_portable(float x) noexcept {
  const float whole = std::floor(x);
  const float f = (x - whole) * 0.69314718f;
  // Taylor series of e^f on [0, ln 2].
  const float p =
      1.0f + f * (1.0f + f * (0.5f + f * (1.0f / 6 + f * (1.0f / 24 + f * (1.0f / 120)))));
  const auto exponent = static_cast<std::uint32_t>(static_cast<std::int32_t>(whole) + 127);
  return p * std::bit_cast<float>(exponent << 23);
}

void fill_expert(const SyntheticCheckpoint& spec, int layer, int expert, SyntheticExpert& out) {
  const ModelGeometry& g = spec.geometry;
  const auto key = [&](std::uint64_t what) {
    return stream_key(
        {spec.seed, static_cast<std::uint64_t>(layer), static_cast<std::uint64_t>(expert), what});
  };
  const int group = g.group_size;
  const bool is_super = key(3) % 64 == 0;
  const int hidden = g.token_width(), inner = g.inner_width();
  fill_matrix(key(0), SyntheticRole::kGate, false, inner, hidden, group, out.matrices[0]);
  fill_matrix(key(1), SyntheticRole::kUp, false, inner, hidden, group, out.matrices[1]);
  fill_matrix(key(2), SyntheticRole::kDown, is_super, hidden, inner, group, out.matrices[2]);
}

}  // namespace sluice
