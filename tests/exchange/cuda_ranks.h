// cuda_ranks.h - ranks as streams of one process on one GPU, each with everything it needs
// allocated before any of them starts: an allocation may wait for the device, and so for a rank
// that waits.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "exchange/exchange_check.h"
#include "exchange/exchange_model.h"
#include "multirank/run_ranks.h"
#include "sluice/backend.h"
#include "sluice/transport.h"

namespace sluice::testing {

/// Tokens of all ranks; the routing of a round is drawn from (seed, round).
struct Rounds {
  std::vector<std::int64_t> num_tokens;  // [rank], of each round, unless fresh_counts
  int num_experts = 8, num_topk = 2, hidden = 128;
  std::uint64_t seed = 1;
  bool fresh_counts = false;  // Draw each round's counts from [0, num_tokens[rank]].
  int empty_in = 8;           // One slot in so many is empty.
  float s1 = 0.01f;           // Of the static wire.
  [[nodiscard]] int num_ranks() const { return static_cast<int>(num_tokens.size()); }
  [[nodiscard]] std::int64_t max_tokens() const {
    std::int64_t most = 1;
    for (const std::int64_t n : num_tokens) most = std::max(most, n);
    return most;
  }
  [[nodiscard]] std::int64_t first_token(int rank) const { return rank * max_tokens(); }
};

/// One round's routing of every rank.
struct Round {
  std::vector<std::int64_t> num_tokens;
  std::vector<std::vector<std::int32_t>> topk_idx;
  std::vector<std::vector<float>> weights;
};

inline Round make_round(const Rounds& rounds, int index) {
  Round round;
  for (int r = 0; r < rounds.num_ranks(); ++r) {
    const CounterRng rng(rounds.seed * 1'000'003 + static_cast<std::uint64_t>(index),
                         static_cast<std::uint64_t>(r));
    std::int64_t n = rounds.num_tokens[static_cast<std::size_t>(r)];
    if (rounds.fresh_counts)
      n = static_cast<std::int64_t>(rng.bits(~0ull) % static_cast<std::uint64_t>(n + 1));
    round.num_tokens.push_back(n);
    auto& idx = round.topk_idx.emplace_back(static_cast<std::size_t>(n * rounds.num_topk));
    auto& weights = round.weights.emplace_back(idx.size());
    const auto experts = static_cast<std::uint64_t>(rounds.num_experts);
    for (std::size_t i = 0; i < idx.size(); ++i) {
      const auto t = i / static_cast<std::size_t>(rounds.num_topk);
      const auto k = i % static_cast<std::size_t>(rounds.num_topk);
      // Distinct experts of one token: a random start and an odd, random step modulo 2^m would need
      // a power of two; steps of 1 or -1 do for any number.
      const std::uint64_t draw = rng.bits(3 * t), word = rng.bits(3 * i + 1);
      const std::uint64_t step = draw >> 40 & 1 ? 1 : experts - 1;
      const bool empty = k >= experts || (rounds.empty_in > 0 &&
                                          word % static_cast<std::uint64_t>(rounds.empty_in) == 0);
      idx[i] = empty ? -1 : static_cast<std::int32_t>((draw % experts + step * k) % experts);
      weights[i] = static_cast<float>(word >> 40) * 0x1p-24f;
    }
  }
  return round;
}

/// Wire bytes of every token, by the scalar definitions, in device memory.
struct TokenTable {
  TokenTable(const Rounds& rounds, WireFormat wire, float static_scale, Backend& backend) {
    const auto tokens = static_cast<std::size_t>(rounds.max_tokens() * rounds.num_ranks());
    const auto hidden = static_cast<std::size_t>(rounds.hidden);
    payload_bytes = wire == WireFormat::kBf16 ? 2 * hidden : hidden;
    const std::size_t scale_bytes = wire_bytes_per_token(wire, rounds.hidden) - payload_bytes;
    x.resize(tokens * hidden);
    std::vector<std::byte> payload(tokens * payload_bytes), scale(tokens * scale_bytes);
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t c = 0; c < hidden; ++c) {
        // Four normals of different size per group suffice to tell tokens and channels apart.
        const std::uint64_t bits = mix64(rounds.seed ^ (t * hidden + c) * 0x9e3779b97f4a7c15u);
        const float v = (static_cast<float>(bits >> 40) * 0x1p-23f - 1.0f) *
                        static_cast<float>(1 << (bits & 3));
        x[t * hidden + c] = bf16_from_float(v);
      }
      const auto bytes = wire_bytes(&x[t * hidden], rounds.hidden, wire, static_scale);
      std::memcpy(&payload[t * payload_bytes], bytes.data(), payload_bytes);
      if (scale_bytes > 0) {
        std::memcpy(&scale[t * scale_bytes], &bytes[payload_bytes], scale_bytes);
      }
    }
    num_groups = static_cast<int>(scale_bytes / sizeof(float));
    payload_memory = backend.allocate(std::max<std::size_t>(1, payload.size()));
    scale_memory = backend.allocate(std::max<std::size_t>(1, scale.size()));
    backend.copy_from_host(payload_memory->data(), payload.data(), payload.size(),
                           backend.stream());
    backend.copy_from_host(scale_memory->data(), scale.data(), scale.size(), backend.stream());
  }
  std::vector<std::uint16_t> x;  // [tokens of all ranks, hidden] bf16
  std::size_t payload_bytes = 0;
  int num_groups = 0;
  std::unique_ptr<DeviceBuffer> payload_memory, scale_memory;
};

