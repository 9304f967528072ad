// cuda_ranks.h - ranks as streams of this process, or one of them of each process. Each has
// everything it needs allocated before any of them starts: an allocation may wait for the device,
// and so for a rank that waits.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "exchange/exchange_check.h"
#include "exchange/exchange_model.h"
#include "exchange/rounds.h"
#include "exchange/token_table.h"
#include "multirank/run_ranks.h"
#include "sluice/backend.h"
#include "sluice/transport.h"

namespace sluice::testing {

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
    found_ = backend_->allocate(2 * sizeof(Mismatches));  // Of the batch, of the sums.
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

  /// Notes what `round` must deliver here. Before its dispatch.
  void expect(const Round& round) {
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
    std::vector<ExpectedRow> expected;
    want_rows_.clear(), want_begin_.clear();
    std::int64_t begin = 0;
    for (std::size_t e = 0; e < num_local; ++e) {
      if (exchange_->config().mode == Mode::kLowLatency) {
        begin = static_cast<std::int64_t>(e) * exchange_->config().max_m;
      }
      want_rows_.push_back(static_cast<std::int32_t>(tokens[e].size()));
      want_begin_.push_back(begin);
      for (const std::int32_t token : tokens[e]) {
        expected.push_back(
            {static_cast<std::int32_t>(begin++), token, static_cast<std::int32_t>(e)});
      }
    }
    num_expected_ = static_cast<int>(expected.size());
    backend_->copy_from_host(expected_->data(), expected.data(),
                             expected.size() * sizeof(ExpectedRow), stream());
    ASSERT_EQ(cudaMemsetAsync(found_->data(), 0, 2 * sizeof(Mismatches),
                              static_cast<cudaStream_t>(stream().handle)),
              cudaSuccess);
  }

  /// Queues the comparison of the batch with what expect() noted, and lets the experts write.
  void queue_batch_check(const Dispatched& d, MutableTensorView expert_y) {
    const ExpertBatch& batch = d.batch();
    num_rows_ = batch.num_rows.data, row_begin_ = batch.row_begin.data;
    launch_check_batch({.expected = as<ExpectedRow>(expected_),
                        .num_expected = num_expected_,
                        .table = as<std::uint8_t>(table_.payload_memory),
                        .table_scale = as<float>(table_.scale_memory),
                        .x = batch.x.as<std::uint8_t>(),
                        .x_scale = batch.x_scale.as<float>(),
                        .payload_bytes = static_cast<int>(table_.payload_bytes),
                        .num_groups = table_.num_groups,
                        .hidden = rounds_.hidden,
                        .first_expert = rank_ * exchange_->num_local_experts(),
                        .expert_y = expert_y.as<std::uint16_t>(),
                        .found = as<Mismatches>(found_)},
                       stream().handle);
  }

  void queue_sum_check() {
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
                      .found = as<Mismatches>(found_) + 1,
                      .num_parts = exchange_->config().total_parts(),
                      .experts_per_part = rounds_.num_experts / exchange_->config().total_parts()},
                     stream().handle);
  }

  /// Compares the batch with what `round` must deliver here and lets the experts write.
  void check_batch(const Round& round, const Dispatched& d, MutableTensorView expert_y) {
    expect(round);
    queue_batch_check(d, expert_y);
    ASSERT_NO_FATAL_FAILURE(expect_counts());
    expect_none_found();
  }

  void check_sum() {
    ASSERT_EQ(cudaMemsetAsync(found_->data(), 0, 2 * sizeof(Mismatches),
                              static_cast<cudaStream_t>(stream().handle)),
              cudaSuccess);
    queue_sum_check();
    expect_none_found();
  }

  /// One dispatch and combine, every element checked. The host waits for nothing before the end:
  /// each check is queued right behind what it checks, so that data which comes later than the flag
  /// that announces it is seen to be missing.
  void round_trip(const Round& round, bool in_place = true) {
    load(round);
    ASSERT_NO_FATAL_FAILURE(expect(round));
    const bool is_static = exchange_->config().wire == WireFormat::kE4m3Static;
    Dispatched d = exchange_->dispatch(x(), routing(), stream(), is_static ? rounds_.s1 : 0.0f);
    const MutableTensorView rows = in_place ? d.expert_y() : own_expert_y(d);
    queue_batch_check(d, rows);
    exchange_->combine(std::move(d), rows, y(), stream());
    queue_sum_check();
    ASSERT_NO_FATAL_FAILURE(expect_counts());
    expect_none_found();
  }

 private:
  void expect_counts() {
    std::vector<std::int32_t> num_rows(want_rows_.size());
    std::vector<std::int64_t> row_begin(want_rows_.size());
    backend_->copy_to_host(num_rows.data(), num_rows_, num_rows.size() * 4, stream());
    backend_->copy_to_host(row_begin.data(), row_begin_, row_begin.size() * 8, stream());
    for (std::size_t e = 0; e < num_rows.size(); ++e) {
      ASSERT_EQ(num_rows[e], want_rows_[e]) << "rank " << rank_ << " expert " << e;
      ASSERT_EQ(row_begin[e], want_begin_[e]) << "rank " << rank_ << " expert " << e;
    }
  }
  void expect_none_found() {
    Mismatches found[2] = {};
    backend_->copy_to_host(found, found_->data(), sizeof(found), stream());
    exchange_->check();
    for (const int i : {0, 1}) {
      ASSERT_EQ(found[i].rows, 0) << "rank " << rank_ << ": " << found[i].elements
                                  << " elements differ; first: " << (i ? "token" : "received row")
                                  << " " << found[i].first_row << ", element "
                                  << found[i].first_element;
    }
  }

  const Rounds& rounds_;
  const TokenTable& table_;
  Transport& transport_;
  int rank_;
  std::int64_t num_tokens_ = 0;
  std::vector<std::int32_t> want_rows_;   // [num_local_experts] of expect()
  std::vector<std::int64_t> want_begin_;  // [num_local_experts]
  int num_expected_ = 0;
  const void *num_rows_ = nullptr, *row_begin_ = nullptr;  // The last batch's.
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<DeviceBuffer> x_, y_, idx_, weights_, expected_, found_, own_expert_y_;
  std::unique_ptr<Exchange> exchange_;
};

}  // namespace sluice::testing
