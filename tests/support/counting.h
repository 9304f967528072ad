// counting.h - a backend and a transport that count the bytes taken from them.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <vector>

#include "backend/ops.h"
#include "sluice/engine.h"
#include "sluice/transport.h"
#include "support/forwarding_transport.h"

namespace sluice::testing {

/// Forwards everything and counts what is allocated.
class CountingBackend final : public BackendOps {
 public:
  explicit CountingBackend(const BackendConfig& config) : real_(make_backend(config)) {}
  std::size_t allocated_bytes = 0;
  std::atomic<std::size_t> slots_bytes{0};  ///< Of the packers: host memory of loading.

  [[nodiscard]] Device device() const noexcept override { return real_->device(); }
  [[nodiscard]] std::string description() const override { return real_->description(); }
  [[nodiscard]] Stream stream() override { return real_->stream(); }
  void synchronize(Stream stream) override { real_->synchronize(stream); }
  [[nodiscard]] double measure_read_bandwidth() override { return 1; }
  [[nodiscard]] double measure_arithmetic_rate() override { return 1; }
  [[nodiscard]] std::unique_ptr<DeviceBuffer> allocate(std::size_t bytes) override {
    allocated_bytes += bytes;
    return real_->allocate(bytes);
  }
  void copy_to_host(void* host, const void* device, std::size_t bytes, Stream stream) override {
    real_->copy_to_host(host, device, bytes, stream);
  }
  void copy_from_host(void* device, const void* host, std::size_t bytes, Stream stream) override {
    real_->copy_from_host(device, host, bytes, stream);
  }
  void copy_on_device(void* to, const void* from, std::size_t bytes, Stream stream) override {
    real_->copy_on_device(to, from, bytes, stream);
  }
  [[nodiscard]] std::unique_ptr<StreamOrder> make_stream_order() override {
    return ops(*real_).make_stream_order();
  }
  [[nodiscard]] std::unique_ptr<PreparedExperts> prepare(const ExpertWeights& weights) override {
    return ops(*real_).prepare(weights);
  }
  [[nodiscard]] std::unique_ptr<ExpertBuilder> make_builder(const ExpertWeights& shapes) override {
    return ops(*real_).make_builder(shapes);
  }
  [[nodiscard]] std::unique_ptr<ExpertPacker> make_packer(const PackerSizes& sizes) override {
    auto packer = ops(*real_).make_packer(sizes);
    slots_bytes += packer->host_bytes();
    return packer;
  }
  [[nodiscard]] int num_host_threads() const noexcept override {
    return ops(*real_).num_host_threads();
  }
  void quantize(const std::uint16_t* x, const RowRanges& rows, bool pow2, const Fp8Rows& out,
                Stream stream) override {
    ops(*real_).quantize(x, rows, pow2, out, stream);
  }
  void requantize(const Fp8RowsView& in, const RowRanges& rows, const Fp8Rows& out,
                  Stream stream) override {
    ops(*real_).requantize(in, rows, out, stream);
  }
  void expert_stage(const PreparedExperts& experts, const Fp8RowsView& in, const RowRanges& rows,
                    const Fp8Rows& h, std::uint16_t* out, Stream stream,
                    ExpertStageTimes* times) override {
    ops(*real_).expert_stage(experts, in, rows, h, out, stream, times);
  }
  void expert_stage_home(const PreparedExperts& experts, const Fp8RowsView& in,
                         const RowRanges& rows, const Fp8Rows& h, const HomeRows& home,
                         Stream stream) override {
    ops(*real_).expert_stage_home(experts, in, rows, h, home, stream);
  }
  void gather_tokens(const TokenRows& tokens, const EntryRows& entries, const Fp8Rows& out,
                     Stream stream) override {
    ops(*real_).gather_tokens(tokens, entries, out, stream);
  }
  void sum_entries(const EntrySums& sums, Stream stream) override {
    ops(*real_).sum_entries(sums, stream);
  }

 private:
  std::unique_ptr<Backend> real_;
};

/// Forwards everything and counts the windows made.
class CountingTransport final : public ForwardingTransport {
 public:
  using ForwardingTransport::ForwardingTransport;
  std::size_t window_bytes = 0;

  [[nodiscard]] std::unique_ptr<Window> make_window(std::size_t bytes, int num_flags,
                                                    std::chrono::milliseconds timeout) override {
    window_bytes += bytes;
    return ForwardingTransport::make_window(bytes, num_flags, timeout);
  }
};

/// An engine says that it took what was planned, and that is what was counted.
inline void expect_taken(const Engine& engine, const CountingBackend& backend,
                         const CountingTransport& transport, const LayerGroupMemory& plan) {
  EXPECT_EQ(engine.weight_bytes(), plan.prepared_bytes);
  const LayerGroupMemory memory = engine.memory();
  EXPECT_EQ(memory.prepared_bytes, plan.prepared_bytes);
  EXPECT_EQ(memory.codes_bytes, plan.codes_bytes);
  EXPECT_EQ(memory.scales_bytes, plan.scales_bytes);
  EXPECT_EQ(memory.exchange_bytes, plan.exchange_bytes);
  EXPECT_EQ(memory.scratch_bytes, plan.scratch_bytes);
  EXPECT_EQ(backend.allocated_bytes + transport.window_bytes,
            plan.exchange_bytes + plan.scratch_bytes);
}

}  // namespace sluice::testing
