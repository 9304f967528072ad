// Dispatch and combine on one GPU, ranks as streams of one process or, with `--transport ipc
// --processes 4`, as processes: every row, every element, every ugly case. Skips itself where there
// is no device.
#include <gmock/gmock.h>

#include <chrono>

#include "exchange/cuda_exchange_test.h"

namespace sluice::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST_F(CudaExchangeTest, AnyNumberOfRanks) {
  for (const int num_ranks : {1, 2, 3, 4, 8, 16}) {
    SCOPED_TRACE(num_ranks);
    Rounds rounds{.num_tokens = std::vector<std::int64_t>(static_cast<std::size_t>(num_ranks), 5),
                  .num_experts = 48,
                  .num_topk = 4,
                  .hidden = 256,
                  .seed = 11};
    rounds.num_tokens.back() = 3;
    expect_exact_everywhere(rounds);
  }
}

// All the device code, without ranks that wait for each other: what compute-sanitizer, which lets
// only one kernel run at a time, can look at.
TEST_F(CudaExchangeTest, OneRank) {
  expect_exact_everywhere({.num_tokens = {37}, .num_experts = 12, .num_topk = 4, .hidden = 384});
  expect_exact_everywhere({.num_tokens = {300}, .num_experts = 64, .num_topk = 8, .hidden = 128});
}

TEST_F(CudaExchangeTest, AnyNumberOfSlotsAndAnyWidth) {
  for (const int num_topk : {1, 2, 8, 16, 32}) {
    for (const int hidden : {128, 3584, 7168, 8192}) {
      SCOPED_TRACE(::testing::Message() << "k " << num_topk << ", hidden " << hidden);
      const Rounds rounds{.num_tokens = {17, 1, 40},
                          .num_experts = 36,
                          .num_topk = num_topk,
                          .hidden = hidden,
                          .seed = 3};
      for (const Mode mode : kModes) expect_exact(rounds, config_for(rounds, mode), 4);
      expect_exact(rounds, config_for(rounds, Mode::kLowLatency, WireFormat::kBf16), 2);
    }
  }
}

TEST_F(CudaExchangeTest, NoTokensOnSomeRankOrAnywhere) {
  expect_exact_everywhere({.num_tokens = {0, 4, 0}, .num_experts = 6});
  expect_exact_everywhere({.num_tokens = {0, 0}, .num_experts = 6});
  expect_exact_everywhere({.num_tokens = {1, 0, 0, 0}, .num_experts = 8});
}

TEST_F(CudaExchangeTest, AllSlotsEmpty) {
  expect_exact_everywhere({.num_tokens = {3, 2}, .num_experts = 4, .empty_in = 1});
}

TEST_F(CudaExchangeTest, ManyExpertsAndFew) {
  expect_exact_everywhere(
      {.num_tokens = {33, 64}, .num_experts = 2048, .num_topk = 8, .hidden = 128});
  expect_exact_everywhere({.num_tokens = {33, 64}, .num_experts = 2, .num_topk = 2, .hidden = 512});
}

TEST_F(CudaExchangeTest, TwoInFlightInEitherOrder) {
  const Rounds rounds{.num_tokens = {9, 14, 3}, .num_experts = 12, .num_topk = 4, .seed = 5};
  for (const Mode mode : kModes) {
    run(rounds, config_for(rounds, mode), [&](CudaRank& rank) {
      Exchange& exchange = rank.exchange();
      const Round round = make_round(rounds, 0);
      for (int i = 0; i < 20; ++i) {
        rank.load(round);
        Dispatched first = exchange.dispatch(rank.x(), rank.routing(), rank.stream());
        Dispatched second = exchange.dispatch(rank.x(), rank.routing(), rank.stream());
        EXPECT_THROW((void)exchange.dispatch(rank.x(), rank.routing(), rank.stream()), Error);
        ASSERT_NO_FATAL_FAILURE(rank.check_batch(round, first, first.expert_y()));
        ASSERT_NO_FATAL_FAILURE(rank.check_batch(round, second, second.expert_y()));
        if (i % 2) std::swap(first, second);
        for (Dispatched* d : {&first, &second}) {
          const MutableTensorView rows = d->expert_y();
          exchange.combine(std::move(*d), rows, rank.y(), rank.stream());
          ASSERT_NO_FATAL_FAILURE(rank.check_sum());
        }
      }
    });
  }
}

