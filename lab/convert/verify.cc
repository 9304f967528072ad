#include "convert/verify.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <mutex>

#include "checkpoint/expert_storage.h"
#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr std::int64_t kRowsPerTask = 16;

float scale_at(const QuantMatrix& m, std::int64_t n, std::int64_t k) {
  return scale_value(m.scales, n * m.scales.dim(1) + k / m.group_size);
}

std::array<const QuantMatrix*, 3> matrices_of(const Expert& expert) {
  return {&expert.gate, &expert.up, &expert.down};
}

class Verifier {
 public:
  Verifier(const CheckpointData& source, const CheckpointData& result, bool is_requantized,
           ThreadPool& pool)
      : source_(source), result_(result), is_requantized_(is_requantized), pool_(pool) {}

  void check_expert(int layer, int expert) {
    layer_ = layer, expert_ = expert;
    ExpertStorage storage;
    const Expert made = result_.load_expert(layer, expert, storage);
    const auto layouts = matrix_layouts(source_.geometry());
    if (!is_requantized_) {
      const Expert given = source_.load_expert(layer, expert, storage);
      for (std::size_t i = 0; i < layouts.size(); ++i) {
        check_exact(layouts[i], *matrices_of(given)[i], *matrices_of(made)[i]);
      }
    } else {
      for (std::size_t i = 0; i < layouts.size(); ++i) {
        weights_.resize(static_cast<std::size_t>(layouts[i].n * layouts[i].k));
        source_.load_floats(layer, expert, layouts[i], weights_);
        check_rounded(layouts[i], *matrices_of(made)[i]);
      }
    }
    release(source_);
    release(result_);
  }

  void check_input_scales(int layer) const {
    const auto given = source_.input_scales(layer), made = result_.input_scales(layer);
    SLUICE_ASSERT(given.size() == made.size());
    for (std::size_t e = 0; e < given.size(); ++e) {
      for (const auto member : {&InputScales::w1, &InputScales::w3, &InputScales::w2}) {
        if (std::bit_cast<std::uint32_t>(given[e].*member) ==
            std::bit_cast<std::uint32_t>(made[e].*member)) {
          continue;
        }
        fail(ErrorCode::kCorruptFile,
             "verification: layer {}, expert {}: input scale {} in the source, {} in the result",
             layer, e, given[e].*member, made[e].*member);
      }
    }
  }

  [[nodiscard]] Verification take() {
    const double total = sum_squares_ > 0 ? std::sqrt(sum_errors_ / sum_squares_) : 0;
    result_so_far_.relative_error = total;
    return result_so_far_;
  }

 private:
  template <class Row>
  void for_each_row(std::int64_t n, Row&& row) {
    pool_.for_each_task((n + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t task, int) {
      const std::int64_t end = std::min(n, (task + 1) * kRowsPerTask);
      for (std::int64_t i = task * kRowsPerTask; i < end; ++i) row(i);
    });
  }

