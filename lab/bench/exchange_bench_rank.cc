#include "bench/exchange_bench_rank.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "core/fail.h"
#include "exchange/slot_ranks.h"
#include "sluice/lab/median.h"
#include "sluice/lab/parallel.h"
#include "sluice/quant.h"

namespace sluice {

BenchRank::BenchRank(const Traffic& traffic, Transport& transport, BackendOps& backend)
    : traffic_(traffic), transport_(transport), backend_(backend), rank_(transport.rank()) {
  const auto r = static_cast<std::size_t>(rank_);
  const std::size_t hidden = static_cast<std::size_t>(traffic.config.hidden);
  const std::size_t elements = static_cast<std::size_t>(traffic.tokens) * hidden;
  x_ = upload(&traffic.x[r * elements], elements * 2);
  idx_ = upload(&traffic.topk_idx[r * traffic.slots_of_rank()], traffic.slots_of_rank() * 4);
  weights_ = upload(&traffic.weights[r * traffic.slots_of_rank()], traffic.slots_of_rank() * 4);
  y_ = backend.allocate(std::max<std::size_t>(1, elements * 2));
  exchange_ = std::make_unique<Exchange>(
      Exchange::create(traffic.config, transport, static_cast<Backend&>(backend)));
  const std::size_t rows = static_cast<std::size_t>(exchange_->max_rows());
  if (backend.device().kind == Device::Kind::kHost) rows_ = backend.allocate(rows * hidden * 2);
  barrier();
}

Dispatched BenchRank::dispatch() {
  const Device device = backend_.device();
  const auto& c = traffic_.config;
  const Shape slots{traffic_.tokens, c.num_topk};
  return exchange_->dispatch(
      {x_->data(), DType::kBFloat16, Shape{traffic_.tokens, c.hidden}, device},
      {.topk_idx = {idx_->data(), DType::kInt32, slots, device},
       .topk_weights = {weights_->data(), DType::kFloat32, slots, device}},
      backend_.stream(), traffic_.static_scale);
}

void BenchRank::combine(Dispatched d) {
  const MutableTensorView rows = rows_of(d);
  MutableTensorView y;
  y.data = y_->data(), y.dtype = DType::kBFloat16, y.device = backend_.device();
  y.shape = Shape{traffic_.tokens, traffic_.config.hidden};
  exchange_->combine(std::move(d), rows, y, backend_.stream());
}

std::int64_t BenchRank::check() {
  Dispatched d = dispatch();
  std::int64_t checked = check_rows(d);
  combine(std::move(d));
  checked += check_sums();
  exchange_->check();
  return checked;
}

std::unique_ptr<Recording> BenchRank::record(int pairs, bool mark_operations) {
  const auto work = [this, pairs, mark_operations](const std::function<void()>& mark) {
    for (int i = -1; i < pairs; ++i) {
      Dispatched d = dispatch();
      if (i >= 0 && mark_operations) mark();
      combine(std::move(d));
      if (i < 0 || mark_operations) mark();
    }
    if (!mark_operations) mark();
  };
  const Stream stream = backend_.stream();
  auto recording =
      can_be_captured() ? backend_.record(stream, work) : backend_.repeat(stream, work);
  barrier();
  return recording;
}

BenchRank::CallTimes BenchRank::time_calls(int pairs) {
  using Clock = std::chrono::steady_clock;
  const auto us = [](Clock::duration d) {
    return std::chrono::duration<double, std::micro>(d).count();
  };
  std::vector<double> dispatches, combines;
  barrier();
  for (int i = 0; i < pairs; ++i) {
    const auto begin = Clock::now();
    Dispatched d = dispatch();
    const auto middle = Clock::now();
    combine(std::move(d));
    const auto end = Clock::now();
    dispatches.push_back(us(middle - begin)), combines.push_back(us(end - middle));
  }
  backend_.synchronize(backend_.stream());
  return {median(dispatches), median(combines)};
}

std::unique_ptr<DeviceBuffer> BenchRank::upload(const void* host, std::size_t bytes) {
  auto buffer = backend_.allocate(std::max<std::size_t>(1, bytes));
  backend_.copy_from_host(buffer->data(), host, bytes, backend_.stream());
  return buffer;
}

MutableTensorView BenchRank::rows_of(const Dispatched& d) const {
  MutableTensorView rows = d.expert_y();
  if (!rows.empty()) return rows;
  rows.data = rows_->data(), rows.dtype = DType::kBFloat16;
  rows.shape = d.batch().x.shape, rows.device = backend_.device();
  return rows;
}

std::int64_t BenchRank::check_rows(const Dispatched& d) {
  const ExpertBatch& batch = d.batch();
  const Stream stream = backend_.stream();
  const ExpertPlacement placement(traffic_.config.num_experts, transport_.num_ranks());
  const auto num_local = static_cast<std::size_t>(placement.num_local());
  const auto hidden = static_cast<std::size_t>(traffic_.config.hidden);
  const auto topk = static_cast<std::size_t>(traffic_.config.num_topk);
  std::vector<std::vector<std::size_t>> tokens(num_local);  // Of each expert, in order.
  for (std::size_t i = 0; i < traffic_.topk_idx.size(); ++i) {
    const std::int32_t e = traffic_.topk_idx[i];
    if (e < 0 || placement.rank_of(e) != rank_) continue;
    tokens[static_cast<std::size_t>(placement.local_of(e))].push_back(i / topk);
  }
  std::vector<std::int32_t> num_rows(num_local);
  std::vector<std::int64_t> row_begin(num_local);
  backend_.copy_to_host(num_rows.data(), batch.num_rows.data, num_local * 4, stream);
  backend_.copy_to_host(row_begin.data(), batch.row_begin.data, num_local * 8, stream);
  const std::size_t payload = traffic_.payload_bytes, scales = traffic_.row_bytes - payload;
  const MutableTensorView out = rows_of(d);
  std::vector<std::byte> have_payload, have_scales;
  std::vector<std::uint16_t> y;
  std::int64_t checked = 0;
  for (std::size_t e = 0; e < num_local; ++e) {
    const std::size_t n = tokens[e].size();
    if (num_rows[e] != static_cast<std::int32_t>(n)) {
      fail(ErrorCode::kInternal, "rank {}: expert {} received {} rows, expected {}", rank_, e,
           num_rows[e], n);
    }
    if (n == 0) continue;
    const auto begin = static_cast<std::size_t>(row_begin[e]);
    have_payload.resize(n * payload), have_scales.resize(n * scales), y.resize(n * hidden);
    backend_.copy_to_host(have_payload.data(), batch.x.as<std::byte>() + begin * payload,
                          have_payload.size(), stream);
    if (scales > 0) {
      backend_.copy_to_host(have_scales.data(), batch.x_scale.as<std::byte>() + begin * scales,
                            have_scales.size(), stream);
    }
    const std::int32_t expert = placement.expert_of(rank_, static_cast<int>(e));
    for_pieces_in_parallel(n, kTokensAtATime, [&](std::size_t first, std::size_t end) {
      for (std::size_t i = first; i < end; ++i) {
        const std::byte* const want = &traffic_.wire[tokens[e][i] * traffic_.row_bytes];
        if (std::memcmp(&have_payload[i * payload], want, payload) != 0 ||
            (scales > 0 && std::memcmp(&have_scales[i * scales], want + payload, scales) != 0)) {
          fail(ErrorCode::kInternal, "rank {}: row {} of expert {} is not token {}", rank_, i, e,
               tokens[e][i]);
        }
        for (std::size_t c = 0; c < hidden; ++c) {
          y[i * hidden + c] = bf16_from_float(expert_value(expert, tokens[e][i], c));
        }
      }
    });
    backend_.copy_from_host(out.as<std::uint16_t>() + begin * hidden, y.data(), y.size() * 2,
                            stream);
    checked += static_cast<std::int64_t>(n * hidden);
  }
  return checked;
}

namespace {

/// Adds neighbours in rounds; leaves out what has no entry (docs/exchange.md#the-order-of-the-sum).
float sum_of_parts(std::vector<std::optional<float>>& parts) {
  while (parts.size() > 1) {
    std::size_t left = 0;
    for (std::size_t i = 0; i < parts.size(); i += 2) {
      const std::optional<float> a = parts[i];
      const std::optional<float> b = i + 1 < parts.size() ? parts[i + 1] : std::nullopt;
      parts[left++] = a && b ? std::optional(*a + *b) : a ? a : b;
    }
    parts.resize(left);
  }
  return parts.front().value_or(0.0f);
}

}  // namespace

std::int64_t BenchRank::check_sums() {
  const auto hidden = static_cast<std::size_t>(traffic_.config.hidden);
  const auto tokens = static_cast<std::size_t>(traffic_.tokens);
  std::vector<std::uint16_t> y(tokens * hidden);
  backend_.copy_to_host(y.data(), y_->data(), y.size() * 2, backend_.stream());
  for_pieces_in_parallel(tokens, kTokensAtATime, [&](std::size_t first, std::size_t end) {
    for (std::size_t t = first; t < end; ++t) check_sums_of(t, &y[t * hidden]);
  });
  return static_cast<std::int64_t>(y.size());
}

void BenchRank::check_sums_of(std::size_t t, const std::uint16_t* y) const {
  const ExchangeConfig& config = exchange_->config();
  const bool is_by_host = config.total_parts() == config.hosts.num_hosts();
  const int experts_per_part = config.num_experts / config.total_parts();
  const auto part_of = [&](std::int32_t expert) {
    return static_cast<std::size_t>(
        is_by_host ? config.hosts.host_of(expert / exchange_->num_local_experts())
                   : expert / experts_per_part);
  };
  const auto topk = static_cast<std::size_t>(traffic_.config.num_topk);
  const std::size_t token =
      static_cast<std::size_t>(rank_) * static_cast<std::size_t>(traffic_.tokens) + t;
  const std::int32_t* const idx = &traffic_.topk_idx[token * topk];
  const float* const weight = &traffic_.weights[token * topk];
  std::vector<std::optional<float>> parts;
  for (std::size_t c = 0; c < static_cast<std::size_t>(config.hidden); ++c) {
    parts.assign(static_cast<std::size_t>(config.total_parts()), std::nullopt);
    for (std::size_t k = 0; k < topk; ++k) {
      if (idx[k] < 0) continue;
      const float product =
          weight[k] * bf16_to_float(bf16_from_float(expert_value(idx[k], token, c)));
      std::optional<float>& part = parts[part_of(idx[k])];
      part = part.value_or(0.0f) + product;
    }
    const std::uint16_t want = bf16_from_float(sum_of_parts(parts) * config.routed_scaling_factor);
    if (y[c] != want) {
      fail(ErrorCode::kInternal, "rank {}: token {} element {} is {}, expected {}", rank_, t, c,
           bf16_to_float(y[c]), bf16_to_float(want));
    }
  }
}

}  // namespace sluice
