#include "exchange/sum_parts.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/fail.h"
#include "exchange/network_record.h"
#include "sluice/quant.h"

namespace sluice {

SumParts::SumParts(const ExchangeConfig& config, int num_ranks)
    : num_parts_(config.total_parts()), part_of_(static_cast<std::size_t>(config.total_slots())) {
  const int num_hosts = config.hosts.num_hosts(), slots = config.total_slots();
  check_argument(num_parts_ >= 1 && num_parts_ <= slots, "sum_parts {} is not in [0, {}]",
                 num_parts_, slots);
  if (num_parts_ == 1) return;
  if (num_parts_ == num_hosts) {  // Uneven hosts, too: a part is what a host has.
    part_of_ = hosts_of_slots(config.hosts, slots, num_ranks);
    return;
  }
  check_argument(slots % num_parts_ == 0, "sum_parts {} does not divide {} expert slots",
                 num_parts_, slots);
  if (num_hosts > 1) {
    const auto each = static_cast<unsigned>(num_parts_ / num_hosts);
    check_argument(
        config.hosts.is_in_order() && num_parts_ % num_hosts == 0 && std::has_single_bit(each),
        "sum_parts {} of {}: it must be 1 or {}, or with even hosts in order {} times a "
        "power of two",
        num_parts_, config.hosts.to_string(), num_hosts, num_hosts);
    parts_per_host_ = static_cast<int>(each);
  } else {
    parts_per_host_ = num_parts_;
  }
  for (int slot = 0; slot < slots; ++slot) {
    part_of_[static_cast<std::size_t>(slot)] = slot / (slots / num_parts_);
  }
}

PartSum::PartSum(int num_parts, std::int64_t width)
    : width_(static_cast<std::size_t>(width)),
      values_(static_cast<std::size_t>(num_parts) * width_),
      is_set_(static_cast<std::size_t>(num_parts)) {}

void PartSum::clear() {
  std::ranges::fill(is_set_, std::uint8_t{0});
}

void PartSum::add_row(int part, float weight, const std::uint16_t* row) {
  const auto p = static_cast<std::size_t>(part);
  float* const sum = values(p);
  if (is_set_[p] == 0) std::fill_n(sum, width_, 0.0f);
  is_set_[p] = 1;
  for (std::size_t c = 0; c < width_; ++c) sum[c] += weight * bf16_to_float(row[c]);
}

void PartSum::set(int part, const float* sum) {
  const auto p = static_cast<std::size_t>(part);
  is_set_[p] = 1;
  std::memcpy(values(p), sum, width_ * sizeof(float));
}

const float* PartSum::total() {
  round_.clear();
  for (std::size_t p = 0; p < is_set_.size(); ++p) {
    round_.push_back(is_set_[p] != 0 ? values(p) : nullptr);
  }
  while (round_.size() > 1) {
    std::size_t left = 0;
    for (std::size_t i = 0; i < round_.size(); i += 2) {
      float* const a = round_[i];
      float* const b = i + 1 < round_.size() ? round_[i + 1] : nullptr;
      if (a != nullptr && b != nullptr) {
        for (std::size_t c = 0; c < width_; ++c) a[c] += b[c];
      }
      round_[left++] = a != nullptr ? a : b;
    }
    round_.resize(left);
  }
  return round_.front();
}

void round_sum(const float* total, std::int64_t width, float factor, std::uint16_t* y) {
  const auto n = static_cast<std::size_t>(width);
  if (total == nullptr) {
    // As a sum without terms: factor * 0, whose sign is the factor's.
    std::fill_n(y, n, bf16_from_float(0.0f * factor));
    return;
  }
  for (std::size_t c = 0; c < n; ++c) y[c] = bf16_from_float(total[c] * factor);
}

}  // namespace sluice