template <class T>
T* as(const std::unique_ptr<DeviceBuffer>& buffer) {
  return reinterpret_cast<T*>(buffer->data());
}

/// One rank: its exchange, its tensors, and checks that never allocate.
class CudaRank {
 public:
  CudaRank(const Rounds& rounds, const TokenTable& table, const ExchangeConfig& config,
           Transport& transport)
      : rounds_(rounds), table_(table), transport_(transport), rank_(transport.rank()) {
    backend_ = make_backend(place_rank(Device::Kind::kCuda, rank_, rounds.num_ranks()));
    const auto tokens = static_cast<std::size_t>(rounds.max_tokens());
    const auto slots = tokens * static_cast<std::size_t>(rounds.num_topk);
    const auto hidden = static_cast<std::size_t>(rounds.hidden);
    x_ = backend_->allocate(tokens * hidden * 2);
    y_ = backend_->allocate(tokens * hidden * 2);
    idx_ = backend_->allocate(slots * sizeof(std::int32_t));
    weights_ = backend_->allocate(slots * sizeof(float));
    expected_ = backend_->allocate(slots * static_cast<std::size_t>(rounds.num_ranks()) *
                                   sizeof(ExpectedRow));
    found_ = backend_->allocate(sizeof(Mismatches));
    const auto* const mine = &table.x[static_cast<std::size_t>(rounds.first_token(rank_)) * hidden];
    backend_->copy_from_host(x_->data(), mine, tokens * hidden * 2, stream());
    exchange_ = std::make_unique<Exchange>(Exchange::create(config, transport, *backend_));
    own_expert_y_ =
        backend_->allocate(static_cast<std::size_t>(exchange_->max_rows()) * hidden * 2);
    barrier();
  }
  /// Nobody frees memory while another rank still works. A rank that failed does not come.
  ~CudaRank() {
    try {
      barrier();
    } catch (const Error&) {
    }
  }
  CudaRank(const CudaRank&) = delete;
  CudaRank& operator=(const CudaRank&) = delete;

