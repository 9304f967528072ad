#include "accuracy/evaluator.h"

#include <algorithm>
#include <cmath>

#include "accuracy/column_gemm.h"
#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice::accuracy {
namespace {

/// A column's values: codes with their scales, or plain numbers with scale 1.
template <class T>
void fill_column(Columns<T>& columns, int column, const Gemm1Row& row) {
  for (int k = 0; k < columns.k(); ++k) {
    columns.value(k, column) =
        static_cast<T>(e4m3_to_float(row.codes[static_cast<std::size_t>(k)]));
  }
  columns.set_scales(column, row.scales);
}

/// activate() in float64.
double activate_exact(const ActivationFn& fn, double gate, double up) {
  const double limit = fn.limit, b = fn.beta, lb = fn.linear_beta;
  // Written so that a NaN passes, as activate() does it.
  const auto at_most = [&](double x) { return x > limit ? limit : x; };
  const auto clamped = [&](double x) { return x < -limit ? -limit : at_most(x); };
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
      return gate / (1 + std::exp(-gate)) * up;
    case ActivationKind::kSwigluLimit: {
      const double g = at_most(gate);
      return g / (1 + std::exp(-g)) * clamped(up);
    }
    case ActivationKind::kSwigluOai: {
      const double g = at_most(gate);
      return g / (1 + std::exp(-fn.alpha * g)) * (clamped(up) + 1);
    }
    case ActivationKind::kSitu:
      return b * std::tanh(gate / b) / (1 + std::exp(-gate)) * (lb * std::tanh(up / lb));
  }
  fail(ErrorCode::kInternal, "activation {} does not exist", static_cast<int>(fn.kind));
}

/// h of `count` elements, as the arithmetic of T has it.
template <class T>
void activate_all(const ActivationFn& fn, const double* gate, const double* up, std::size_t count,
                  double* h) {
  for (std::size_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      h[i] = activate(fn, static_cast<float>(gate[i]), static_cast<float>(up[i]));
    } else {
      h[i] = activate_exact(fn, gate[i], up[i]);
    }
  }
}

/// Variants that one call of multiply<T>() can serve together.
template <class V>
std::vector<V> select(const std::set<V>& wanted, bool original, bool float32) {
  std::vector<V> chosen;
  for (const V& v : wanted) {
    if (v.original_weights == original && v.float32_sums == float32) chosen.push_back(v);
  }
  return chosen;
}

}  // namespace

RowPlan plan_rows(const Workload& tokens, int num_experts) {
  RowPlan plan;
  const auto topk = static_cast<std::size_t>(tokens.num_topk);
  std::vector<std::vector<RowPlan::Row>> by_expert(static_cast<std::size_t>(num_experts));
  for (std::size_t i = 0; i < tokens.topk_idx.size(); ++i) {
    const std::int32_t expert = tokens.topk_idx[i];
    if (expert == -1) continue;
    check_argument(expert >= 0 && expert < num_experts,
                   "topk_idx[{}, {}] = {} but the layer has {} experts", i / topk, i % topk, expert,
                   num_experts);
    by_expert[static_cast<std::size_t>(expert)].push_back(
        {static_cast<int>(i / topk), static_cast<int>(i % topk)});
  }
  plan.row_of.assign(tokens.topk_idx.size(), -1);
  plan.expert_begin.push_back(0);
  for (const auto& rows : by_expert) {
    for (const RowPlan::Row& row : rows) {
      plan.row_of[static_cast<std::size_t>(row.token) * topk + static_cast<std::size_t>(row.slot)] =
          static_cast<int>(plan.rows.size());
      plan.rows.push_back(row);
    }
    plan.expert_begin.push_back(static_cast<int>(plan.rows.size()));
  }
  return plan;
}

Evaluator::Evaluator(const LayerSource& source, const Workload& tokens, ThreadPool& pool)
    : source_(&source),
      tokens_(&tokens),
      pool_(&pool),
      plan_(plan_rows(tokens, source.geometry().num_experts)) {}

