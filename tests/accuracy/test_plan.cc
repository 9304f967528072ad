// `sluice plan`: the bytes it names are the bytes an engine then takes.
#include <gtest/gtest.h>

#include <unistd.h>

#include <filesystem>
#include <map>
#include <thread>

#include "backend/ops.h"
#include "sluice/engine.h"
#include "sluice/error.h"
#include "sluice/transport.h"

namespace sluice::testing {
namespace {

/// Forwards everything and counts what is allocated.
class CountingBackend final : public BackendOps {
 public:
  CountingBackend() : real_(make_backend({.num_threads = 1})) {}
  std::size_t allocated_bytes = 0;

  [[nodiscard]] Device device() const noexcept override { return real_->device(); }
  [[nodiscard]] std::string description() const override { return real_->description(); }
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
  [[nodiscard]] std::unique_ptr<PreparedExperts> prepare(const ExpertWeights& weights) override {
    return ops(*real_).prepare(weights);
  }
  void quantize(const std::uint16_t* x, const ExpertRows& rows, bool pow2, const QuantizedRows& out,
                Stream stream) override {
    ops(*real_).quantize(x, rows, pow2, out, stream);
  }
  void requantize(const QuantizedRows& in, const ExpertRows& rows, const QuantizedRows& out,
                  Stream stream) override {
    ops(*real_).requantize(in, rows, out, stream);
  }
  void expert_stage(const PreparedExperts& experts, const QuantizedRows& in, const ExpertRows& rows,
                    const QuantizedRows& h, std::uint16_t* out, Stream stream,
                    ExpertStageTimes* times) override {
    ops(*real_).expert_stage(experts, in, rows, h, out, stream, times);
  }

 private:
  std::unique_ptr<Backend> real_;
};

/// Forwards everything and counts the windows made.
class CountingTransport final : public Transport {
 public:
  explicit CountingTransport(Transport& real) : real_(&real) {}
  std::size_t window_bytes = 0;

  [[nodiscard]] int rank() const noexcept override { return real_->rank(); }
  [[nodiscard]] int num_ranks() const noexcept override { return real_->num_ranks(); }
  [[nodiscard]] std::string name() const override { return real_->name(); }
  [[nodiscard]] std::unique_ptr<Window> make_window(std::size_t bytes, int num_flags,
                                                    std::chrono::milliseconds timeout) override {
    window_bytes += bytes;
    return real_->make_window(bytes, num_flags, timeout);
  }
  [[nodiscard]] std::vector<std::vector<std::byte>> all_gather(
      std::span<const std::byte> mine, std::chrono::milliseconds timeout) override {
    return real_->all_gather(mine, timeout);
  }
  [[nodiscard]] TransportCounters counters() const override { return real_->counters(); }

 private:
  Transport* real_;
};

class Plan : public ::testing::Test {
 protected:
  ~Plan() override {
    std::error_code ignored;
    std::filesystem::remove_all(dir_, ignored);
  }
  std::filesystem::path dir_ =
      std::filesystem::temp_directory_path() / ("sluice-plan-" + std::to_string(::getpid()));
};

TEST_F(Plan, IsWhatAnEngineTakes) {
  const ModelGeometry geometry = preset_geometry("tiny");
  for (const DType scale_dtype : {DType::kFloat32, DType::kBFloat16}) {
    std::filesystem::remove_all(dir_);
    write_synthetic_checkpoint({.geometry = geometry, .scale_dtype = scale_dtype}, dir_);
    const Checkpoint checkpoint = Checkpoint::open(dir_);
    const std::optional<RecipeName> direct = RecipeName::kDirect, none;
    const std::optional<RecipeName> bf16 = RecipeName::kBf16Static;
    for (const auto& [low_latency, normal] : {std::pair{direct, none}, std::pair{none, direct},
                                              std::pair{bf16, none}, std::pair{direct, bf16}}) {
      for (const int num_ranks : {1, 2, 4}) {
        const EngineConfig config{.layer = checkpoint.moe_layers().front(),
                                  .low_latency = low_latency,
                                  .normal = normal,
                                  .max_tokens_per_rank = 5};
        const EngineMemory plan = Engine::plan_memory(config, checkpoint.geometry(), scale_dtype,
                                                      Device::Kind::kHost, num_ranks);
        auto transports = make_inproc_transports(num_ranks);
        std::vector<std::thread> ranks;
        for (int r = 0; r < num_ranks; ++r) {
          ranks.emplace_back([&, r] {
            CountingBackend backend;
            CountingTransport transport(*transports[static_cast<std::size_t>(r)]);
            const Engine engine = Engine::create(config, checkpoint, transport, backend);
            EXPECT_EQ(engine.weight_bytes(), plan.prepared_bytes);
            EXPECT_EQ(backend.allocated_bytes + transport.window_bytes,
                      plan.exchange_bytes + plan.scratch_bytes)
                << num_ranks << " ranks";
            const ExpertWeights weights =
                checkpoint.load_experts(config.layer, 0, geometry.num_experts / num_ranks);
            EXPECT_EQ(weights.bytes(), plan.codes_bytes + plan.scales_bytes);
          });
        }
        for (std::thread& rank : ranks) rank.join();
      }
    }
  }
}

TEST_F(Plan, GrowsWithTokensAndRefusesNonsense) {
  const ModelGeometry geometry = preset_geometry("r1-layer");
  const auto total = [&](int tokens, int ranks) {
    EngineConfig config;
    config.normal.reset();
    config.max_tokens_per_rank = tokens;
    return Engine::plan_memory(config, geometry, DType::kBFloat16, Device::Kind::kHost, ranks)
        .total_bytes();
  };
  EXPECT_LT(total(1, 8), total(2, 8));
  EXPECT_LT(total(2, 8), total(128, 8));
  // 32 local experts of 22.0 MB codes and 0.69 MB scales (docs/design.md).
  EXPECT_NEAR(static_cast<double>(total(1, 8)), 727e6, 10e6);
  EXPECT_THROW((void)total(1, 7), Error);
  EXPECT_THROW((void)total(0, 8), Error);
}

}  // namespace
}  // namespace sluice::testing
