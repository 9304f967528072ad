#include "exchange/staged_tokens.h"

#include <cmath>
#include <cstring>

#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

/// int32 copies of the router's choice; `config.num_experts` is the limit.
std::vector<std::int32_t> checked_indices(const ExchangeConfig& config,
                                          const TensorView& topk_idx) {
  std::vector<std::int32_t> idx(static_cast<std::size_t>(topk_idx.shape.num_elements()));
  for (std::size_t i = 0; i < idx.size(); ++i) {
    const std::int64_t value = topk_idx.dtype == DType::kInt64 ? topk_idx.as<std::int64_t>()[i]
                                                               : topk_idx.as<std::int32_t>()[i];
    check_argument(value >= -1 && value < config.num_experts,
                   "topk_idx[{}, {}] = {} is not in [-1, {})",
                   i / static_cast<std::size_t>(config.num_topk),
                   i % static_cast<std::size_t>(config.num_topk), value, config.num_experts);
    idx[i] = static_cast<std::int32_t>(value);
  }
  return idx;
}

}  // namespace

StagedTokens::StagedTokens(const ExchangeConfig& config, BackendOps& backend)
    : wire_(config.wire),
      hidden_(config.hidden),
      max_tokens_(static_cast<std::size_t>(config.max_tokens_per_rank)),
      payload_bytes_(wire_payload_bytes(config.wire, config.hidden)),
      scale_bytes_(wire_scale_bytes(config.wire, config.hidden)),
      backend_(backend),
      memory_(backend.allocate(planned_bytes(config))) {}

std::size_t StagedTokens::planned_bytes(const ExchangeConfig& config) {
  return static_cast<std::size_t>(config.max_tokens_per_rank) *
         wire_bytes_per_token(config.wire, config.hidden);
}

std::uint64_t StagedTokens::stage(TensorView x, float static_scale, Stream stream) {
  const auto num_tokens = static_cast<std::int32_t>(x.dim(0));
  if (num_tokens == 0) return 0;
  if (wire_ == WireFormat::kBf16) {
    std::memcpy(memory_->data(), x.data, x.bytes());
    return 0;
  }
  const auto max_tokens = static_cast<std::int64_t>(max_tokens_);
  const RowRanges rows{.num_experts = 1,
                       .count = &num_tokens,
                       .max_rows = max_tokens,
                       .max_rows_per_expert = max_tokens,
                       .expected_m = num_tokens};
  const bool is_static = wire_ == WireFormat::kE4m3Static;
  std::byte* const scales = memory_->data() + max_tokens_ * payload_bytes_;
  const Fp8Rows out{.codes = reinterpret_cast<std::uint8_t*>(memory_->data()),
                    .scale = is_static ? nullptr : reinterpret_cast<float*>(scales),
                    .static_scale = static_scale,
                    .width = hidden_,
                    .scale_per_row = wire_ == WireFormat::kE4m3Token};
  backend_.quantize(x.as<std::uint16_t>(), rows, wire_ == WireFormat::kE4m3Pow2, out, stream);
  if (!is_static) return 0;
  std::uint64_t saturated = 0;
  const float inverse = 1.0f / static_scale;
  for (std::int64_t i = 0; i < x.shape.num_elements(); ++i) {
    saturated += std::fabs(bf16_to_float(x.as<std::uint16_t>()[i]) * inverse) > kE4m3Max;
  }
  return saturated;
}

std::span<const std::byte> StagedTokens::payload(std::int64_t token) const {
  return {memory_->data() + static_cast<std::size_t>(token) * payload_bytes_, payload_bytes_};
}

std::span<const std::byte> StagedTokens::scales(std::int64_t token) const {
  return {memory_->data() + max_tokens_ * payload_bytes_ +
              static_cast<std::size_t>(token) * scale_bytes_,
          scale_bytes_};
}

std::vector<std::int32_t> slots_of_entries(const ExchangeConfig& config, const Routing& routing,
                                           int rank) {
  std::vector<std::int32_t> idx = checked_indices(config, routing.topk_idx);
  if (routing.slots == nullptr) return idx;
  const auto topk = static_cast<std::size_t>(config.num_topk);
  for (std::size_t i = 0; i < idx.size(); ++i) {
    if (idx[i] < 0) continue;
    idx[i] = routing.slots->placement().slot_of_row(idx[i], rank, static_cast<int>(i / topk),
                                                    static_cast<int>(i % topk));
  }
  return idx;
}

int expected_rows_per_slot(const ExchangeConfig& config, std::int64_t num_tokens, int num_ranks) {
  const std::int64_t rows = num_tokens * config.num_topk * num_ranks;
  const std::int64_t slots = config.total_slots();
  return static_cast<int>((rows + slots - 1) / slots);
}

}  // namespace sluice
