// The identity proof: two recipes through real engines, and the bytes that reach GEMM1.
#include <algorithm>
#include <exception>
#include <thread>

#include "accuracy/evaluator.h"
#include "core/fail.h"
#include "core/row_digest.h"
#include "sluice/accuracy.h"
#include "sluice/backend.h"
#include "sluice/config.h"
#include "sluice/engine.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

/// What every rank of one run shares.
struct Run {
  const Checkpoint* checkpoint;
  const Workload* tokens;
  int layer, num_ranks;
  Mode mode;
  RecipeName recipe;
};

/// First token of rank r, when `num_tokens` are spread over ranks in order.
std::int64_t first_token(const Run& run, int r) {
  return run.tokens->num_tokens * r / run.num_ranks;
}

std::uint64_t digest_of_rank(const Run& run, int r, Transport& transport) {
  const auto backend = make_backend({.local_rank = r, .num_local_ranks = run.num_ranks});
  const std::optional<RecipeName> recipe = run.recipe;
  const bool low_latency = run.mode == Mode::kLowLatency;
  const std::int64_t capacity = (run.tokens->num_tokens + run.num_ranks - 1) / run.num_ranks;
  Engine engine =
      Engine::create({.layer = run.layer,
                      .low_latency = low_latency ? recipe : std::nullopt,
                      .normal = low_latency ? std::nullopt : recipe,
                      .max_tokens_per_rank = static_cast<int>(std::max<std::int64_t>(1, capacity)),
                      .peer_timeout = read_environment().peer_timeout},
                     *run.checkpoint, transport, *backend);
  const std::int64_t begin = first_token(run, r), count = first_token(run, r + 1) - begin;
  const std::int64_t hidden = run.tokens->hidden, topk = run.tokens->num_topk;
  const TensorView x(run.tokens->x.data() + begin * hidden, DType::kBFloat16, Shape{count, hidden});
  const Shape slots{count, topk};
  const Routing routing{
      .topk_idx = {run.tokens->topk_idx.data() + begin * topk, DType::kInt32, slots},
      .topk_weights = {run.tokens->topk_weights.data() + begin * topk, DType::kFloat32, slots}};
  std::vector<std::uint16_t> y(static_cast<std::size_t>(count * hidden));
  MutableTensorView out;
  out.data = y.data(), out.dtype = DType::kBFloat16, out.shape = x.shape;
  engine.record_gemm_input_digest(true);
  engine.forward(run.mode, x, routing, out, backend->stream());
  return engine.gemm_input_digest();
}

/// Sum over ranks. Throws the first failure that is not merely a wait for a failed peer.
std::uint64_t digest_of(const Run& run) {
  const auto n = static_cast<std::size_t>(run.num_ranks);
  auto transports = make_inproc_transports(run.num_ranks);
  std::vector<std::uint64_t> digests(n);
  std::vector<std::exception_ptr> failures(n);
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < n; ++r) {
    threads.emplace_back([&, r] {
      try {
        digests[r] = digest_of_rank(run, static_cast<int>(r), *transports[r]);
      } catch (...) {
        failures[r] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::exception_ptr timeout;
  for (const std::exception_ptr& failure : failures) {
    if (!failure) continue;
    try {
      std::rethrow_exception(failure);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kPeerTimeout) throw;
      timeout = failure;
    }
  }
  if (timeout) std::rethrow_exception(timeout);
  std::uint64_t sum = 0;
  for (const std::uint64_t digest : digests) sum += digest;
  return sum;
}

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
  const accuracy::RowPlan plan = accuracy::plan_rows(tokens, num_experts);
  std::vector<Gemm1Row> inputs;
  for (std::int64_t t = 0; t < tokens.num_tokens; ++t) {
    const Recipe direct{.name = RecipeName::kDirect};
    inputs.push_back(
        gemm1(direct, &tokens.x[static_cast<std::size_t>(t * tokens.hidden)], tokens.hidden));
  }
  std::uint64_t digest = 0;
  for (std::size_t e = 0; e < static_cast<std::size_t>(num_experts); ++e) {
    for (int row = plan.expert_begin[e]; row < plan.expert_begin[e + 1]; ++row) {
      const auto token = static_cast<std::size_t>(plan.rows[static_cast<std::size_t>(row)].token);
      digest += row_digest(e, static_cast<std::uint64_t>(row - plan.expert_begin[e]),
                           inputs[token].codes, inputs[token].scales);
    }
  }
  return digest;
}

}  // namespace

IdentityProof prove_identity(const Checkpoint& checkpoint, int layer,
                             const std::vector<TokenSuite>& suites, int num_ranks, Mode mode,
                             const Gemm1Function& gemm1) {
  check_argument(num_ranks >= 1, "num_ranks {} is not positive", num_ranks);
  const Workload tokens = concatenate(suites);
  IdentityProof proof{.num_ranks = num_ranks, .mode = mode, .num_tokens = tokens.num_tokens};
  proof.definition = digest_of_definition(tokens, checkpoint.geometry().num_experts, gemm1);
  Run run{.checkpoint = &checkpoint,
          .tokens = &tokens,
          .layer = layer,
          .num_ranks = num_ranks,
          .mode = mode,
          .recipe = RecipeName::kDirect};
  proof.direct = digest_of(run);
  run.recipe = RecipeName::kDirectBf16;
  proof.direct_bf16 = digest_of(run);
  return proof;
}

}  // namespace sluice