  [[nodiscard]] Exchange& exchange() { return *exchange_; }
  [[nodiscard]] Stream stream() { return backend_->stream(); }
  [[nodiscard]] Backend& backend() { return *backend_; }
  [[nodiscard]] Transport& transport() { return transport_; }
  [[nodiscard]] int rank() const { return rank_; }
  void barrier() { (void)transport_.all_gather({}, std::chrono::milliseconds(60'000)); }

  void load(const Round& round) {
    const auto r = static_cast<std::size_t>(rank_);
    num_tokens_ = round.num_tokens[r];
    backend_->copy_from_host(idx_->data(), round.topk_idx[r].data(), round.topk_idx[r].size() * 4,
                             stream());
    backend_->copy_from_host(weights_->data(), round.weights[r].data(), round.weights[r].size() * 4,
                             stream());
    launch_poison(y_->data(), static_cast<std::size_t>(num_tokens_ * rounds_.hidden) * 2,
                  stream().handle);
  }
  [[nodiscard]] TensorView x() const {
    return {x_->data(), DType::kBFloat16, Shape{num_tokens_, rounds_.hidden}, backend_->device()};
  }
  [[nodiscard]] Routing routing() const {
    const Shape shape{num_tokens_, rounds_.num_topk};
    return {.topk_idx = {idx_->data(), DType::kInt32, shape, backend_->device()},
            .topk_weights = {weights_->data(), DType::kFloat32, shape, backend_->device()}};
  }
  [[nodiscard]] MutableTensorView y() const {
    MutableTensorView view;
    view.data = y_->data(), view.dtype = DType::kBFloat16, view.device = backend_->device();
    view.shape = Shape{num_tokens_, rounds_.hidden};
    return view;
  }
  /// Memory of the caller, shaped like the batch.
  [[nodiscard]] MutableTensorView own_expert_y(const Dispatched& d) const {
    MutableTensorView view = d.expert_y();
    view.data = own_expert_y_->data();
    return view;
  }

  /// Compares the batch with what `round` must deliver here and lets the experts write.
  void check_batch(const Round& round, const Dispatched& d, MutableTensorView expert_y) {
    const ExpertBatch& batch = d.batch();
    const auto num_local = static_cast<std::size_t>(exchange_->num_local_experts());
    std::vector<std::vector<std::int32_t>> tokens(num_local);
    for (int r = 0; r < rounds_.num_ranks(); ++r) {
      const auto& idx = round.topk_idx[static_cast<std::size_t>(r)];
      for (std::size_t i = 0; i < idx.size(); ++i) {
        if (idx[i] < 0 ||
            static_cast<std::size_t>(idx[i]) / num_local != static_cast<std::size_t>(rank_))
          continue;
        tokens[static_cast<std::size_t>(idx[i]) % num_local].push_back(static_cast<std::int32_t>(
            rounds_.first_token(r) + static_cast<std::int64_t>(i) / rounds_.num_topk));
      }
    }
    std::vector<std::int32_t> num_rows(num_local);
    std::vector<std::int64_t> row_begin(num_local);
    backend_->copy_to_host(num_rows.data(), batch.num_rows.data, num_local * 4, stream());
    backend_->copy_to_host(row_begin.data(), batch.row_begin.data, num_local * 8, stream());
    std::vector<ExpectedRow> expected;
    std::int64_t begin = 0;
    for (std::size_t e = 0; e < num_local; ++e) {
      if (batch.layout == Mode::kLowLatency) begin = static_cast<std::int64_t>(e) * batch.x.dim(1);
      ASSERT_EQ(num_rows[e], static_cast<int>(tokens[e].size()))
          << "rank " << rank_ << " expert " << e;
      ASSERT_EQ(row_begin[e], begin) << "rank " << rank_ << " expert " << e;
      for (const std::int32_t token : tokens[e]) {
        expected.push_back(
            {static_cast<std::int32_t>(begin++), token, static_cast<std::int32_t>(e)});
      }
    }
    backend_->copy_from_host(expected_->data(), expected.data(),
                             expected.size() * sizeof(ExpectedRow), stream());
    clear_found();
    launch_check_batch({.expected = as<ExpectedRow>(expected_),
                        .num_expected = static_cast<int>(expected.size()),
                        .table = as<std::uint8_t>(table_.payload_memory),
                        .table_scale = as<float>(table_.scale_memory),
                        .x = batch.x.as<std::uint8_t>(),
                        .x_scale = batch.x_scale.as<float>(),
                        .payload_bytes = static_cast<int>(table_.payload_bytes),
                        .num_groups = table_.num_groups,
                        .hidden = rounds_.hidden,
                        .first_expert = rank_ * static_cast<int>(num_local),
                        .expert_y = expert_y.as<std::uint16_t>(),
                        .found = as<Mismatches>(found_)},
                       stream().handle);
    expect_none("received row");
  }

  void check_sum() {
    clear_found();
    launch_check_sum({.table = as<std::uint8_t>(table_.payload_memory),
                      .topk_idx = as<std::int32_t>(idx_),
                      .weights = as<float>(weights_),
                      .y = as<std::uint16_t>(y_),
                      .num_tokens = static_cast<int>(num_tokens_),
                      .num_topk = rounds_.num_topk,
                      .hidden = rounds_.hidden,
                      .payload_bytes = static_cast<int>(table_.payload_bytes),
                      .first_token = static_cast<int>(rounds_.first_token(rank_)),
                      .factor = exchange_->config().routed_scaling_factor,
                      .found = as<Mismatches>(found_)},
                     stream().handle);
    expect_none("token");
  }

  /// One dispatch and combine, every element checked.
  void round_trip(const Round& round, bool in_place = true) {
    load(round);
    const bool is_static = exchange_->config().wire == WireFormat::kE4m3Static;
    Dispatched d = exchange_->dispatch(x(), routing(), stream(), is_static ? rounds_.s1 : 0.0f);
    const MutableTensorView rows = in_place ? d.expert_y() : own_expert_y(d);
    ASSERT_NO_FATAL_FAILURE(check_batch(round, d, rows));
    exchange_->combine(std::move(d), rows, y(), stream());
    ASSERT_NO_FATAL_FAILURE(check_sum());
  }

 private:
  void clear_found() {
    ASSERT_EQ(cudaMemsetAsync(found_->data(), 0, sizeof(Mismatches),
                              static_cast<cudaStream_t>(stream().handle)),
              cudaSuccess);
  }
  void expect_none(const char* what) {
    Mismatches found{};
    backend_->copy_to_host(&found, found_->data(), sizeof(found), stream());
    exchange_->check();
    ASSERT_EQ(found.rows, 0) << "rank " << rank_ << ": " << found.elements
                             << " elements differ; first: " << what << " " << found.first_row
                             << ", element " << found.first_element;
  }

  const Rounds& rounds_;
  const TokenTable& table_;
  Transport& transport_;
  int rank_;
  std::int64_t num_tokens_ = 0;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<DeviceBuffer> x_, y_, idx_, weights_, expected_, found_, own_expert_y_;
  std::unique_ptr<Exchange> exchange_;
};

}  // namespace sluice::testing