  void check_exact(const MatrixLayout& layout, const QuantMatrix& given, const QuantMatrix& made) {
    SLUICE_ASSERT(given.group_size == made.group_size && given.format == made.format);
    const std::int64_t group = given.group_size;
    const auto* a = given.codes.as<std::uint8_t>();
    const auto* b = made.codes.as<std::uint8_t>();
    for_each_row(layout.n, [&](std::int64_t n) {
      for (std::int64_t k = 0; k < layout.k; k += group) {
        // The same codes times the same scale are the same weights.
        const std::int64_t first = (n * layout.k + k) / 2;
        if (std::bit_cast<std::uint32_t>(scale_at(given, n, k)) ==
                std::bit_cast<std::uint32_t>(scale_at(made, n, k)) &&
            std::memcmp(a + first, b + first, static_cast<std::size_t>(group / 2)) == 0) {
          continue;
        }
        for (std::int64_t i = k; i < k + group; ++i) check_weight(layout, given, made, n, i);
      }
    });
    result_so_far_.weights_compared += layout.n * layout.k;
    if (!given.has_bias()) return;
    for (std::int64_t n = 0; n < layout.n; ++n) {
      const float x = given.bias.as<float>()[n], y = made.bias.as<float>()[n];
      if (std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y)) continue;
      fail(ErrorCode::kCorruptFile,
           "verification: the bias of {} [{}] is {} in the source, {} in "
           "the result",
           matrix_name(layout), n, x, y);
    }
  }

  void check_weight(const MatrixLayout& layout, const QuantMatrix& given, const QuantMatrix& made,
                    std::int64_t n, std::int64_t k) const {
    const auto value = [&](const QuantMatrix& m) {
      return code_value(m.format, m.codes.as<std::uint8_t>(), n * layout.k + k) * scale_at(m, n, k);
    };
    const float a = value(given), b = value(made);
    if (std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b)) return;
    fail(ErrorCode::kCorruptFile, "verification: {} is {} in the source, {} in the result",
         weight_name(layout, n, k), a, b);
  }

  void check_rounded(const MatrixLayout& layout, const QuantMatrix& made) {
    // Sums of whole rows in order: the same bits however many threads there are.
    std::vector<double> errors(static_cast<std::size_t>(layout.n)), squares(errors.size());
    for_each_row(layout.n, [&](std::int64_t n) {
      const auto row = static_cast<std::size_t>(n);
      for (std::int64_t k = 0; k < layout.k; ++k) {
        const std::int64_t i = n * layout.k + k;
        const double w = weights_[static_cast<std::size_t>(i)];
        const int code = unpack_int4(made.codes.as<std::uint8_t>(), i);
        const double scale = scale_at(made, n, k);
        const double error = w - code * scale;
        const bool is_clipped = (code == 7 && error > 0) || (code == -8 && error < 0);
        // The quotient w / s was rounded to float32 before it was rounded to a code.
        if (!is_clipped && !(std::fabs(error) <= 0.5 * scale * (1 + 1e-6))) {
          fail(ErrorCode::kCorruptFile,
               "verification: {} is {} in the source and {} * {} in the result, more than half a "
               "step away",
               weight_name(layout, n, k), w, code, scale);
        }
        errors[row] += error * error;
        squares[row] += w * w;
      }
    });
    double error = 0, square = 0;
    for (std::size_t i = 0; i < errors.size(); ++i) error += errors[i], square += squares[i];
    sum_errors_ += error, sum_squares_ += square;
    result_so_far_.weights_compared += layout.n * layout.k;
    const double relative = square > 0 ? std::sqrt(error / square) : 0;
    if (relative > result_so_far_.worst_relative_error) {
      result_so_far_.worst_relative_error = relative;
      result_so_far_.worst_matrix = matrix_name(layout);
    }
  }

  /// In the checkpoint's own spelling: "model.layers.3.mlp.experts.5.up_proj".
  [[nodiscard]] std::string matrix_name(const MatrixLayout& matrix) const {
    return source_.index.spelling.name(layer_, expert_, matrix.stem());
  }
  /// The same with the weight's place: "model.layers.3.mlp.experts.5.up_proj [7, 130]".
  [[nodiscard]] std::string weight_name(const MatrixLayout& matrix, std::int64_t n,
                                        std::int64_t k) const {
    return fmt::format("{} [{}, {}]", matrix_name(matrix), n, k);
  }

  /// Pages of mapped files that were read for this expert.
  void release(const CheckpointData& data) const {
    for (const auto& part :
         data.layer_tensors(layer_).experts[static_cast<std::size_t>(expert_)].parts) {
      MappedFile::release(part.tensor.bytes());
    }
  }

  const CheckpointData& source_;
  const CheckpointData& result_;
  bool is_requantized_;
  ThreadPool& pool_;
  int layer_ = 0, expert_ = 0;
  std::vector<float> weights_;
  double sum_errors_ = 0, sum_squares_ = 0;
  Verification result_so_far_;
};

void check_geometry(const ModelGeometry& a, const ModelGeometry& b) {
  if (a.num_experts == b.num_experts && a.num_topk == b.num_topk && a.hidden == b.hidden &&
      a.intermediate == b.intermediate && a.token_width() == b.token_width() &&
      a.inner_width() == b.inner_width() && a.has_bias == b.has_bias &&
      a.routed_scaling_factor == b.routed_scaling_factor) {
    return;
  }
  fail(ErrorCode::kCorruptFile, "verification: the result's config.json has other sizes");
}

void check_activation_of(int layer, const CheckpointData& source, const CheckpointData& result) {
  const ActivationFn &a = source.config.activations.of(layer),
                     &b = result.config.activations.of(layer);
  if (a == b) return;
  fail(ErrorCode::kCorruptFile, "verification: layer {} has the activation {}, its source {}",
       layer, to_string(b), to_string(a));
}

}  // namespace

Verification verify_result(const CheckpointData& source, const CheckpointData& result,
                           const VerifySpec& spec, ThreadPool& pool,
                           const std::function<void(double)>& report) {
  check_geometry(source.geometry(), result.geometry());
  Verifier verifier(source, result, spec.is_requantized, pool);
  const int num_experts = source.geometry().num_experts;
  const double total = static_cast<double>(spec.layers.size()) * num_experts;
  double done = 0;
  for (const int layer : spec.layers) {
    result.check_layer(layer);
    check_activation_of(layer, source, result);
    if (spec.expects_input_scales) verifier.check_input_scales(layer);
    for (int e = 0; e < num_experts; ++e) {
      verifier.check_expert(layer, e);
      report(++done / total);
    }
  }
  return verifier.take();
}

}  // namespace sluice
