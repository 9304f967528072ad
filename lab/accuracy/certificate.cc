// Which variants each recipe needs, and what their differences say.
#include <algorithm>
#include <cmath>

#include "accuracy/engines.h"
#include "accuracy/evaluator.h"
#include "accuracy/metrics.h"
#include "accuracy/safety.h"
#include "core/fail.h"
#include "core/threads.h"
#include "sluice/quant.h"

namespace sluice {
namespace accuracy {
namespace {

const Variant kExact{};
const Variant kOriginal{{.original_weights = true}, Cast::kNone, false};
const Variant kAccumulation{{.float32_sums = true}, Cast::kNone, false};
const Variant kCombine{{}, Cast::kNone, true};

/// A recipe's roundings as variants of the one evaluator.
struct RecipeVariants {
  Variant activation1, activation2, together, bf16_input;
  explicit RecipeVariants(const Recipe& recipe)
      : activation1{{.casts1 = gemm1_casts(recipe)}, Cast::kNone, false},
        activation2{{}, recipe.gemm2, false},
        together{{.casts1 = gemm1_casts(recipe), .float32_sums = true}, recipe.gemm2, true},
        bf16_input{{.float32_sums = true}, recipe.gemm2, true} {}
};

std::set<Variant> variants_of(const std::vector<RecipeCertificate>& recipes) {
  std::set<Variant> wanted = {kExact, kOriginal, kAccumulation, kCombine};
  for (const RecipeCertificate& r : recipes) {
    if (!r.refused.empty()) continue;
    const RecipeVariants v(r.recipe);
    wanted.insert({v.activation1, v.activation2, v.together, v.bf16_input});
  }
  return wanted;
}

/// Resolves every recipe; one that needs scales there are none of is refused, by name and reason.
std::vector<RecipeCertificate> resolve(const AccuracyConfig& config,
                                       const std::optional<StaticScales>& scales) {
  std::vector<Recipe> wanted = config.recipes;
  if (wanted.empty()) {
    for (const NamedRecipe& row : named_recipes()) wanted.push_back(row.recipe);
  }
  std::vector<RecipeCertificate> recipes;
  for (const Recipe& recipe : wanted) {
    RecipeCertificate& r = recipes.emplace_back();
    r.recipe = {recipe, Mode::kLowLatency};
    try {
      r.recipe =
          resolve_recipe(recipe, Mode::kLowLatency, DispatchDtype::kAuto, scales, "the layer");
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kUnsupported) throw;
      r.refused = error.what();
    }
  }
  return recipes;
}

void cast_inputs(Evaluator& evaluator, const std::vector<RecipeCertificate>& recipes,
                 const Workload& tokens, const AccuracyConfig& config) {
  std::set<std::vector<Cast>> done;
  for (const RecipeCertificate& r : recipes) {
    if (!r.refused.empty() || !done.insert(gemm1_casts(r.recipe)).second) continue;
    std::vector<Gemm1Row> rows;
    for (std::int64_t t = 0; t < tokens.num_tokens; ++t) {
      rows.push_back(config.gemm1(r.recipe, &tokens.x[static_cast<std::size_t>(t * tokens.hidden)],
                                  tokens.hidden));
    }
    evaluator.set_inputs(gemm1_casts(r.recipe), std::move(rows));
  }
}

/// `direct` and `direct-bf16` share an entry of inputs(), as do the static pair.
void judge_input(const Evaluator& evaluator, const Workload& tokens, RecipeCertificate& r) {
  const auto& inputs = evaluator.inputs(gemm1_casts(r.recipe));
  const auto hidden = static_cast<std::size_t>(tokens.hidden);
  std::vector<double> x(tokens.x.size()), a(tokens.x.size());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = bf16_to_float(tokens.x[i]);
  for (std::size_t t = 0; t < inputs.size(); ++t) {
    dequantize(inputs[t], std::span(a).subspan(t * hidden, hidden));
    r.cast1 += inputs[t].counts;
  }
  r.activation1 = ErrorSums(x, a, tokens.hidden).numbers();
}

/// RecipeCertificate::added_percent of an output whose errors against exact arithmetic are
/// `output`.
std::optional<double> added_percent(const Evaluator& evaluator, const ErrorSums& output,
                                    const Recipe& recipe, std::int64_t width) {
  const auto exact = evaluator.y(kExact);
  const ErrorSums weights(evaluator.y(kOriginal), exact, width);
  const ErrorSums bf16_input(exact, evaluator.y(RecipeVariants(recipe).bf16_input), width);
  const double with = std::hypot(weights.error_norm(), output.error_norm());
  const double without = std::hypot(weights.error_norm(), bf16_input.error_norm());
  if (without == 0) return std::nullopt;  // Not NaN, which fails every budget.
  return 100 * (with / without - 1);
}

void judge_output(const Evaluator& evaluator, std::int64_t width, RecipeCertificate& r) {
  const RecipeVariants v(r.recipe);
  const auto exact = evaluator.y(kExact), original = evaluator.y(kOriginal);
  const auto error = [&](const Variant& variant) {
    return ErrorSums(exact, evaluator.y(variant), width).relative_l2();
  };
  RoundingErrors& alone = r.roundings;
  const ErrorSums weights(original, exact, width);
  alone.weights = weights.relative_l2();
  alone.activation1 = error(v.activation1);
  alone.activation2 = error(v.activation2);
  alone.accumulation = error(kAccumulation);
  alone.combine = error(kCombine);
  alone.quadrature =
      std::sqrt(alone.activation1 * alone.activation1 + alone.activation2 * alone.activation2 +
                alone.accumulation * alone.accumulation + alone.combine * alone.combine);
  const ErrorSums together(exact, evaluator.y(v.together), width);
  alone.together = together.relative_l2();
  r.output = together.numbers();
  r.token_errors = together.token_errors();
  r.channel_errors = together.channel_errors();
  r.total = ErrorSums(original, evaluator.y(v.together), width).numbers();
  r.total_bf16 = ErrorSums(original, evaluator.y(v.bf16_input), width).numbers();
  r.added_percent = added_percent(evaluator, together, r.recipe, width);
  r.cast2 = evaluator.cast2_counts(v.together);
}

/// The layer itself, where it would use the static scales that `r` was judged with.
void judge_engine(const Evaluator& evaluator, const Workload& tokens, const EngineRanks& ranks,
                  const std::optional<StaticScales>& scales, RecipeCertificate& r) {
  if (r.recipe.s1 != 0 || r.recipe.s2 != 0) {
    const std::optional<StaticScales> own = ranks.checkpoint->static_scales(ranks.layer);
    if (!own || own->s1 != scales->s1 || own->s2 != scales->s2) return;
  }
  const EngineOutcome outcome = run_engines(ranks, r.recipe, tokens);
  const Variant together = RecipeVariants(r.recipe).together;
  const auto exact = evaluator.y(kExact), evaluated = evaluator.y(together);
  std::vector<double> y(outcome.y.size());
  std::ranges::transform(outcome.y, y.begin(), [](std::uint16_t bits) {
    return static_cast<double>(bf16_to_float(bits));
  });
  EngineAgreement& agreement = r.engine.emplace();
  agreement.same_bytes =
      outcome.gemm1_digest ==
      definition_digest(evaluator.rows(), r.recipe, evaluator.inputs(gemm1_casts(r.recipe)));
  const ErrorSums output(exact, y, tokens.hidden);
  agreement.output = output.numbers();
  agreement.added_percent = added_percent(evaluator, output, r.recipe, tokens.hidden);
  const double norm = ErrorSums(exact, exact, tokens.hidden).reference_norm();
  const double apart = ErrorSums(evaluated, y, tokens.hidden).error_norm();
  agreement.distance = apart == 0 ? 0 : apart / norm;
  agreement.limit = engine_limit(outcome.device);
}

void check_tokens(const LayerSource& source, const Workload& tokens) {
  const ModelGeometry& g = source.geometry();
  check_argument(tokens.num_tokens > 0, "no tokens to judge recipes on");
  check_argument(tokens.hidden == g.hidden, "tokens have hidden {}, the layer {}", tokens.hidden,
                 g.hidden);
}

}  // namespace
}  // namespace accuracy