TEST_F(CudaExchangeTest, SendFirstReceiveLater) {
  const Rounds rounds{.num_tokens = {9, 14, 3}, .num_experts = 12, .num_topk = 4, .seed = 6};
  for (const Mode mode : kModes) {
    run(rounds, config_for(rounds, mode), [&](CudaRank& rank) {
      Exchange& exchange = rank.exchange();
      for (int i = 0; i < 30; ++i) {
        const Round round = make_round(rounds, i);
        rank.load(round);
        Dispatched d = exchange.dispatch_send(rank.x(), rank.routing(), rank.stream());
        EXPECT_THROW(exchange.combine_send(d, d.expert_y(), rank.stream()), Error);
        exchange.dispatch_receive(d, rank.stream());
        const MutableTensorView rows = i % 2 ? d.expert_y() : rank.own_expert_y(d);
        ASSERT_NO_FATAL_FAILURE(rank.check_batch(round, d, rows));
        exchange.combine_send(d, rows, rank.stream());
        EXPECT_THROW(exchange.combine_send(d, rows, rank.stream()), Error);
        exchange.combine_receive(std::move(d), rank.y(), rank.stream());
        ASSERT_NO_FATAL_FAILURE(rank.check_sum());
      }
    });
  }
}

TEST_F(CudaExchangeTest, ADispatchedMayBeDroppedByAllButNotBySome) {
  const Rounds rounds{.num_tokens = {9, 14, 3}, .num_experts = 12, .num_topk = 4, .seed = 7};
  for (const Mode mode : kModes) {
    ExchangeConfig config = config_for(rounds, mode);
    run(rounds, config, [&](CudaRank& rank) {
      for (int i = 0; i < 7; ++i) {
        rank.load(make_round(rounds, i));
        (void)rank.exchange().dispatch(rank.x(), rank.routing(), rank.stream());
        ASSERT_NO_FATAL_FAILURE(rank.round_trip(make_round(rounds, i)));
      }
      rank.load(make_round(rounds, 0));
      Dispatched d = rank.exchange().dispatch(rank.x(), rank.routing(), rank.stream());
      if (rank.rank() == 1) {
        { const Dispatched dropped = std::move(d); }
        rank.backend().synchronize(rank.stream());
        return;
      }
      const MutableTensorView rows = d.expert_y();
      rank.exchange().combine(std::move(d), rows, rank.y(), rank.stream());
      rank.backend().synchronize(rank.stream());
      try {
        rank.exchange().check();
        ADD_FAILURE() << "rank " << rank.rank() << " did not notice";
      } catch (const Error& error) {
        EXPECT_THAT(error.what(), HasSubstr("dropped"));
        EXPECT_THAT(error.what(), HasSubstr("rank(s) 1"));
      }
    });
  }
}