void Evaluator::set_inputs(const std::vector<Cast>& casts, std::vector<Gemm1Row> inputs) {
  SLUICE_ASSERT(inputs.size() == static_cast<std::size_t>(tokens_->num_tokens));
  inputs_[casts] = std::move(inputs);
}

template <class T>
void Evaluator::gemm1_of_expert(int expert, const std::vector<Gemm1Variant>& variants,
                                const SourceMatrix& gate, const SourceMatrix& up) {
  if (variants.empty()) return;
  const auto e = static_cast<std::size_t>(expert);
  const int begin = plan_.expert_begin[e], num_rows = plan_.expert_begin[e + 1] - begin;
  const int hidden = source_->geometry().hidden;
  const auto width = static_cast<std::size_t>(source_->geometry().intermediate);
  Columns<T> columns(hidden, num_rows * static_cast<int>(variants.size()));
  int column = 0;
  for (const Gemm1Variant& variant : variants) {
    for (int r = 0; r < num_rows; ++r, ++column) {
      const auto token =
          static_cast<std::size_t>(plan_.rows[static_cast<std::size_t>(begin + r)].token);
      if (!variant.casts1.empty()) {
        fill_column(columns, column, inputs_.at(variant.casts1)[token]);
        continue;
      }
      const std::uint16_t* x = &tokens_->x[token * static_cast<std::size_t>(hidden)];
      for (int k = 0; k < hidden; ++k) columns.value(k, column) = bf16_to_float(x[k]);
    }
  }
  std::vector<double> c_gate(static_cast<std::size_t>(column) * width), c_up(c_gate.size());
  const bool original = variants.front().original_weights;
  multiply(gate, original, columns, c_gate.data(), *pool_);
  multiply(up, original, columns, c_up.data(), *pool_);
  const std::size_t block = static_cast<std::size_t>(num_rows) * width;
  for (std::size_t v = 0; v < variants.size(); ++v) {
    activate_all<T>(source_->geometry().activation, &c_gate[v * block], &c_up[v * block], block,
                    &h_.at(variants[v])[static_cast<std::size_t>(begin) * width]);
  }
}

void Evaluator::run_gemm1(const std::set<Gemm1Variant>& wanted, const Progress& progress) {
  const auto width = static_cast<std::size_t>(source_->geometry().intermediate);
  for (const Gemm1Variant& variant : wanted) h_[variant].resize(plan_.rows.size() * width);
  const int num_experts = source_->geometry().num_experts;
  for (int e = 0; e < num_experts; ++e) {
    if (progress) progress(static_cast<double>(e) / num_experts);
    const auto i = static_cast<std::size_t>(e);
    if (plan_.expert_begin[i] == plan_.expert_begin[i + 1]) continue;
    const SourceMatrix gate = source_->matrix(e, MatrixRole::kGate);
    const SourceMatrix up = source_->matrix(e, MatrixRole::kUp);
    gemm1_of_expert<double>(e, select(wanted, false, false), gate, up);
    gemm1_of_expert<float>(e, select(wanted, false, true), gate, up);
    gemm1_of_expert<double>(e, select(wanted, true, false), gate, up);
  }
}

template <class T>
void Evaluator::gemm2_of_expert(int expert, const std::vector<Variant>& variants, float s2,
                                const SourceMatrix& down) {
  if (variants.empty()) return;
  const auto e = static_cast<std::size_t>(expert);
  const int begin = plan_.expert_begin[e], num_rows = plan_.expert_begin[e + 1] - begin;
  const int intermediate = source_->geometry().intermediate;
  const auto width = static_cast<std::size_t>(intermediate);
  Columns<T> columns(intermediate, num_rows * static_cast<int>(variants.size()));
  int column = 0;
  std::vector<float> narrow(width);
  for (const Variant& variant : variants) {
    for (int r = 0; r < num_rows; ++r, ++column) {
      const double* h = &h_.at(variant)[static_cast<std::size_t>(begin + r) * width];
      if (variant.cast2 == Cast::kNone) {
        for (int k = 0; k < intermediate; ++k) columns.value(k, column) = static_cast<T>(h[k]);
        continue;
      }
      for (std::size_t k = 0; k < width; ++k) narrow[k] = static_cast<float>(h[k]);
      const Gemm1Row row = gemm2_row(variant.cast2, s2, narrow);
      cast2_counts_[variant] += row.counts;
      fill_column(columns, column, row);
    }
  }
  const auto hidden = static_cast<std::size_t>(source_->geometry().hidden);
  std::vector<double> c2(static_cast<std::size_t>(column) * hidden);
  multiply(down, variants.front().original_weights, columns, c2.data(), *pool_);
  const double* next = c2.data();
  for (const Variant& variant : variants) {
    for (int r = 0; r < num_rows; ++r, next += hidden) add_row(variant, begin + r, next);
  }
}

