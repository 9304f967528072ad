// The exchange for GPUs of several hosts over NCCL itself: every element of hundreds of rounds,
// graphs, and ranks that are lost. Processes of one machine are taken for hosts:
//
//   NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo test_cuda_hosts --transport nccl --processes 4 --hosts 2
#include <gmock/gmock.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "exchange/cuda_exchange_test.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// SLUICE_TEST_ROUNDS of each kind; 500 unless it is set.
int num_rounds() {
  const char* const text = std::getenv("SLUICE_TEST_ROUNDS");
  return text != nullptr ? std::atoi(text) : 500;
}

class CudaHostsTest : public CudaExchangeTest {
 protected:
  void SetUp() override {
    if (process_transport() != "nccl") GTEST_SKIP() << "for --transport nccl";
    CudaExchangeTest::SetUp();
    num_ranks_ = control_transport()->num_ranks();
    run_ranks(num_ranks_, [&](Transport& transport) { hosts_ = transport.hosts(); });
    ASSERT_GT(hosts_.num_hosts(), 1);
  }
  [[nodiscard]] Rounds rounds_of(int tokens, int num_topk, int hidden, std::uint64_t seed) const {
    return {.num_tokens = std::vector<std::int64_t>(static_cast<std::size_t>(num_ranks_), tokens),
            .num_experts = 32,
            .num_topk = num_topk,
            .hidden = hidden,
            .seed = seed,
            .fresh_counts = true};
  }
  [[nodiscard]] ExchangeConfig over_hosts(const Rounds& rounds, Mode mode, int parts = 0,
                                          WireFormat wire = WireFormat::kE4m3Group) const {
    ExchangeConfig config = config_for(rounds, mode, wire);
    config.hosts = hosts_;
    config.sum_parts = parts;
    return config;
  }

  int num_ranks_ = 0;
  Hosts hosts_;
};

TEST_F(CudaHostsTest, EveryFormatOnTheWire) {
  const Rounds rounds = rounds_of(37, 4, 384, 5);
  for (const Mode mode : kModes) {
    for (const WireFormat wire : kWires) {
      SCOPED_TRACE(::testing::Message() << to_string(mode) << ", " << to_string(wire));
      expect_exact(rounds, over_hosts(rounds, mode, 0, wire), 4);
      if (HasFailure()) return;
    }
  }
}

TEST_F(CudaHostsTest, SumsOfAnyNumberOfParts) {
  const Rounds rounds = rounds_of(20, 8, 256, 6);
  for (const Mode mode : kModes) {
    for (const int parts : {1, 2, 4, 8}) {
      if (parts != 1 && parts % hosts_.num_hosts() != 0) continue;
      SCOPED_TRACE(::testing::Message() << to_string(mode) << ", parts " << parts);
      expect_exact(rounds, over_hosts(rounds, mode, parts), 4);
      if (HasFailure()) return;
    }
  }
}

TEST_F(CudaHostsTest, HundredsOfRounds) {
  const Rounds rounds = rounds_of(64, 8, 1024, 7);
  for (const Mode mode : kModes) {
    const auto begin = std::chrono::steady_clock::now();
    expect_exact(rounds, over_hosts(rounds, mode), num_rounds());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    if (control_transport()->rank() == 0) {
      std::printf("%s: %d rounds in %.1f s\n", to_string(mode), num_rounds(), took.count());
      std::fflush(stdout);
    }
    if (HasFailure()) return;
  }
}

TEST_F(CudaHostsTest, AtTheSizeOfALayer) {
  Rounds rounds = rounds_of(128, 8, 7168, 8);
  rounds.fresh_counts = false;
  rounds.num_experts = 256;
  for (const Mode mode : kModes) {
    expect_exact(rounds, over_hosts(rounds, mode), 8);
    if (HasFailure()) return;
  }
}