SuiteCertificate certify(const LayerSource& source, const TokenSuite& suite,
                         const AccuracyConfig& config) {
  using namespace accuracy;
  check_tokens(source, suite.tokens);
  check_argument(!config.engine || config.engine->checkpoint, "engines need a checkpoint");
  check_argument(
      config.expert_scales.empty() ||
          config.expert_scales.size() == static_cast<std::size_t>(source.geometry().num_experts),
      "{} expert_scales for {} experts", config.expert_scales.size(),
      source.geometry().num_experts);
  std::vector<int> cores = available_cores();
  const int num_threads =
      config.num_threads > 0 ? config.num_threads : static_cast<int>(cores.size());
  ThreadPool pool(num_threads, std::move(cores));

  SuiteCertificate certificate;
  certificate.name = suite.name;
  certificate.num_tokens = suite.tokens.num_tokens;
  const auto part = [&](double begin, double end) -> Progress {
    if (!config.progress) return {};
    return [=, &config](double f) { config.progress(begin + (end - begin) * f); };
  };
  std::optional<StaticScales> scales = config.static_scales;
  std::string origin = scales ? "checkpoint" : "none";
  if (!scales && suite.calibration.num_tokens > 0) {
    scales = calibrate(source, suite.calibration, pool, part(0, 0.2));
    origin = "calibration";
  }
  certificate.recipes = resolve(config, scales);

  Evaluator evaluator(source, suite.tokens, pool);
  certificate.num_rows = static_cast<std::int64_t>(evaluator.rows().rows.size());
  cast_inputs(evaluator, certificate.recipes, suite.tokens, config);
  const std::set<Variant> wanted = variants_of(certificate.recipes);
  evaluator.run_gemm1({wanted.begin(), wanted.end()}, part(0.2, 0.7));
  evaluator.run_gemm2(wanted, scales ? scales->s2 : 0, part(0.7, 1));
  for (RecipeCertificate& r : certificate.recipes) {
    if (!r.refused.empty()) continue;
    judge_input(evaluator, suite.tokens, r);
    judge_output(evaluator, source.geometry().hidden, r);
    if (config.engine) {
      judge_engine(evaluator, suite.tokens, *config.engine, scales, r);
    }
  }
  certificate.safety = judge_scales(evaluator.rows(), suite.tokens, evaluator.h(kExact),
                                    source.geometry(), {scales, origin, config.expert_scales});
  return certificate;
}