// Graphs with different counts share one exchange and are replayed in turn, between eager calls.
TEST_F(CudaExchangeTest, CapturedGraphsReplayInterleaved) {
  const Rounds rounds{
      .num_tokens = {40, 17, 64, 1}, .num_experts = 16, .num_topk = 4, .hidden = 512};
  for (const Mode mode : kModes) {
    run(rounds, config_for(rounds, mode), [&](CudaRank& rank) {
      const auto queue = static_cast<cudaStream_t>(rank.stream().handle);
      Exchange& exchange = rank.exchange();
      constexpr int kGraphs = 3;
      std::vector<cudaGraphExec_t> graphs(kGraphs);
      Rounds sized = rounds;
      const auto round_of = [&](int g, int i) {
        sized.num_tokens = rounds.num_tokens;
        for (auto& n : sized.num_tokens) n = (n + g) / (g + 1);
        sized.seed = rounds.seed;
        return make_round(sized, i);
      };
      // A graph of a whole round needs the experts inside: here they copy bytes that are there.
      const auto forward = [&] {
        Dispatched d = exchange.dispatch(rank.x(), rank.routing(), rank.stream());
        const MutableTensorView rows = d.expert_y();
        exchange.combine(std::move(d), rows, rank.y(), rank.stream());
      };
      for (int g = 0; g < kGraphs; ++g) {
        rank.load(round_of(g, 0));
        cudaGraph_t graph;
        ASSERT_EQ(cudaStreamBeginCapture(queue, cudaStreamCaptureModeThreadLocal), cudaSuccess);
        forward();
        ASSERT_EQ(cudaStreamEndCapture(queue, &graph), cudaSuccess);
        ASSERT_EQ(cudaGraphInstantiate(&graphs[g], graph, 0), cudaSuccess);
        ASSERT_EQ(cudaGraphUpload(graphs[g], queue), cudaSuccess);
        ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
      }
      rank.barrier();
      for (int i = 0; i < 30; ++i) {
        const int g = (i * 7) % kGraphs;
        const Round round = round_of(g, i);
        rank.load(round);
        // Eager, checked; its expert rows stay in the slot for the replay, which must give the
        // same y from the same routing.
        Dispatched d = exchange.dispatch(rank.x(), rank.routing(), rank.stream());
        const MutableTensorView rows = d.expert_y();
        ASSERT_NO_FATAL_FAILURE(rank.check_batch(round, d, rows));
        exchange.combine(std::move(d), rows, rank.y(), rank.stream());
        ASSERT_NO_FATAL_FAILURE(rank.check_sum());
        launch_poison(rank.y().data, rank.y().bytes(), rank.stream().handle);
        ASSERT_EQ(cudaGraphLaunch(graphs[g], queue), cudaSuccess);
        ASSERT_NO_FATAL_FAILURE(rank.check_sum()) << "replay " << i;
      }
      rank.barrier();
      for (auto exec : graphs) ASSERT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
    });
  }
}

TEST_F(CudaExchangeTest, ASlotMayMoveToAnotherStream) {
  const Rounds rounds{.num_tokens = {40, 64}, .num_experts = 16, .num_topk = 4, .hidden = 7168};
  ExchangeConfig config = config_for(rounds, Mode::kLowLatency);
  config.num_in_flight = 1;
  run(rounds, config, [&](CudaRank& rank) {
    cudaStream_t other;
    ASSERT_EQ(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), cudaSuccess);
    rank.barrier();
    const Round round = make_round(rounds, 0);
    rank.load(round);
    rank.backend().synchronize(rank.stream());
    for (int i = 0; i < 50; ++i) {
      const Stream stream = i % 2 ? Stream{other} : rank.stream();
      Dispatched d = rank.exchange().dispatch(rank.x(), rank.routing(), stream);
      const MutableTensorView rows = d.expert_y();
      if (i == 0) {
        ASSERT_NO_FATAL_FAILURE(rank.check_batch(round, d, rows));
      }
      rank.exchange().combine(std::move(d), rows, rank.y(), stream);
    }
    rank.backend().synchronize({other});
    ASSERT_NO_FATAL_FAILURE(rank.check_sum());
    rank.barrier();
    ASSERT_EQ(cudaStreamDestroy(other), cudaSuccess);
  });
}

