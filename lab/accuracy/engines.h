// engines.h - the digest that a real engine's GEMM1 input must have.
#pragma once

#include <cstdint>
#include <vector>

#include "accuracy/evaluator.h"

namespace sluice::accuracy {

/// Sum over rows of row_digest(), from `inputs` [num_tokens] by the scalar definition. Static
/// scales are no part of a row.
[[nodiscard]] std::uint64_t definition_digest(const RowPlan& plan, const Recipe& recipe,
                                              const std::vector<Gemm1Row>& inputs);

}  // namespace sluice::accuracy
