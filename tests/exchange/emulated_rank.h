// emulated_rank.h - a rank of the emulated exchange (rail_emulation.h), and a round of it, checked.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "rail_emulation.h"

namespace sluice::testing {

/// An exchange of one rank, and what its calls need.
struct EmulatedRank {
  EmulatedRank(EmulatedHosts& transport, const ExchangeConfig& config, float s1)
      : stream(*transport.stream()),
        backend(transport.stream()),
        exchange(make_rail_exchange(config, transport, backend,
                                    std::make_unique<EmulatedDevice>(stream, s1))) {}
  ~EmulatedRank() { stream.synchronize(); }
  EmulatedRank(const EmulatedRank&) = delete;
  EmulatedRank& operator=(const EmulatedRank&) = delete;

  EmulatedStream& stream;
  PoisoningBackend backend;
  std::unique_ptr<Exchange::Impl> exchange;
};

inline MutableTensorView view_of(std::vector<std::uint16_t>& y, const Traffic& t, int r) {
  y.assign(static_cast<std::size_t>(t.num_tokens[r] * t.hidden), 0x7fc1);
  MutableTensorView view;
  view.data = y.data(), view.dtype = DType::kBFloat16;
  view.shape = Shape{t.num_tokens[r], t.hidden};
  return view;
}

/// A dispatch and combine of rank r, checked. Rows of the experts are where they belong, or kept.
inline void check_round(EmulatedRank& rank, const Traffic& t, int r, bool in_place,
                        const Routing& routing) {
  Exchange::Impl& exchange = *rank.exchange;
  const ExchangeConfig& c = exchange.config;
  auto route = exchange.dispatch(t.x_view(r), routing, t.static_scale(c.wire), {});
  std::vector<std::uint16_t> expert_y, y;
  rank.stream.synchronize();
  ASSERT_NO_FATAL_FAILURE(check_batch(t, c, r, route->batch, expert_y));
  TensorView rows(expert_y.data(), DType::kBFloat16, route->batch.x.shape);
  if (in_place) {
    std::ranges::copy(expert_y, static_cast<std::uint16_t*>(route->expert_y.data));
    rows = route->expert_y;
  }
  exchange.combine(*route, rows, view_of(y, t, r), {});
  rank.stream.synchronize();
  route.reset();
  exchange.check();
  expect_model(t, c, r, y);
}

}  // namespace sluice::testing
