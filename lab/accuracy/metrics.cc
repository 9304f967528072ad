#include "accuracy/metrics.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/fail.h"

namespace sluice::accuracy {

double ErrorSums::Pair::ratio() const {
  if (error == 0) return 0;
  return reference == 0 ? std::numeric_limits<double>::infinity() : std::sqrt(error / reference);
}

ErrorSums::ErrorSums(std::span<const double> reference, std::span<const double> actual,
                     std::int64_t width) {
  SLUICE_ASSERT(reference.size() == actual.size() && width > 0);
  const auto w = static_cast<std::size_t>(width);
  tokens_.resize(reference.size() / w);
  channels_.resize(w);
  for (std::size_t i = 0; i < reference.size(); ++i) {
    const double d = actual[i] - reference[i];
    const double error = d * d, square = reference[i] * reference[i];
    for (Pair* pair : {&tokens_[i / w], &channels_[i % w], &all_}) {
      pair->error += error;
      pair->reference += square;
    }
  }
}

double ErrorSums::relative_l2() const {
  return all_.ratio();
}

double ErrorSums::error_norm() const {
  return std::sqrt(all_.error);
}

double ErrorSums::reference_norm() const {
  return std::sqrt(all_.reference);
}

std::vector<double> ErrorSums::token_errors() const {
  std::vector<double> errors;
  for (const Pair& pair : tokens_) errors.push_back(pair.ratio());
  return errors;
}

std::vector<double> ErrorSums::channel_errors() const {
  std::vector<double> errors;
  for (const Pair& pair : channels_) errors.push_back(pair.ratio());
  return errors;
}

ErrorNumbers ErrorSums::numbers() const {
  const std::vector<double> tokens = token_errors();
  ErrorNumbers numbers{.relative_l2 = all_.ratio(),
                       .sqnr_db = -20 * std::log10(all_.ratio()),
                       .p99_token_error = percentile(tokens, 0.99),
                       .p99_channel_error = percentile(channel_errors(), 0.99)};
  const auto worst = std::ranges::max_element(tokens);
  if (worst != tokens.end()) {
    numbers.worst_token = worst - tokens.begin();
    numbers.worst_token_error = *worst;
  }
  return numbers;
}

double percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::ranges::sort(values);
  const auto rank = std::ceil(share * static_cast<double>(values.size()));
  return values[static_cast<std::size_t>(std::max(1.0, rank)) - 1];
}

}  // namespace sluice::accuracy
