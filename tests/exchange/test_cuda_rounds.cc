// Hundreds and thousands of rounds of the exchange in CUDA memory, with fresh counts and routing
// each, every element compared. Ranks are streams of this process or, with `--transport ipc
// --processes N`, processes. Skips itself where there is no device.
//
// CMakeLists.txt also builds this with a fault planted in the kernels, which it must notice.
#include <algorithm>

#include "exchange/cuda_exchange_test.h"

namespace sluice::testing {
namespace {

// Fresh counts and fresh routing each time, at the sizes that matter; every element, every time.
class CudaExchangeRepeatTest : public CudaExchangeTest,
                               public ::testing::WithParamInterface<int> {};

TEST_P(CudaExchangeRepeatTest, AThousandRounds) {
  const int tokens = GetParam();
  for (const Mode mode : kModes) {
    const Rounds rounds{.num_tokens = std::vector<std::int64_t>(8, tokens),
                        .num_experts = 64,
                        .num_topk = 8,
                        .hidden = 256,
                        .seed = static_cast<std::uint64_t>(tokens),
                        .fresh_counts = true};
    expect_exact(rounds, config_for(rounds, mode), 1000);
  }
}
INSTANTIATE_TEST_SUITE_P(Tokens, CudaExchangeRepeatTest, ::testing::Values(1, 17, 128, 1024));

// As many ranks as may be processes, too: on one GPU those take turns of milliseconds.
class CudaExchangeFewRanksTest : public CudaExchangeTest,
                                 public ::testing::WithParamInterface<int> {};

TEST_P(CudaExchangeFewRanksTest, FiveHundredRoundsInEachMode) {
  const auto num_ranks = static_cast<std::size_t>(GetParam());
  for (const Mode mode : kModes) {
    const Rounds rounds{.num_tokens = std::vector<std::int64_t>(num_ranks, 64),
                        .num_experts = 36,
                        .num_topk = 8,
                        .hidden = 1024,
                        .seed = 21,
                        .fresh_counts = true};
    expect_exact(rounds, config_for(rounds, mode), 500);
  }
}

TEST_P(CudaExchangeFewRanksTest, EveryFormatOnTheWire) {
  const auto num_ranks = static_cast<std::size_t>(GetParam());
  expect_exact_everywhere({.num_tokens = std::vector<std::int64_t>(num_ranks, 37),
                           .num_experts = 12,
                           .num_topk = 4,
                           .hidden = 384},
                          8);
}
INSTANTIATE_TEST_SUITE_P(Ranks, CudaExchangeFewRanksTest, ::testing::Values(2, 3, 4));

// One rank for each process or device, at the width of DeepSeek-R1: what is deployed. A rank's last
// token may be another's first, so one with few waits for one with many.
class CudaExchangeDeviceRanksTest : public CudaExchangeTest,
                                    public ::testing::WithParamInterface<int> {};

TEST_P(CudaExchangeDeviceRanksTest, AThousandRounds) {
  const int num_ranks = ranks_are_processes() ? control_transport()->num_ranks()
                                              : std::max(2, num_devices(Device::Kind::kCuda));
  const int tokens = GetParam();
  for (const Mode mode : kModes) {
    SCOPED_TRACE(::testing::Message() << to_string(mode) << ", " << num_ranks << " ranks");
    const Rounds rounds{
        .num_tokens = std::vector<std::int64_t>(static_cast<std::size_t>(num_ranks), tokens),
        .num_experts = 256 / num_ranks * num_ranks,
        .num_topk = 8,
        .hidden = 7168,
        .seed = static_cast<std::uint64_t>(tokens) + 100,
        .fresh_counts = true};
    ExchangeConfig config = config_for(rounds, mode);
    config.peer_timeout = std::chrono::milliseconds(8'000);  // Of those whose peer saw a fault.
    expect_exact(rounds, config, 1000);
    if (HasFatalFailure()) return;
  }
}
INSTANTIATE_TEST_SUITE_P(Tokens, CudaExchangeDeviceRanksTest, ::testing::Values(1, 17, 128, 1024));

}  // namespace
}  // namespace sluice::testing
