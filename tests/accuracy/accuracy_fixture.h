// accuracy_fixture.h - a small layer, its weights as the reference wants them, and its tokens.
#pragma once

#include <cmath>
#include <vector>

#include "sluice/lab/accuracy.h"
#include "sluice/lab/reference.h"
#include "sluice/quant.h"

namespace sluice::testing {

inline ModelGeometry accuracy_geometry() {
  return {.name = "test", .num_experts = 6, .num_topk = 3, .hidden = 384, .intermediate = 256};
}

/// Everything a source has, at once.
struct WholeLayer {
  std::vector<SourceMatrix> matrices;  ///< [expert * 3 + role], kept alive.
  ExpertWeights weights;

  explicit WholeLayer(const LayerSource& source) {
    weights.geometry = source.geometry();
    for (int e = 0; e < source.geometry().num_experts; ++e) {
      for (const MatrixRole role : {MatrixRole::kGate, MatrixRole::kUp, MatrixRole::kDown}) {
        matrices.push_back(source.matrix(e, role));
      }
      const auto* m = &matrices[static_cast<std::size_t>(e) * 3];
      weights.experts.push_back({m[0].quantized, m[1].quantized, m[2].quantized});
    }
  }
};

/// w[n, k] of a matrix: code times scale, or the original.
inline double weight_at(const SourceMatrix& m, bool original, std::int64_t n, std::int64_t k) {
  if (original) return static_cast<double>(m.original[n * m.quantized.k() + k]);
  const QuantMatrix& q = m.quantized;
  const float scale = scale_value(q.scales, n * q.scales.dim(1) + k / q.group_size);
  return static_cast<double>(
             code_value(q.format, q.codes.as<std::uint8_t>() + n * q.codes.dim(1), k)) *
         scale;
}

inline std::vector<double> naive_multiply(const SourceMatrix& m, bool original,
                                          const std::vector<double>& v) {
  std::vector<double> out(static_cast<std::size_t>(m.quantized.n()));
  for (std::size_t n = 0; n < out.size(); ++n) {
    for (std::size_t k = 0; k < v.size(); ++k) {
      out[n] +=
          weight_at(m, original, static_cast<std::int64_t>(n), static_cast<std::int64_t>(k)) * v[k];
    }
  }
  return out;
}

/// One token through the layer without any rounding, by plain loops.
inline std::vector<double> naive_token(const WholeLayer& layer, const Workload& tokens,
                                       std::size_t token, bool original) {
  const auto hidden = static_cast<std::size_t>(tokens.hidden);
  const auto topk = static_cast<std::size_t>(tokens.num_topk);
  std::vector<double> x(hidden), y(hidden);
  for (std::size_t i = 0; i < hidden; ++i) x[i] = bf16_to_float(tokens.x[token * hidden + i]);
  for (std::size_t k = 0; k < topk; ++k) {
    const std::int32_t e = tokens.topk_idx[token * topk + k];
    if (e < 0) continue;
    const SourceMatrix* m = &layer.matrices[static_cast<std::size_t>(e) * 3];
    const auto gate = naive_multiply(m[0], original, x), up = naive_multiply(m[1], original, x);
    std::vector<double> h(gate.size());
    for (std::size_t i = 0; i < h.size(); ++i) h[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
    const auto c2 = naive_multiply(m[2], original, h);
    for (std::size_t i = 0; i < hidden; ++i) {
      y[i] += static_cast<double>(tokens.topk_weights[token * topk + k]) * c2[i];
    }
  }
  return y;
}

}  // namespace sluice::testing
