// Tokens to rows and back on host cores, against the plainest code.
#include "backend/token_rows_fixture.h"

namespace sluice::testing {
namespace {

TEST(CpuTokenRows, AreThoseOfThePlainestCode) {
  for (const int num_threads : {1, 3}) {
    const auto backend = make_backend({.num_threads = num_threads});
    check_token_rows(*backend, {.num_tokens = 1, .num_topk = 1, .num_experts = 1, .width = 128});
    check_token_rows(*backend, {.num_tokens = 37,
                                .num_topk = 8,
                                .first_expert = 5,
                                .num_experts = 33,
                                .width = 384,
                                .wide_idx = true});
    check_token_rows(
        *backend,
        {.num_tokens = 5, .num_topk = 32, .first_expert = 2, .num_experts = 1, .width = 640});
  }
}

}  // namespace
}  // namespace sluice::testing
