// evaluator.h - the layer in float64, with a switch for every rounding.
//
//   x --casts1?--> GEMM1 (INT4 or original weights; float64 or float32 sums) --> h
//     --cast2?--> GEMM2 --> c2 --combine: float64, or bf16 payload, float32 sum, bf16 result--> y
//
// All variants of a token's row share each pass over the weights, which are read once per matrix.
#pragma once

#include <compare>
#include <map>
#include <set>
#include <span>
#include <vector>

#include "accuracy/casts.h"
#include "sluice/lab/accuracy.h"

namespace sluice {
class ThreadPool;
}

namespace sluice::accuracy {

/// Everything up to h.
struct Gemm1Variant {
  std::vector<Cast> casts1 = {};  ///< From x to GEMM1's input, as gemm1_casts() gives them.
  bool original_weights = false;
  bool float32_sums = false;
  auto operator<=>(const Gemm1Variant&) const = default;
};

/// Which roundings are on. Without any: exact arithmetic.
struct Variant : Gemm1Variant {
  Cast cast2 = Cast::kNone;
  bool bf16_combine = false;
  auto operator<=>(const Variant&) const = default;
};

/// A token's copies for its experts, ordered by (expert, token, slot).
struct RowPlan {
  struct Row {
    int token, slot;
  };
  std::vector<Row> rows;
  std::vector<int> expert_begin;  ///< [num_experts + 1]
  std::vector<int> row_of;        ///< [num_tokens * num_topk], -1 for an empty slot.
};
/// Throws: kInvalidArgument for an expert that the layer does not have.
[[nodiscard]] RowPlan plan_rows(const Workload& tokens, int num_experts);

class Evaluator {
 public:
  /// Borrows all three.
  Evaluator(const LayerSource& source, const Workload& tokens, ThreadPool& pool);

  [[nodiscard]] const RowPlan& rows() const noexcept { return plan_; }
  /// GEMM1's input by `casts`, one row per token; recipes with the same casts share an entry.
  void set_inputs(const std::vector<Cast>& casts, std::vector<Gemm1Row> inputs);
  [[nodiscard]] const std::vector<Gemm1Row>& inputs(const std::vector<Cast>& casts) const {
    return inputs_.at(casts);
  }

  /// Computes h of every row, for every variant wanted.
  void run_gemm1(const std::set<Gemm1Variant>& wanted, const Progress& progress);
  /// [rows, intermediate]
  [[nodiscard]] std::span<const double> h(const Gemm1Variant& variant) const {
    return h_.at(variant);
  }

  /// Computes y, for every variant wanted; `s2` is the static scale of GEMM2's input.
  void run_gemm2(const std::set<Variant>& wanted, float s2, const Progress& progress);
  /// [num_tokens, hidden]
  [[nodiscard]] std::span<const double> y(const Variant& variant) const { return y_.at(variant); }
  /// What cast2 did to the rows of a variant.
  [[nodiscard]] CastCounts cast2_counts(const Variant& variant) const {
    return cast2_counts_.at(variant);
  }

 private:
  template <class T>
  void gemm1_of_expert(int expert, const std::vector<Gemm1Variant>& variants,
                       const SourceMatrix& gate, const SourceMatrix& up);
  template <class T>
  void gemm2_of_expert(int expert, const std::vector<Variant>& variants, float s2,
                       const SourceMatrix& down);
  void add_row(const Variant& variant, int row, const double* c2);
  void combine_bf16(const Variant& variant);

  const LayerSource* source_;
  const Workload* tokens_;
  ThreadPool* pool_;
  RowPlan plan_;
  std::map<std::vector<Cast>, std::vector<Gemm1Row>> inputs_;
  std::map<Gemm1Variant, std::vector<double>> h_;
  std::map<Variant, std::vector<double>> y_;
  std::map<Variant, std::vector<std::uint16_t>> payload_;  // [rows, hidden] bf16
  std::map<Variant, CastCounts> cast2_counts_;
};

}  // namespace sluice::accuracy