// For reports: what the halves take on the device at the size of a layer, checked first.
TEST_F(CudaHostsTest, TimesOfTheHalves) {
  Rounds rounds = rounds_of(128, 8, 7168, 12);
  rounds.fresh_counts = false;
  rounds.num_experts = 256;
  for (const Mode mode : kModes) {
    run(rounds, over_hosts(rounds, mode), [&](CudaRank& rank) {
      const Round round = make_round(rounds, 0);
      ASSERT_NO_FATAL_FAILURE(rank.round_trip(round));
      Exchange& exchange = rank.exchange();
      const auto queue = static_cast<cudaStream_t>(rank.stream().handle);
      constexpr int kTimes = 21, kMarks = 5;
      cudaEvent_t marks[kMarks];
      for (auto& mark : marks) ASSERT_EQ(cudaEventCreate(&mark), cudaSuccess);
      std::vector<std::vector<float>> times(kMarks - 1);
      for (int i = 0; i < kTimes; ++i) {
        rank.barrier();
        int next = 0;
        const auto mark = [&] { ASSERT_EQ(cudaEventRecord(marks[next++], queue), cudaSuccess); };
        mark();
        Dispatched d = exchange.dispatch_send(rank.x(), rank.routing(), rank.stream());
        mark();
        exchange.dispatch_receive(d, rank.stream());
        mark();
        exchange.combine_send(d, d.expert_y(), rank.stream());
        mark();
        exchange.combine_receive(std::move(d), rank.y(), rank.stream());
        mark();
        rank.backend().synchronize(rank.stream());
        for (std::size_t m = 0; m < times.size(); ++m) {
          float ms = 0;
          ASSERT_EQ(cudaEventElapsedTime(&ms, marks[m], marks[m + 1]), cudaSuccess);
          times[m].push_back(1e3f * ms);
        }
      }
      exchange.check();
      for (auto& t : times) std::nth_element(t.begin(), t.begin() + kTimes / 2, t.end());
      if (rank.rank() == 0) {
        std::printf(
            "%s, 128 tokens of 7168, top-8 of 256: send %.0f, receive %.0f, give %.0f, "
            "home %.0f us\n",
            to_string(mode), times[0][kTimes / 2], times[1][kTimes / 2], times[2][kTimes / 2],
            times[3][kTimes / 2]);
        std::fflush(stdout);
      }
      for (auto& mark : marks) ASSERT_EQ(cudaEventDestroy(mark), cudaSuccess);
    });
  }
}

TEST_F(CudaHostsTest, CapturedGraphsReplay) {
  const Rounds rounds = rounds_of(40, 4, 512, 9);
  run(rounds, over_hosts(rounds, Mode::kLowLatency), [&](CudaRank& rank) {
    const auto queue = static_cast<cudaStream_t>(rank.stream().handle);
    Exchange& exchange = rank.exchange();
    Rounds sized = rounds;
    sized.fresh_counts = false;
    const auto round_of = [&](int g, int i) {
      sized.num_tokens = rounds.num_tokens;
      for (auto& n : sized.num_tokens) n = (n + g) / (g + 1);
      return make_round(sized, i);
    };
    constexpr int kGraphs = 2;
    cudaGraphExec_t graphs[kGraphs] = {};
    for (int g = 0; g < kGraphs; ++g) {
      rank.load(round_of(g, 0));
      cudaGraph_t graph = nullptr;
      ASSERT_EQ(cudaStreamBeginCapture(queue, cudaStreamCaptureModeThreadLocal), cudaSuccess);
      Dispatched d = exchange.dispatch(rank.x(), rank.routing(), rank.stream());
      const MutableTensorView rows = d.expert_y();
      exchange.combine(std::move(d), rows, rank.y(), rank.stream());
      ASSERT_EQ(cudaStreamEndCapture(queue, &graph), cudaSuccess);
      ASSERT_EQ(cudaGraphInstantiate(&graphs[g], graph, 0), cudaSuccess);
      ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    }
    rank.barrier();
    for (int i = 0; i < 20; ++i) {
      const int g = i % kGraphs;
      const Round round = round_of(g, i);
      rank.load(round);
      Dispatched d = exchange.dispatch(rank.x(), rank.routing(), rank.stream());
      const MutableTensorView rows = d.expert_y();
      ASSERT_NO_FATAL_FAILURE(rank.check_batch(round, d, rows));
      exchange.combine(std::move(d), rows, rank.y(), rank.stream());
      ASSERT_NO_FATAL_FAILURE(rank.check_sum());
      // Its rows stay in the slot for the replay, which must give the same y.
      launch_poison(rank.y().data, rank.y().bytes(), rank.stream().handle);
      ASSERT_EQ(cudaGraphLaunch(graphs[g], queue), cudaSuccess);
      ASSERT_NO_FATAL_FAILURE(rank.check_sum()) << "replay " << i;
    }
    rank.barrier();
    constexpr int kTimes = 50;
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kTimes; ++i) ASSERT_EQ(cudaGraphLaunch(graphs[0], queue), cudaSuccess);
    rank.backend().synchronize(rank.stream());
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    exchange.check();
    if (rank.rank() == 0) {
      std::printf("low-latency dispatch and combine in a graph: %.1f us\n", took.count() / kTimes);
      std::fflush(stdout);
    }
    rank.barrier();
    for (auto& exec : graphs) ASSERT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  });
}

