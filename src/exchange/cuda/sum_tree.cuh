// sum_tree.cuh - adding up rows of one token in the order of exchange/sum_parts.h, 8 channels at a
// time.
#pragma once

#include "exchange/cuda/rail_protocol.cuh"
#include "exchange/limits.h"

namespace sluice::cuda {

/// Channels that a thread adds up at a time: one vector of bf16.
inline constexpr int kLanes = 8;

/// Rows of one token at hand. Shared by a team.
struct RowsOfToken {
  const Vector* at[kMaxTopk];  // [hidden / 8] or null
  float weight[kMaxTopk];
  std::int32_t part[kMaxTopk];  // Within its host.
};

struct alignas(16) Lanes {
  float value[kLanes];
};
/// A vector of float32.
struct alignas(16) Half {
  float value[kLanes / 2];
};
struct alignas(16) Level {
  Lanes sum;
  int meets;  // Where its last value meets the one before it.
};

/// What a team shares while it adds up.
struct SumSpace {
  RowsOfToken* rows;
  Level* levels;  // [levels_of(p), size]
};

/// Levels of the tree of hosts and, above it, of that of a host's parts.
SLUICE_STEP int levels_of(const RailSlot& p) {
  int levels = 2;
  for (int n = 1; n < p.num_hosts; n *= 2) ++levels;
  for (int n = 1; n < p.num_parts; n *= 2) ++levels;
  return levels;
}

SLUICE_STEP int bits_of(unsigned value) {
  int bits = 0;
  for (; value != 0; value >>= 1) ++bits;
  return bits;
}

/// Adds up what it is given in ascending order of an index, as the rounds of neighbours do: of two
/// values the nearer ones meet first, and a missing neighbour is left out. Its levels are memory
/// that the team shares, since registers have no index: those of a thread are `stride` apart.
class SumTree {
 public:
  SLUICE_STEP SumTree(Level* levels, int stride) : levels_(levels), stride_(stride) {}

  SLUICE_STEP void add(int index, const Lanes& value) {
    int meets = 0;
    if (depth_ > 0) {
      meets = bits_of(static_cast<unsigned>(last_ ^ index));
      while (depth_ > 1 && level(depth_ - 1).meets < meets) merge();
    }
    level(depth_).sum = value;
    level(depth_).meets = meets;
    ++depth_;
    last_ = index;
  }
  [[nodiscard]] SLUICE_STEP bool is_empty() const { return depth_ == 0; }
  /// Zeros of nothing.
  [[nodiscard]] SLUICE_STEP Lanes total() {
    while (depth_ > 1) merge();
    return depth_ == 1 ? level(0).sum : Lanes{};
  }
  /// Levels that it does not use now.
  [[nodiscard]] SLUICE_STEP SumTree above() const { return {levels_ + depth_ * stride_, stride_}; }

 private:
  SLUICE_STEP Level& level(int i) const { return levels_[i * stride_]; }
  SLUICE_STEP void merge() {
    --depth_;
    Lanes left = level(depth_ - 1).sum;
    const Lanes right = level(depth_).sum;
    SLUICE_UNROLL
    for (int i = 0; i < kLanes; ++i) left.value[i] = add_rounded(left.value[i], right.value[i]);
    level(depth_ - 1).sum = left;
  }
  Level* levels_;
  int stride_, depth_ = 0, last_ = 0;
};

/// sum += weight * row, of 8 channels of bf16.
SLUICE_STEP void add_row(Lanes& sum, const Vector& row, float weight) {
  SLUICE_UNROLL
  for (int i = 0; i < kLanes / 2; ++i) {
    const std::uint32_t pair = row.word[i];
    float& low = sum.value[2 * i];
    float& high = sum.value[2 * i + 1];
    low = add_rounded(low, multiply_rounded(weight, float_of_bits(pair << 16)));
    high = add_rounded(high, multiply_rounded(weight, float_of_bits(pair & 0xffff0000u)));
  }
}

/// Those rows of a token that are of part `part`, or all: 8 channels from vector `v` on, in top-k
/// order from +0. False if there is none.
SLUICE_STEP bool add_part(const RowsOfToken& rows, int num_topk, int part, int v, Lanes& sum) {
  constexpr int kInFlight = 8;
  bool found = false;
  for (int k0 = 0; k0 < num_topk; k0 += kInFlight) {
    Vector in[kInFlight];
    bool valid[kInFlight];
    SLUICE_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int k = k0 + i;
      valid[i] = k < num_topk && rows.at[k] != nullptr && (part < 0 || rows.part[k] == part);
      if (valid[i]) in[i] = rows.at[k][v];
    }
    SLUICE_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (!valid[i]) continue;
      add_row(sum, in[i], rows.weight[k0 + i]);
      found = true;
    }
  }
  return found;
}

/// The smallest part above `part` that has a row, or -1.
SLUICE_STEP int next_part(const RowsOfToken& rows, int num_topk, int part) {
  int next = -1;
  for (int k = 0; k < num_topk; ++k) {
    if (rows.at[k] == nullptr || rows.part[k] <= part) continue;
    if (next < 0 || rows.part[k] < next) next = rows.part[k];
  }
  return next;
}

}  // namespace sluice::cuda
