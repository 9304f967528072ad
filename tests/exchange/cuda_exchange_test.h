// cuda_exchange_test.h - the fixture of tests of the exchange in CUDA memory.
#pragma once

#include <gmock/gmock.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "exchange/cuda_ranks.h"
#include "support/modes_and_wires.h"

namespace sluice::testing {

// Read by the CUDA runtime before its first call; see docs/exchange.md.
inline const bool kEnvironment = [] {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  return true;
}();

class CudaExchangeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    try {
      // The table of tokens lies on the device of the process's rank.
      const int rank = ranks_are_processes() ? control_transport()->rank() : 0;
      backend_ = make_backend(
          {.device = {Device::Kind::kCuda, rank % std::max(1, num_devices(Device::Kind::kCuda))}});
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kUnsupported) throw;
      std::printf("skipped: %s\n", error.what());
      GTEST_SKIP() << "no CUDA device on this machine";
    }
  }

  static ExchangeConfig config_for(const Rounds& rounds, Mode mode,
                                   WireFormat wire = WireFormat::kE4m3Group) {
    return {.mode = mode,
            .wire = wire,
            .num_experts = rounds.num_experts,
            .num_topk = rounds.num_topk,
            .hidden = rounds.hidden,
            .max_tokens_per_rank = static_cast<int>(rounds.max_tokens()),
            .routed_scaling_factor = 2.5f,
            .peer_timeout = std::chrono::milliseconds(20'000)};
  }

  /// body(rank) on a thread per rank, each with an exchange of this configuration.
  template <class Body>
  void run(const Rounds& rounds, const ExchangeConfig& config, const Body& body) {
    const TokenTable table(rounds, config.wire, rounds.s1, *backend_);
    run_ranks(rounds.num_ranks(), [&](Transport& transport) {
      CudaRank rank(rounds, table, config, transport);
      body(rank);
    });
  }

  void expect_exact(const Rounds& rounds, const ExchangeConfig& config, int num_rounds) {
    run(rounds, config, [&](CudaRank& rank) {
      for (int i = 0; i < num_rounds; ++i) {
        ASSERT_NO_FATAL_FAILURE(rank.round_trip(make_round(rounds, i), i % 4 != 3))
            << "round " << i;
      }
    });
  }

  void expect_exact_everywhere(const Rounds& rounds, int num_rounds = 3) {
    for (const Mode mode : kModes) {
      for (const WireFormat wire : kWires) {
        SCOPED_TRACE(::testing::Message() << to_string(mode) << ", " << to_string(wire));
        expect_exact(rounds, config_for(rounds, mode, wire), num_rounds);
        if (HasFatalFailure()) return;
      }
    }
  }

  std::unique_ptr<Backend> backend_;
};

}  // namespace sluice::testing
