// The identity proof: two recipes through real engines, and the bytes that reach GEMM1.
#include <algorithm>

#include "accuracy/engines.h"
#include "core/fail.h"
#include "sluice/lab/accuracy.h"

namespace sluice {
namespace {

/// The tokens of all suites, one after the other.
Workload concatenate(const std::vector<TokenSuite>& suites) {
  check_argument(!suites.empty(), "identity: no tokens");
  Workload all = suites.front().tokens;
  for (std::size_t i = 1; i < suites.size(); ++i) {
    const Workload& next = suites[i].tokens;
    check_argument(next.hidden == all.hidden && next.num_topk == all.num_topk,
                   "identity: suites {} and {} differ in hidden or num_topk", suites.front().name,
                   suites[i].name);
    all.x.insert(all.x.end(), next.x.begin(), next.x.end());
    all.topk_idx.insert(all.topk_idx.end(), next.topk_idx.begin(), next.topk_idx.end());
    all.topk_weights.insert(all.topk_weights.end(), next.topk_weights.begin(),
                            next.topk_weights.end());
    all.num_tokens += next.num_tokens;
  }
  return all;
}

/// What the digest must be, from the scalar definition alone.
std::uint64_t digest_of_definition(const Workload& tokens, int num_experts,
                                   const Gemm1Function& gemm1) {
  const LayerRecipe direct{};
  std::vector<Gemm1Row> inputs;
  for (std::int64_t t = 0; t < tokens.num_tokens; ++t) {
    inputs.push_back(
        gemm1(direct, &tokens.x[static_cast<std::size_t>(t * tokens.hidden)], tokens.hidden));
  }
  return accuracy::definition_digest(accuracy::plan_rows(tokens, num_experts), direct, inputs);
}

}  // namespace

IdentityProof prove_identity(const EngineRanks& ranks, const std::vector<TokenSuite>& suites,
                             const Gemm1Function& gemm1) {
  check_argument(ranks.checkpoint != nullptr, "engines need a checkpoint");
  const Workload tokens = concatenate(suites);
  const Recipe direct;  // Its twin quantizes at the receiver.
  return {
      .num_ranks = ranks.num_ranks,
      .mode = ranks.mode,
      .num_tokens = tokens.num_tokens,
      .direct = run_engines(ranks, direct, tokens).gemm1_digest,
      .direct_bf16 = run_engines(ranks, *twin(direct), tokens).gemm1_digest,
      .definition = digest_of_definition(tokens, ranks.checkpoint->geometry().num_experts, gemm1),
      .num_rows = std::ranges::count_if(tokens.topk_idx, [](std::int32_t e) { return e >= 0; })};
}

}  // namespace sluice
