#include "backend/check_experts.h"

#include "core/fail.h"

namespace sluice {
namespace {

void check_matrix(const QuantMatrix& m, std::int64_t n, std::int64_t k, int expert,
                  const char* name) {
  check_argument(m.codes.dtype == code_dtype(m.format) && m.codes.shape == Shape({n, k / 2}),
                 "expert {} {}: codes are {} {}, expected {} [{}, {}]", expert, name,
                 to_string(m.codes.dtype), m.codes.shape.to_string(),
                 to_string(code_dtype(m.format)), n, k / 2);
  check_argument(allows_group_size(m.format, m.group_size), "expert {} {}: group_size {} is {}",
                 expert, name, m.group_size, group_size_refusal(m.format));
  check_argument(allows_scale_dtype(m.format, m.scales.dtype),
                 "expert {} {}: scales are {}, expected {}", expert, name,
                 to_string(m.scales.dtype), scale_dtype_names(m.format));
  check_argument(m.scales.shape == Shape({n, k / m.group_size}),
                 "expert {} {}: scales are {}, expected [{}, {}]", expert, name,
                 m.scales.shape.to_string(), n, k / m.group_size);
  check_argument(!m.has_bias() || (m.bias.dtype == DType::kFloat32 && m.bias.shape == Shape({n})),
                 "expert {} {}: the bias is {} {}, expected float32 [{}]", expert, name,
                 to_string(m.bias.dtype), m.bias.shape.to_string(), n);
}

}  // namespace

void check_experts(const ExpertWeights& weights) {
  const std::int64_t hidden = weights.geometry.hidden, inter = weights.geometry.intermediate;
  for (std::size_t i = 0; i < weights.experts.size(); ++i) {
    const Expert& expert = weights.experts[i];
    const int index = weights.first_expert + static_cast<int>(i);
    for (const QuantMatrix* m : {&expert.gate, &expert.up, &expert.down}) {
      check_argument(m->has_bias() == weights.geometry.has_bias,
                     "expert {}: a matrix {} a bias, and the geometry says that {}", index,
                     m->has_bias() ? "has" : "lacks",
                     weights.geometry.has_bias ? "all have one" : "none has one");
    }
    check_matrix(expert.gate, inter, hidden, index, "gate");
    check_matrix(expert.up, inter, hidden, index, "up");
    check_matrix(expert.down, hidden, inter, index, "down");
  }
}

}  // namespace sluice