TEST_F(CudaHostsTest, NormalModeRefusesToBeCaptured) {
  const Rounds rounds = rounds_of(4, 2, 128, 10);
  run(rounds, over_hosts(rounds, Mode::kNormal), [&](CudaRank& rank) {
    const auto queue = static_cast<cudaStream_t>(rank.stream().handle);
    rank.load(make_round(rounds, 0));
    cudaGraph_t graph = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(queue, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    try {
      (void)rank.exchange().dispatch(rank.x(), rank.routing(), rank.stream());
      ADD_FAILURE() << "captured";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
      EXPECT_THAT(error.what(), HasSubstr("cannot be captured"));
    }
    ASSERT_EQ(cudaStreamEndCapture(queue, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    ASSERT_NO_FATAL_FAILURE(rank.round_trip(make_round(rounds, 1)));
  });
}

// A rank that does not come: every other one names it and its host within the timeout and 2 s, its
// stream ends, and a new group works.
TEST_F(CudaHostsTest, AMissingRankIsNamedAndANewGroupWorks) {
  Rounds rounds = rounds_of(9, 2, 256, 11);
  rounds.fresh_counts = false;  // In normal mode a rank without tokens has nothing to wait for.
  const int lost = num_ranks_ - 1;
  for (const Mode mode : kModes) {
    for (const bool before_combine : {false, true}) {
      SCOPED_TRACE(::testing::Message() << to_string(mode) << " " << before_combine);
      const auto ipc = make_process_transport("ipc", 0, kProcessTimeout);
      constexpr auto kTimeout = 4s;
      {
        const auto transport = make_nccl_over(*ipc, kTimeout);
        const TokenTable table(rounds, WireFormat::kE4m3Group, rounds.s1, *backend_);
        ExchangeConfig config = over_hosts(rounds, mode);
        config.peer_timeout = kTimeout;
        CudaRank rank(rounds, table, config, *transport);
        ASSERT_NO_FATAL_FAILURE(rank.round_trip(make_round(rounds, 0)));
        rank.load(make_round(rounds, 1));
        (void)ipc->all_gather({}, kProcessTimeout);
        const auto begin = std::chrono::steady_clock::now();
        try {
          std::optional<Dispatched> d;
          if (rank.rank() != lost || before_combine) {
            d = rank.exchange().dispatch(rank.x(), rank.routing(), rank.stream());
          }
          if (rank.rank() == lost) {
            rank.backend().synchronize(rank.stream());
            std::this_thread::sleep_for(kTimeout + 2s);
          } else {
            const MutableTensorView rows = d->expert_y();
            rank.exchange().combine(std::move(*d), rows, rank.y(), rank.stream());
            rank.backend().synchronize(rank.stream());
            rank.exchange().check();
            ADD_FAILURE() << "rank " << rank.rank() << " did not notice";
          }
        } catch (const Error& error) {
          EXPECT_THAT(error.ranks(), ElementsAre(lost)) << error.what();
          EXPECT_THAT(error.what(), HasSubstr("of host virtual-host-")) << error.what();
        }
        if (rank.rank() != lost) {
          EXPECT_LT(std::chrono::steady_clock::now() - begin, kTimeout + 2s);
        }
        (void)ipc->all_gather({}, kProcessTimeout);
      }
      expect_exact(rounds, over_hosts(rounds, mode), 2);
    }
  }
}

}  // namespace
}  // namespace sluice::testing