void Evaluator::add_row(const Variant& variant, int row, const double* c2) {
  const auto hidden = static_cast<std::size_t>(source_->geometry().hidden);
  const auto [token, slot] = plan_.rows[static_cast<std::size_t>(row)];
  const auto t = static_cast<std::size_t>(token);
  if (variant.bf16_combine) {
    std::uint16_t* to = &payload_.at(variant)[static_cast<std::size_t>(row) * hidden];
    for (std::size_t i = 0; i < hidden; ++i) to[i] = bf16_from_float(static_cast<float>(c2[i]));
    return;
  }
  const double weight = tokens_->topk_weights[t * static_cast<std::size_t>(tokens_->num_topk) +
                                              static_cast<std::size_t>(slot)];
  double* to = &y_.at(variant)[t * hidden];
  for (std::size_t i = 0; i < hidden; ++i) to[i] += weight * c2[i];
}

/// The combine of the layer: float32 in order of k, rounded to bf16 once.
void Evaluator::combine_bf16(const Variant& variant) {
  const auto hidden = static_cast<std::size_t>(source_->geometry().hidden);
  const auto topk = static_cast<std::size_t>(tokens_->num_topk);
  const std::vector<std::uint16_t>& payload = payload_.at(variant);
  std::vector<double>& y = y_.at(variant);
  std::vector<float> sum(hidden);
  for (std::size_t t = 0; t < static_cast<std::size_t>(tokens_->num_tokens); ++t) {
    std::ranges::fill(sum, 0.0f);
    for (std::size_t k = 0; k < topk; ++k) {
      const int row = plan_.row_of[t * topk + k];
      if (row < 0) continue;
      const float weight = tokens_->topk_weights[t * topk + k];
      const std::uint16_t* from = &payload[static_cast<std::size_t>(row) * hidden];
      for (std::size_t i = 0; i < hidden; ++i) sum[i] += weight * bf16_to_float(from[i]);
    }
    for (std::size_t i = 0; i < hidden; ++i) {
      y[t * hidden + i] = bf16_to_float(bf16_from_float(sum[i]));
    }
  }
  payload_.erase(variant);
}

void Evaluator::run_gemm2(const std::set<Variant>& wanted, float s2, const Progress& progress) {
  const auto hidden = static_cast<std::size_t>(source_->geometry().hidden);
  for (const Variant& variant : wanted) {
    y_[variant].assign(static_cast<std::size_t>(tokens_->num_tokens) * hidden, 0.0);
    if (variant.bf16_combine) payload_[variant].resize(plan_.rows.size() * hidden);
    cast2_counts_[variant] = {};
  }
  const int num_experts = source_->geometry().num_experts;
  for (int e = 0; e < num_experts; ++e) {
    if (progress) progress(static_cast<double>(e) / num_experts);
    const auto i = static_cast<std::size_t>(e);
    if (plan_.expert_begin[i] == plan_.expert_begin[i + 1]) continue;
    const SourceMatrix down = source_->matrix(e, MatrixRole::kDown);
    gemm2_of_expert<double>(e, select(wanted, false, false), s2, down);
    gemm2_of_expert<float>(e, select(wanted, false, true), s2, down);
    gemm2_of_expert<double>(e, select(wanted, true, false), s2, down);
  }
  for (const Variant& variant : wanted) {
    if (variant.bf16_combine) combine_bf16(variant);
  }
}

}  // namespace sluice::accuracy