BudgetVerdict judge_budget(const std::vector<SuiteCertificate>& suites, const Recipe& recipe,
                           double budget_percent) {
  BudgetVerdict verdict;
  verdict.recipe = recipe;
  verdict.budget_percent = budget_percent;
  // NaN is the worst there is, and stays it.
  const auto is_worse = [&](double added) {
    return verdict.worst_suite.empty() ||
           (!std::isnan(verdict.worst_percent) && !(added <= verdict.worst_percent));
  };
  for (const SuiteCertificate& suite : suites) {
    for (const RecipeCertificate& r : suite.recipes) {
      if (r.recipe != recipe) continue;
      for (const bool is_of_engine : {false, true}) {
        const std::optional<double> added = !is_of_engine ? r.added_percent
                                            : r.engine    ? r.engine->added_percent
                                                          : std::nullopt;
        if (!added || !is_worse(*added)) continue;
        verdict.worst_percent = *added;
        verdict.worst_suite = suite.name;
        verdict.is_of_engine = is_of_engine;
      }
    }
  }
  check_argument(!verdict.worst_suite.empty(), "budget: recipe {} was not evaluated on any suite",
                 to_string(recipe));
  verdict.passed = verdict.worst_percent <= budget_percent;
  return verdict;
}

}  // namespace sluice
