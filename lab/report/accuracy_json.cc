#include "report/accuracy_json.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

namespace sluice::report {
namespace {

using nlohmann::ordered_json;

/// Bins of the channel profile, so that a report stays small whatever `hidden` is.
constexpr std::size_t kProfileBins = 128;

ordered_json to_json(const ErrorNumbers& e) {
  return {{"relative_l2", e.relative_l2},         {"sqnr_db", e.sqnr_db},
          {"worst_token", e.worst_token},         {"worst_token_error", e.worst_token_error},
          {"p99_token_error", e.p99_token_error}, {"p99_channel_error", e.p99_channel_error}};
}

ordered_json to_json(const std::optional<ErrorNumbers>& e) {
  return e ? to_json(*e) : ordered_json();
}

ordered_json to_json(const std::optional<double>& value) {
  return value ? ordered_json(*value) : ordered_json();
}

ordered_json to_json(const CastCounts& c) {
  return {{"values", c.values}, {"saturated", c.saturated}, {"underflowed", c.underflowed}};
}

ordered_json to_json(const RoundingErrors& r) {
  const double ratio = r.quadrature > 0 ? r.together / r.quadrature : 1;
  return {{"weights", to_json(r.weights)}, {"activation1", r.activation1},
          {"activation2", r.activation2},  {"accumulation", r.accumulation},
          {"combine", r.combine},          {"together", r.together},
          {"quadrature", r.quadrature},    {"together_over_quadrature", ratio}};
}

/// Root mean square error of neighbouring channels, at most kProfileBins of them.
ordered_json profile(const std::vector<double>& channels) {
  const std::size_t bins = std::min(kProfileBins, channels.size());
  ordered_json values = ordered_json::array();
  for (std::size_t b = 0; b < bins; ++b) {
    const std::size_t begin = b * channels.size() / bins, end = (b + 1) * channels.size() / bins;
    double sum = 0;
    for (std::size_t c = begin; c < end; ++c) sum += channels[c] * channels[c];
    values.push_back(std::sqrt(sum / static_cast<double>(end - begin)));
  }
  return values;
}

ordered_json to_json(const EngineAgreement& e) {
  return {{"same_bytes", e.same_bytes},
          {"output", to_json(e.output)},
          {"distance", e.distance},
          {"limit", e.limit},
          {"added_percent", to_json(e.added_percent)},
          {"passed", e.passed()}};
}

ordered_json to_json(const RecipeCertificate& r) {
  ordered_json json = {{"name", to_string(r.recipe)}};
  if (!r.refused.empty()) {
    json["refused"] = r.refused;
    return json;
  }
  json["recipe"] = r.recipe.describe();
  json["activation1"] = to_json(r.activation1);
  json["output"] = to_json(r.output);
  json["total"] = to_json(r.total);
  json["total_bf16_input"] = to_json(r.total_bf16);
  json["added_percent"] = to_json(r.added_percent);
  json["gemm1_casts"] = to_json(r.cast1);
  json["gemm2_casts"] = to_json(r.cast2);
  json["roundings"] = to_json(r.roundings);
  if (r.engine) json["engine"] = to_json(*r.engine);
  json["token_errors"] = r.token_errors;
  json["channel_profile"] = profile(r.channel_errors);
  return json;
}

ordered_json to_json(const ScaleSafety& s) {
  ordered_json json = {{"origin", s.origin},         {"s1", s.scales.s1},
                       {"s2", s.scales.s2},          {"amax1", s.amax1},
                       {"amax2", s.amax2},           {"headroom1", s.headroom1},
                       {"headroom2", s.headroom2},   {"clip_rate1", s.clip_rate1},
                       {"clip_rate2", s.clip_rate2}, {"recommendation", s.recommendation}};
  json["experts"] = ordered_json::array();
  for (const auto& e : s.experts) {
    json["experts"].push_back({{"rows", e.rows},
                               {"amax1", e.amax1},
                               {"amax2", e.amax2},
                               {"clip_rate1", e.clip_rate1},
                               {"clip_rate2", e.clip_rate2},
                               {"scale1", e.scale1},
                               {"scale2", e.scale2},
                               {"own_headroom1", e.own_headroom1},
                               {"own_headroom2", e.own_headroom2}});
  }
  return json;
}

}  // namespace

ordered_json to_json(const SuiteCertificate& certificate) {
  ordered_json json = {{"name", certificate.name},
                       {"num_tokens", certificate.num_tokens},
                       {"num_rows", certificate.num_rows},
                       {"static_scales", to_json(certificate.safety)},
                       {"recipes", ordered_json::array()}};
  for (const RecipeCertificate& r : certificate.recipes) json["recipes"].push_back(to_json(r));
  return json;
}

ordered_json to_json(const IdentityProof& proof) {
  const auto hex = [](std::uint64_t digest) { return fmt::format("{:016x}", digest); };
  return {{"ranks", proof.num_ranks},
          {"mode", to_string(proof.mode)},
          {"tokens", proof.num_tokens},
          {"rows", proof.num_rows},
          {"direct", hex(proof.direct)},
          {"direct_bf16", hex(proof.direct_bf16)},
          {"definition", hex(proof.definition)},
          {"passed", proof.passed()}};
}

ordered_json to_json(const BudgetVerdict& verdict) {
  return {{"recipe", to_string(verdict.recipe)},    {"budget_percent", verdict.budget_percent},
          {"added_percent", verdict.worst_percent}, {"worst_suite", verdict.worst_suite},
          {"of_engine", verdict.is_of_engine},      {"passed", verdict.passed}};
}

}  // namespace sluice::report
