// Real engines over ranks that are threads, for what a definition alone cannot show.
#include "accuracy/engines.h"

#include <algorithm>

#include "backend/traits.h"
#include "core/fail.h"
#include "core/row_digest.h"
#include "sluice/backend.h"
#include "sluice/config.h"
#include "sluice/engine.h"
#include "sluice/lab/ranks.h"
#include "sluice/transport.h"

namespace sluice {
namespace accuracy {
namespace {

/// What every rank of one run shares.
struct Run {
  const EngineRanks* ranks;
  Recipe recipe;
  const Workload* tokens;
  EngineOutcome* outcome;

  /// First token of rank r.
  [[nodiscard]] std::int64_t first_token(int r) const {
    return tokens->num_tokens * r / ranks->num_ranks;
  }
};

template <class T>
std::unique_ptr<DeviceBuffer> upload(Backend& backend, const T* host, std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  auto buffer = backend.allocate(std::max<std::size_t>(1, bytes));
  if (bytes > 0) backend.copy_from_host(buffer->data(), host, bytes, backend.stream());
  return buffer;
}

Engine make_engine(const Run& run, Transport& transport, Backend& backend) {
  const EngineRanks& ranks = *run.ranks;
  const std::optional<Recipe> recipe = run.recipe;
  const bool low_latency = ranks.mode == Mode::kLowLatency;
  const std::int64_t capacity = (run.tokens->num_tokens + ranks.num_ranks - 1) / ranks.num_ranks;
  return Engine::create(
      {.layer = ranks.layer,
       .low_latency = low_latency ? recipe : std::nullopt,
       .normal = low_latency ? std::nullopt : recipe,
       .max_tokens_per_rank = static_cast<int>(std::max<std::int64_t>(1, capacity)),
       .peer_timeout = read_environment().peer_timeout},
      *ranks.checkpoint, transport, backend);
}

/// Writes this rank's part of y; returns its digest.
std::uint64_t run_rank(const Run& run, int r, Transport& transport) {
  const auto backend = run.ranks->make_backend(r, run.ranks->num_ranks);
  const std::chrono::milliseconds timeout = read_environment().peer_timeout;
  const std::int64_t begin = run.first_token(r), count = run.first_token(r + 1) - begin;
  const std::int64_t hidden = run.tokens->hidden, topk = run.tokens->num_topk;
  const auto x = upload(*backend, run.tokens->x.data() + begin * hidden, count * hidden);
  const auto idx = upload(*backend, run.tokens->topk_idx.data() + begin * topk, count * topk);
  const auto weights =
      upload(*backend, run.tokens->topk_weights.data() + begin * topk, count * topk);
  const auto y = backend->allocate(
      std::max<std::size_t>(1, static_cast<std::size_t>(count * hidden) * sizeof(std::uint16_t)));
  // Its end waits for all ranks: from there on none may allocate, see Engine::create().
  Engine engine = make_engine(run, transport, *backend);

  const Device device = backend->device();
  const Shape x_shape{count, hidden}, slots{count, topk};
  MutableTensorView out;
  out.data = y->data(), out.dtype = DType::kBFloat16, out.shape = x_shape, out.device = device;
  engine.record_gemm_input_digest(true);
  engine.forward(run.ranks->mode, {x->data(), DType::kBFloat16, x_shape, device},
                 {.topk_idx = {idx->data(), DType::kInt32, slots, device},
                  .topk_weights = {weights->data(), DType::kFloat32, slots, device}},
                 out, backend->stream());
  if (count > 0) {
    backend->copy_to_host(run.outcome->y.data() + begin * hidden, y->data(),
                          static_cast<std::size_t>(count * hidden) * sizeof(std::uint16_t),
                          backend->stream());
  }
  engine.check();
  if (r == 0) run.outcome->device = device.kind;
  // Nobody frees memory that another rank still reads.
  (void)transport.all_gather({}, timeout);
  return engine.gemm_input_digest();
}

}  // namespace

std::uint64_t definition_digest(const RowPlan& plan, const Recipe& recipe,
                                const std::vector<Gemm1Row>& inputs) {
  const bool has_scales = scales_per_row(gemm1_casts(recipe).back(), kActivationGroup) > 0;
  std::uint64_t digest = 0;
  for (std::size_t e = 0; e + 1 < plan.expert_begin.size(); ++e) {
    for (int row = plan.expert_begin[e]; row < plan.expert_begin[e + 1]; ++row) {
      const auto token = static_cast<std::size_t>(plan.rows[static_cast<std::size_t>(row)].token);
      digest += row_digest(
          e, static_cast<std::uint64_t>(row - plan.expert_begin[e]), inputs[token].codes,
          has_scales ? std::span<const float>(inputs[token].scales) : std::span<const float>());
    }
  }
  return digest;
}

}  // namespace accuracy

BackendFactory backends_on(Device::Kind kind) {
  return [kind](int rank, int num_ranks) {
    return make_backend({.device = {kind, 0}, .local_rank = rank, .num_local_ranks = num_ranks});
  };
}

EngineOutcome run_engines(const EngineRanks& ranks, const Recipe& recipe, const Workload& tokens) {
  check_argument(ranks.num_ranks >= 1, "num_ranks {} is not positive", ranks.num_ranks);
  check_argument(ranks.checkpoint != nullptr, "engines need a checkpoint");
  const auto n = static_cast<std::size_t>(ranks.num_ranks);
  EngineOutcome outcome;
  outcome.y.resize(tokens.x.size());
  const accuracy::Run run{
      .ranks = &ranks, .recipe = recipe, .tokens = &tokens, .outcome = &outcome};
  auto transports = make_inproc_transports(ranks.num_ranks);
  std::vector<std::uint64_t> digests(n);
  on_every_rank(ranks.num_ranks, [&](int rank) {
    const auto r = static_cast<std::size_t>(rank);
    digests[r] = accuracy::run_rank(run, rank, *transports[r]);
  });
  for (const std::uint64_t digest : digests) outcome.gemm1_digest += digest;
  return outcome;
}

double engine_limit(Device::Kind kind) {
  return traits_of(kind).engine_limit;
}

}  // namespace sluice
