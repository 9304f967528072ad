// Rows that calls count where the exchange counts them anyway: those of the routing, of both modes
// and of every rank; nothing while counting is off.
#include <gmock/gmock.h>

#include <cstring>

#include "layer/group_fixture.h"
#include "multirank/run_ranks.h"
#include "sluice/balance.h"

namespace sluice::testing {
namespace {

using Rows = std::vector<std::int64_t>;

/// What the routing of all ranks says.
void add_routing(Rows& rows, int num_ranks, std::uint64_t stream) {
  for (int r = 0; r < num_ranks; ++r) {
    for (const int e : tokens_of(r, stream).topk_idx) {
      if (e >= 0) ++rows[static_cast<std::size_t>(e)];
    }
  }
}

TEST(LayerCounts, AreTheRowsOfTheRouting) {
  const LayersOnDisk files;
  for (const int num_ranks : {1, 2, 4}) {
    run_ranks(num_ranks, [&](Transport& transport) {
      const int rank = transport.rank();
      const auto backend = make_backend({.num_threads = 1});
      LayerGroup group = LayerGroup::create(group_config(), transport, *backend);
      Layer layer = group.add_layer(files.checkpoint(), files.layer(0));
      Layer other = group.add_layer(files.checkpoint(), files.layer(1));
      EXPECT_THAT(layer.counted_rows({}), ::testing::Each(0));
      (void)forward(layer, Mode::kNormal, tokens_of(rank));  // Not counted.
      layer.count_rows(true);
      Rows expected(8);
      for (const std::uint64_t stream : {1u, 2u}) {
        for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
          (void)forward(layer, mode, tokens_of(rank, stream));
          (void)forward(other, mode, tokens_of(rank, 3));  // Shares the exchange, not the counts.
          add_routing(expected, num_ranks, stream);
        }
      }
      const Workload load = tokens_of(rank, 4);
      OutputRows y(load);
      layer.finish(layer.dispatch_send(Mode::kNormal, load.x_view(), load.routing_view(), {}),
                   y.view(), {});
      add_routing(expected, num_ranks, 4);
      layer.count_rows(false);
      (void)forward(layer, Mode::kLowLatency, tokens_of(rank));

      EXPECT_EQ(layer.counted_rows_of_all({}), expected) << num_ranks << " ranks";
      const auto first = expected.begin() + rank * (8 / num_ranks);
      EXPECT_EQ(layer.counted_rows({}), Rows(first, first + 8 / num_ranks));
      EXPECT_THAT(other.counted_rows_of_all({}), ::testing::Each(0));
      // Every rank makes the same placement of them.
      const Placement placement = balance(layer.counted_rows_of_all({}),
                                          {.num_ranks = num_ranks, .num_slots = 8 + num_ranks});
      const std::uint64_t digest = placement.digest();
      for (const auto& part : transport.all_gather(std::as_bytes(std::span(&digest, 1)),
                                                   std::chrono::milliseconds(20'000))) {
        EXPECT_EQ(std::memcmp(part.data(), &digest, sizeof(digest)), 0);
      }
      layer.reset_counted_rows({});
      EXPECT_THAT(layer.counted_rows({}), ::testing::Each(0));
    });
  }
}

TEST(LayerCounts, OfAnExchangeAloneAreRefusedIfTheyDoNotFit) {
  run_ranks(1, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    Exchange exchange = Exchange::create(
        {.num_experts = 8, .num_topk = 3, .hidden = 256, .max_tokens_per_rank = kTokens}, transport,
        *backend);
    const Workload load = tokens_of(0);
    Routing routing = load.routing_view();
    Rows totals(7);
    routing.row_totals.data = totals.data(), routing.row_totals.dtype = DType::kInt64;
    routing.row_totals.shape = Shape{7};
    try {
      (void)exchange.dispatch(load.x_view(), routing, {});
      FAIL() << "not refused";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_THAT(error.what(), ::testing::HasSubstr("row_totals"));
    }
  });
}

}  // namespace
}  // namespace sluice::testing
