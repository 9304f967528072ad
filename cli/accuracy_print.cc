#include "accuracy_print.h"

#include <fmt/core.h>

#include <algorithm>

#include "report.h"

namespace sluice::cli {
namespace {

std::string percent(double ratio) {
  return ratio != 0 && ratio < 1e-4 ? fmt::format("{:.1e}", ratio * 100)
                                    : fmt::format("{:.3f}", ratio * 100);
}

/// One line on what the engines did, if there were any.
void print_engines(const SuiteCertificate& suite) {
  int num_recipes = 0, num_passed = 0, num_other_bytes = 0;
  double farthest = 0, limit = 0;
  for (const RecipeCertificate& r : suite.recipes) {
    if (!r.engine) continue;
    ++num_recipes;
    num_passed += r.engine->passed() ? 1 : 0;
    num_other_bytes += r.engine->same_bytes ? 0 : 1;
    farthest = std::max(farthest, r.engine->distance);
    limit = r.engine->limit;
  }
  if (num_recipes == 0) return;
  fmt::print(
      "engines   {} recipes, {} at GEMM1, outputs {} % from the certificate's (limit {} %): {}\n",
      num_recipes,
      num_other_bytes == 0 ? "the same bytes" : fmt::format("{} with OTHER BYTES", num_other_bytes),
      percent(farthest), percent(limit), num_passed == num_recipes ? "PASS" : "FAIL");
}

}  // namespace

void print_suite(const SuiteCertificate& suite) {
  fmt::print("\n{}: {} tokens, {} rows; all numbers in per cent unless they say otherwise\n",
             suite.name, suite.num_tokens, suite.num_rows);
  Table errors({"recipe", "activation", "output", "worst token", "p99 channel", "SQNR dB", "total",
                "adds", "saturated", "underflowed"});
  Table alone({"each rounding", "weights", "activation 1", "activation 2", "accumulation",
               "combine", "together", "root sum sq"});
  for (const RecipeCertificate& r : suite.recipes) {
    const std::string name = to_string(r.recipe);
    if (!r.refused.empty()) {
      errors.add({name, "refused"});
      continue;
    }
    errors.add({name, percent(r.activation1.relative_l2), percent(r.output.relative_l2),
                fmt::format("{} (#{})", percent(r.output.worst_token_error), r.output.worst_token),
                percent(r.output.p99_channel_error), fmt::format("{:.2f}", r.output.sqnr_db),
                r.total ? percent(r.total->relative_l2) : "-",
                r.added_percent ? fmt::format("{:+.2f}", *r.added_percent) : "-",
                fmt::format("{} + {}", r.cast1.saturated, r.cast2.saturated),
                fmt::format("{} + {}", r.cast1.underflowed, r.cast2.underflowed)});
    const RoundingErrors& e = r.roundings;
    alone.add({name, e.weights ? percent(*e.weights) : "-", percent(e.activation1),
               percent(e.activation2), percent(e.accumulation), percent(e.combine),
               percent(e.together), percent(e.quadrature)});
  }
  fmt::print("{}\n{}", errors.to_string(), alone.to_string());
  const ScaleSafety& s = suite.safety;
  fmt::print("scales    {}: s1 {:.4g} headroom {:.2f}x, s2 {:.4g} headroom {:.2f}x: {}\n", s.origin,
             s.scales.s1, s.headroom1, s.scales.s2, s.headroom2, s.recommendation);
  print_engines(suite);
}

void print_identity(const IdentityProof& proof, const std::string& backend) {
  fmt::print(
      "identity  {}, {}, {} ranks, {} tokens: GEMM1 input of direct {:016x}, direct-bf16 {:016x}, "
      "definition {:016x}: {}\n",
      to_string(proof.mode), backend, proof.num_ranks, proof.num_tokens, proof.direct,
      proof.direct_bf16, proof.definition,
      !proof.passed()       ? "DIFFERENT: FAIL"
      : proof.num_rows == 0 ? "no token has an expert, nothing to compare: PASS"
                            : "the same bytes: PASS");
}

void print_budget(const BudgetVerdict& verdict) {
  fmt::print(
      "budget    FP8 dispatch ({}) adds {:.2f} % to the layer's total error (worst suite {}{}), "
      "budget {:g} %: {}\n",
      to_string(verdict.recipe), verdict.worst_percent, verdict.worst_suite,
      verdict.is_of_engine ? ", as run" : "", verdict.budget_percent,
      verdict.passed ? "PASS" : "FAIL");
}

}  // namespace sluice::cli