TEST_F(CudaExchangeTest, CapacityMetIsFineAndExceededByOneIsRefusedEverywhere) {
  Rounds rounds{.num_tokens = {5, 4}, .num_experts = 4, .num_topk = 1, .seed = 8, .empty_in = 0};
  ExchangeConfig config = config_for(rounds, Mode::kLowLatency);
  for (const int max_m : {9, 8}) {
    config.max_m = max_m;
    run(rounds, config, [&](CudaRank& rank) {
      Round full = make_round(rounds, 0);
      for (auto& idx : full.topk_idx) std::fill(idx.begin(), idx.end(), 2);
      for (int i = 0; i < 3; ++i) {
        if (max_m == 9) {
          ASSERT_NO_FATAL_FAILURE(rank.round_trip(full));
          continue;
        }
        rank.load(full);
        Dispatched d = rank.exchange().dispatch(rank.x(), rank.routing(), rank.stream());
        const MutableTensorView rows = d.expert_y();
        rank.exchange().combine(std::move(d), rows, rank.y(), rank.stream());
        std::vector<std::uint16_t> y(static_cast<std::size_t>(rank.y().shape.num_elements()));
        rank.backend().copy_to_host(y.data(), rank.y().data, y.size() * 2, rank.stream());
        EXPECT_EQ(std::count(y.begin(), y.end(), 0x7fc0), static_cast<std::ptrdiff_t>(y.size()));
        try {
          rank.exchange().check();
          ADD_FAILURE() << "rank " << rank.rank() << " was not told";
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
          EXPECT_THAT(error.what(), HasSubstr("expert 2 9 rows, max_m is 8"));
        }
        Round light = make_round(rounds, i);
        for (auto& idx : light.topk_idx) std::fill(idx.begin(), idx.end(), -1);
        ASSERT_NO_FATAL_FAILURE(rank.round_trip(light));  // The exchange still works.
      }
    });
  }
}

TEST_F(CudaExchangeTest, AnIndexOutOfRangeIsNamed) {
  const Rounds rounds{.num_tokens = {5, 4}, .num_experts = 4, .num_topk = 2, .seed = 8};
  run(rounds, config_for(rounds, Mode::kLowLatency), [&](CudaRank& rank) {
    Round bad = make_round(rounds, 0);
    bad.topk_idx[1][5] = 4;
    rank.load(bad);
    Dispatched d = rank.exchange().dispatch(rank.x(), rank.routing(), rank.stream());
    const MutableTensorView rows = d.expert_y();
    rank.exchange().combine(std::move(d), rows, rank.y(), rank.stream());
    rank.backend().synchronize(rank.stream());
    if (rank.rank() == 1) {
      try {
        rank.exchange().check();
        ADD_FAILURE() << "not told";
      } catch (const Error& error) {
        EXPECT_THAT(error.what(), HasSubstr("topk_idx[2, 1] = 4, not in [-1, 4)"));
      }
    } else {
      EXPECT_NO_THROW(rank.exchange().check());
    }
    ASSERT_NO_FATAL_FAILURE(rank.round_trip(make_round(rounds, 1)));
  });
}

// A rank that never comes: the others name it within the timeout, and the device works on.
TEST_F(CudaExchangeTest, AMissingRankIsNamedAndANewExchangeWorks) {
  const Rounds rounds{.num_tokens = {5, 4, 3}, .num_experts = 6, .num_topk = 2, .seed = 9};
  for (const Mode mode : kModes) {
    for (const bool before_combine : {false, true}) {
      SCOPED_TRACE(::testing::Message() << to_string(mode) << " " << before_combine);
      ExchangeConfig config = config_for(rounds, mode);
      config.peer_timeout = std::chrono::milliseconds(500);
      run(rounds, config, [&](CudaRank& rank) {
        const Round round = make_round(rounds, 0);
        ASSERT_NO_FATAL_FAILURE(rank.round_trip(round));
        rank.load(round);
        if (rank.rank() == 1 && !before_combine) return;
        Dispatched d = rank.exchange().dispatch(rank.x(), rank.routing(), rank.stream());
        if (rank.rank() == 1) {
          rank.backend().synchronize(rank.stream());
          rank.barrier();  // Alive, but late for ever.
          { const Dispatched late = std::move(d); }
          return;
        }
        const auto begin = std::chrono::steady_clock::now();
        const MutableTensorView rows = d.expert_y();
        try {
          rank.exchange().combine(std::move(d), rows, rank.y(), rank.stream());
          rank.backend().synchronize(rank.stream());
          rank.exchange().check();
          ADD_FAILURE() << "rank " << rank.rank() << " waited for nobody";
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), ErrorCode::kPeerTimeout) << error.what();
          EXPECT_THAT(error.what(),
                      HasSubstr(before_combine ? "combine epoch" : "dispatch (row counts) epoch"));
          EXPECT_THAT(error.what(), HasSubstr("missing rank(s) 1 "));
          EXPECT_THAT(error.ranks(), ElementsAre(1));
        }
        const auto waited = std::chrono::steady_clock::now() - begin;
        EXPECT_LT(waited, std::chrono::milliseconds(1500));
        EXPECT_THROW((void)rank.exchange().dispatch(rank.x(), rank.routing(), rank.stream()),
                     Error);
        if (before_combine) rank.barrier();
      });
      expect_exact(rounds, config_for(rounds, mode), 3);
    }
  }
}

