// The identity proof: two recipes through real engines, and the bytes that reach GEMM1.
#include <algorithm>
#include <exception>
#include <thread>

#include "core/fail.h"
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

}  // namespace

IdentityProof prove_identity(const Checkpoint& checkpoint, int layer, const TokenSuite& suite,
                             std::uint64_t definition, int num_ranks, Mode mode) {
  check_argument(num_ranks >= 1, "num_ranks {} is not positive", num_ranks);
  IdentityProof proof{.num_ranks = num_ranks,
                      .mode = mode,
                      .num_tokens = suite.tokens.num_tokens,
                      .definition = definition};
  Run run{.checkpoint = &checkpoint,
          .tokens = &suite.tokens,
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
