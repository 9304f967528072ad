// sum_parts.h - the order in which combine adds up, whatever number of hosts there are.
//
//   expert slots   [  part 0  |  part 1  |  part 2  |  part 3  ]      sum_parts = 4
//   a part            s0         s1         s2         s3            in order of k, from +0
//   round 1              s0 + s1               s2 + s3               with two hosts: one on each
//   round 2                     (s0 + s1) + (s2 + s3)                at the token's rank
//
// Everything is float32, and every product and sum is rounded by itself. A part without an entry is
// left out: the sum of it and its neighbour is the neighbour. In a round of an odd number the last
// one waits. A host whose parts are a power of two, at the same place in the order, can so add them
// all before anything leaves it, and no bit depends on whether it did.
//
// Pure; host code and kernels may follow it alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sluice/exchange.h"

namespace sluice {

/// Which part each expert slot belongs to, and which host each part.
class SumParts {
 public:
  SumParts() = default;
  /// Throws: kInvalidArgument naming sum_parts, the hosts and the slots if they do not fit.
  SumParts(const ExchangeConfig& config, int num_ranks);

  [[nodiscard]] int num_parts() const noexcept { return num_parts_; }
  /// Of one host. Host h has parts [h * parts_per_host(), ...) unless rows go home alone.
  [[nodiscard]] int parts_per_host() const noexcept { return parts_per_host_; }
  /// Rows go home by themselves, and are added there in order of k.
  [[nodiscard]] bool is_one() const noexcept { return num_parts_ == 1; }
  [[nodiscard]] int part_of(int slot) const { return part_of_[static_cast<std::size_t>(slot)]; }

 private:
  int num_parts_ = 1, parts_per_host_ = 1;
  std::vector<int> part_of_;  // [total_slots]
};

/// The sum of one token, part by part. Its memory is used again for the next one.
class PartSum {
 public:
  PartSum(int num_parts, std::int64_t width);
  /// Forgets everything.
  void clear();
  /// part += weight * row, `row` being [width] bf16.
  void add_row(int part, float weight, const std::uint16_t* row);
  /// The part, as another one made it: [width] float32.
  void set(int part, const float* sum);
  /// Adds the parts in rounds: [width], until clear(). Null if no part has an entry.
  [[nodiscard]] const float* total();

 private:
  [[nodiscard]] float* values(std::size_t part) { return &values_[part * width_]; }
  std::size_t width_;
  std::vector<float> values_;         // [num_parts, width]
  std::vector<std::uint8_t> is_set_;  // [num_parts]
  std::vector<float*> round_;         // What is left to add; null: nothing.
};

/// y = bf16(factor * total), or zeros where total is null.
void round_sum(const float* total, std::int64_t width, float factor, std::uint16_t* y);

}  // namespace sluice