TEST_F(CudaExchangeTest, CountersFollowTheFormula) {
  const Rounds rounds{.num_tokens = {50, 41}, .num_experts = 8, .num_topk = 4, .hidden = 256};
  for (const Mode mode : kModes) {
    for (const WireFormat wire : kWires) {
      run(rounds, config_for(rounds, mode, wire), [&](CudaRank& rank) {
        const Round round = make_round(rounds, 0);
        const ExchangeCounters before = rank.exchange().counters();
        ASSERT_NO_FATAL_FAILURE(rank.round_trip(round));
        const ExchangeCounters after = rank.exchange().counters();
        const auto r = static_cast<std::size_t>(rank.rank());
        for (int peer = 0; peer < 2; ++peer) {
          std::uint64_t rows = 0, copies = 0;
          for (std::size_t t = 0; t < round.topk_idx[r].size() / 4; ++t) {
            std::uint64_t here = 0;
            for (std::size_t k = 0; k < 4; ++k) {
              const std::int32_t e = round.topk_idx[r][t * 4 + k];
              here += e >= 0 && e / 4 == peer;
            }
            rows += here;
            copies += peer == rank.rank() ? here : here > 0;  // No link saves a copy here.
          }
          const std::uint64_t token = wire_bytes_per_token(wire, rounds.hidden);
          const std::uint64_t lists = mode == Mode::kNormal && peer != rank.rank() ? rows * 8 : 0;
          const std::uint64_t dispatch =
              (mode == Mode::kNormal ? copies : rows) * token + rows * 8 + lists;
          EXPECT_EQ(after.dispatch_bytes[peer] - before.dispatch_bytes[peer], dispatch + 8 * 8);
          EXPECT_EQ(after.dispatch_rows[peer] - before.dispatch_rows[peer],
                    mode == Mode::kLowLatency ? rows : copies);
          EXPECT_EQ(after.combine_bytes[peer] - before.combine_bytes[peer], rows * 2 * 256);
        }
      });
    }
  }
}

TEST_F(CudaExchangeTest, TheMemoryPlanned) {
  const Rounds rounds{.num_tokens = {128, 128}, .num_experts = 32, .num_topk = 8, .hidden = 7168};
  for (const Mode mode : kModes) {
    const ExchangeConfig config = config_for(rounds, mode);
    run(rounds, config, [&](CudaRank& rank) {
      std::size_t free_before = 0, free_after = 0, total = 0;
      rank.barrier();
      ASSERT_EQ(cudaMemGetInfo(&free_before, &total), cudaSuccess);
      rank.barrier();
      // One rank at a time cannot create; both do, so the difference is twice one's.
      {
        auto backend = make_backend({.device = {Device::Kind::kCuda, 0}, .num_local_ranks = 2});
        Exchange second = Exchange::create(config, rank.transport(), *backend);
        rank.barrier();
        ASSERT_EQ(cudaMemGetInfo(&free_after, &total), cudaSuccess);
        rank.barrier();
      }
      const double planned =
          2.0 * static_cast<double>(Exchange::workspace_bytes(config, 2, Device::Kind::kCuda));
      EXPECT_NEAR(static_cast<double>(free_before - free_after), planned, 16e6 + planned * 0.01);
    });
  }
}

}  // namespace
}  // namespace sluice::testing
