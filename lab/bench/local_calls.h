// local_calls.h - the local call with the rows of a bench case: what routing, gathering and summing
// add to the expert stage.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sluice/backend.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/workload.h"
#include "sluice/local_experts.h"

namespace sluice {

/// Layers with copies of the same weights, and one batch of tokens on the device.
class LocalCalls {
 public:
  /// Room for `max_rows` rows, num_topk of a token.
  LocalCalls(Backend& backend, const ModelGeometry& geometry, std::int64_t max_rows,
             std::uint64_t seed);

  /// `num_copies` layers of these experts; the recipe is `direct`.
  void use(const ExpertWeights& weights, std::size_t num_copies);
  /// As many tokens as have these rows: entry k of token t is the row k * num_tokens + t, in order
  /// of experts. Entries that are left over are -1. Every weight is 1 / num_topk.
  void arrange(const std::vector<std::int32_t>& num_rows);
  /// Layer `copy` on the tokens, on the backend's stream.
  void forward(std::size_t copy);

  /// Compares the first and the last token with float64: the largest |error| / bound.
  /// Throws: kInternal naming token and element.
  [[nodiscard]] double check(const LayerReference& reference);
  /// Microseconds of this thread for one call: the mean of a few that are queued together. What
  /// they queue is waited for.
  [[nodiscard]] double host_us();

  [[nodiscard]] std::int64_t num_tokens() const noexcept { return num_tokens_; }

 private:
  Backend& backend_;
  Stream stream_;
  int num_topk_, hidden_;
  std::int64_t max_tokens_, num_tokens_ = 0;
  Workload load_;  // Its tokens repeat.
  std::vector<std::int32_t> idx_;
  std::unique_ptr<DeviceBuffer> x_, y_, topk_idx_, topk_weights_;
  LocalGroup group_;
  std::vector<LocalExperts> layers_;
};

}  // namespace sluice
