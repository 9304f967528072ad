// Laws that hold for any traffic, on traffic made up by RapidCheck.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <numeric>

#include "exchange_model.h"
#include "multirank/run_ranks.h"
#include "support/scalar_backend.h"

namespace sluice::testing {
namespace {

/// Traffic of up to 8 ranks, with weights and empty slots of RapidCheck's choosing.
Traffic arbitrary_traffic() {
  const int num_ranks = *rc::gen::element(1, 2, 3, 4, 8);
  const int num_experts = num_ranks * *rc::gen::inRange(1, 4);
  const int num_topk = *rc::gen::inRange(1, std::min(9, num_experts + 1));
  const auto tokens = *rc::gen::container<std::vector<std::int64_t>>(
      static_cast<std::size_t>(num_ranks), rc::gen::inRange<std::int64_t>(0, 6));
  return make_traffic(tokens, num_experts, num_topk, 128,
                      *rc::gen::inRange<std::uint64_t>(0, 1u << 30));
}

ExchangeConfig config_for(const Traffic& t, Mode mode, WireFormat wire) {
  return {.mode = mode,
          .wire = wire,
          .num_experts = t.num_experts,
          .num_topk = t.num_topk,
          .hidden = t.hidden,
          .max_tokens_per_rank = 64,
          .peer_timeout = std::chrono::milliseconds(20'000)};
}

/// expert(e, row bytes, element) -> output bits.
using ExpertFunction = std::function<std::uint16_t(int, const std::byte*, int)>;

struct Outcome {
  std::vector<std::uint16_t> y;        // All ranks' tokens, one after the other.
  std::vector<std::int64_t> num_rows;  // [num_experts]
};

Outcome run(const Traffic& t, Mode mode, WireFormat wire, const ExpertFunction& expert) {
  Outcome outcome;
  std::vector<std::vector<std::int64_t>> num_rows(static_cast<std::size_t>(t.num_ranks()));
  std::vector<std::vector<std::uint16_t>> y(static_cast<std::size_t>(t.num_ranks()));
  const std::size_t row_bytes =
      (wire == WireFormat::kBf16 ? 2u : 1u) * static_cast<unsigned>(t.hidden);
  run_ranks(t.num_ranks(), [&](Transport& transport) {
    const int r = transport.rank();
    ScalarBackend backend;
    Exchange exchange = Exchange::create(config_for(t, mode, wire), transport, backend);
    Dispatched d = exchange.dispatch(t.x_view(r), t.routing(r), {});
    const ExpertBatch& batch = d.batch();
    std::vector<std::uint16_t> rows(static_cast<std::size_t>(batch.x.shape.num_elements()), 0x7fc1);
    for (int e = 0; e < exchange.num_local_experts(); ++e) {
      const int global = r * exchange.num_local_experts() + e;
      num_rows[static_cast<std::size_t>(r)].push_back(batch.num_rows.as<std::int32_t>()[e]);
      for (std::int64_t i = 0; i < batch.num_rows.as<std::int32_t>()[e]; ++i) {
        const auto row = static_cast<std::size_t>(batch.row_begin.as<std::int64_t>()[e] + i);
        for (int c = 0; c < t.hidden; ++c) {
          rows[row * static_cast<std::size_t>(t.hidden) + static_cast<std::size_t>(c)] =
              expert(global, batch.x.as<std::byte>() + row * row_bytes, c);
        }
      }
    }
    y[r].assign(static_cast<std::size_t>(t.num_tokens[r] * t.hidden), 0x7fc1);
    MutableTensorView out;
    out.data = y[r].data(), out.dtype = DType::kBFloat16,
    out.shape = Shape{t.num_tokens[r], t.hidden};
    const TensorView expert_y(rows.data(), DType::kBFloat16, batch.x.shape);
    exchange.combine(std::move(d), expert_y, out, {});
  });
  share_between_ranks(y);
  share_between_ranks(num_rows);
  for (const auto& part : num_rows) {
    outcome.num_rows.insert(outcome.num_rows.end(), part.begin(), part.end());
  }
  for (const auto& part : y) outcome.y.insert(outcome.y.end(), part.begin(), part.end());
  return outcome;
}

std::uint16_t hashing_expert(int e, const std::byte* row, int c) {
  return expert_output(e, row, 128, c);
}
std::uint16_t identity_expert(int, const std::byte* row, int c) {
  return reinterpret_cast<const std::uint16_t*>(row)[c];
}

Mode arbitrary_mode() {
  return *rc::gen::element(Mode::kLowLatency, Mode::kNormal);
}

template <class Property>
void expect_law(const char* name, const Property& property) {
  const rc::detail::TestParams params{.seed = 1, .maxSuccess = 60};
  const rc::detail::TestMetadata metadata{.id = name, .description = name};
  const auto result = rc::detail::checkTestable(property, metadata, params);
  EXPECT_TRUE(result.template is<rc::detail::SuccessResult>()) << name << ": " << [&] {
    std::ostringstream text;
    rc::detail::printResultMessage(result, text);
    return text.str();
  }();
}

TEST(Laws, RowsAreConserved) {
  expect_law("rows", [] {
    const Traffic t = arbitrary_traffic();
    const Outcome outcome = run(t, arbitrary_mode(), WireFormat::kE4m3Group, hashing_expert);
    std::vector<std::int64_t> sent(static_cast<std::size_t>(t.num_experts));
    for (const auto& idx : t.topk_idx) {
      for (const int e : idx) sent[static_cast<std::size_t>(std::max(e, 0))] += e >= 0;
    }
    RC_ASSERT(outcome.num_rows == sent);
  });
}

TEST(Laws, IdentityExpertsGiveTheWeightedSumOfTheToken) {
  expect_law("identity", [] {
    const Traffic t = arbitrary_traffic();
    const Outcome outcome = run(t, arbitrary_mode(), WireFormat::kBf16, identity_expert);
    std::size_t at = 0;
    for (int r = 0; r < t.num_ranks(); ++r) {
      for (std::int64_t i = 0; i < t.num_tokens[r]; ++i) {
        for (int c = 0; c < t.hidden; ++c, ++at) {
          const float x = bf16_to_float(t.x[r][i * t.hidden + c]);
          float sum = 0;
          for (int k = 0; k < t.num_topk; ++k) {
            if (t.topk_idx[r][i * t.num_topk + k] < 0) continue;
            const float product = t.topk_weights[r][i * t.num_topk + k] * x;
            sum = sum + product;
          }
          RC_ASSERT(outcome.y[at] == bf16_from_float(sum));
        }
      }
    }
  });
}

TEST(Laws, RelabellingExpertsChangesNothing) {
  expect_law("relabel", [] {
    const Traffic t = arbitrary_traffic();
    const Mode mode = arbitrary_mode();
    std::vector<int> to(static_cast<std::size_t>(t.num_experts)), from(to.size());
    std::iota(to.begin(), to.end(), 0);
    const CounterRng rng(*rc::gen::inRange<std::uint64_t>(0, 1000), 0);
    for (std::size_t i = to.size(); i > 1; --i) std::swap(to[i - 1], to[rng.bits(i) % i]);
    for (std::size_t i = 0; i < to.size(); ++i)
      from[static_cast<std::size_t>(to[i])] = static_cast<int>(i);
    Traffic renamed = t;
    for (auto& idx : renamed.topk_idx) {
      for (int& e : idx) e = e < 0 ? e : to[static_cast<std::size_t>(e)];
    }
    const auto renamed_expert = [&](int e, const std::byte* row, int c) {
      return hashing_expert(from[static_cast<std::size_t>(e)], row, c);
    };
    RC_ASSERT(run(t, mode, WireFormat::kE4m3Group, hashing_expert).y ==
              run(renamed, mode, WireFormat::kE4m3Group, renamed_expert).y);
  });
}

TEST(Laws, SameBitsTwiceForAnyNumberOfRanksAndInBothModes) {
  expect_law("ranks", [] {
    Traffic t = arbitrary_traffic();
    t.num_experts *= 24 / t.num_ranks();  // Divisible by every number of ranks below.
    const auto first = run(t, Mode::kLowLatency, WireFormat::kE4m3Group, hashing_expert);
    RC_ASSERT(run(t, Mode::kLowLatency, WireFormat::kE4m3Group, hashing_expert).y == first.y);
    for (const int num_ranks : {1, 2, 3, 4, 8}) {
      const Traffic u = spread_over(t, num_ranks);
      const Outcome other = run(u, arbitrary_mode(), WireFormat::kE4m3Group, hashing_expert);
      RC_ASSERT(other.y == first.y);
      RC_ASSERT(other.num_rows == first.num_rows);
    }
  });
}

}  // namespace
}  // namespace sluice::testing
