// Where weights come from: made up, so that their originals are known, or read from a checkpoint.
#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "core/counter_rng.h"
#include "core/fail.h"
#include "core/threads.h"
#include "sluice/lab/accuracy.h"
#include "sluice/lab/synthetic.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

/// Normal up to its fourth cumulant: the sum of four uniform values, its flat tails bent out.
float cheap_normal(std::uint64_t bits) {
  constexpr float kMean = 131070.0f, kDeviation = 37837.2f;  // 4 * 65535 / 2, 65536 * sqrt(4 / 12)
  constexpr float kBend = 0.018f;  // Brings the sum's kurtosis of 2.7 to 3.
  const auto sum = static_cast<float>((bits & 0xffff) + ((bits >> 16) & 0xffff) +
                                      ((bits >> 32) & 0xffff) + (bits >> 48));
  const float z = (sum - kMean) / kDeviation;
  return z * (1 + kBend * (z * z - 3));
}

struct MatrixMemory {
  std::vector<std::uint8_t> codes, powers;  // `powers`: e8m0 scales
  std::vector<float> scales, original;
  std::shared_ptr<const void> owner;
};

SourceMatrix as_source(std::shared_ptr<MatrixMemory> memory, const QuantMatrix& quantized) {
  const float* original = memory->original.data();
  return {.quantized = quantized, .original = original, .storage = std::move(memory)};
}

std::uint64_t matrix_stream(int expert, MatrixRole role) {
  return static_cast<std::uint64_t>(expert) * 3 + static_cast<std::uint64_t>(role);
}

class SyntheticSource final : public LayerSource {
 public:
  SyntheticSource(ModelGeometry geometry, std::uint64_t seed)
      : geometry_(std::move(geometry)),
        seed_(seed),
        pool_(static_cast<int>(available_cores().size()), available_cores()) {}

  [[nodiscard]] const ModelGeometry& geometry() const noexcept override { return geometry_; }
  [[nodiscard]] std::string original_kind() const override {
    return is_mxfp4() ? "normal weights, quantized to e2m1 with a power of two per group"
                      : "normal weights, quantized with amax / 7 per group";
  }

  [[nodiscard]] SourceMatrix matrix(int expert, MatrixRole role) const override {
    const bool is_down = role == MatrixRole::kDown;
    const std::int64_t n = is_down ? geometry_.hidden : geometry_.intermediate;
    const std::int64_t k = is_down ? geometry_.intermediate : geometry_.hidden;
    const std::int64_t groups = k / geometry_.group_size;
    auto memory = std::make_shared<MatrixMemory>();
    memory->codes.resize(static_cast<std::size_t>(n * k / 2));
    (is_mxfp4() ? memory->powers.resize(static_cast<std::size_t>(n * groups))
                : memory->scales.resize(static_cast<std::size_t>(n * groups)));
    memory->original.resize(static_cast<std::size_t>(n * k));
    const CounterRng rng(seed_, matrix_stream(expert, role));
    const auto deviation = static_cast<float>(1 / std::sqrt(static_cast<double>(k)));
    constexpr std::int64_t kRowsPerTask = 32;
    pool_.for_each_task((n + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t task, int) {
      const std::int64_t end = std::min(n, (task + 1) * kRowsPerTask) * groups;
      for (std::int64_t g = task * kRowsPerTask * groups; g < end; ++g) {
        fill_group(rng, g, deviation, *memory);
      }
    });
    const WeightFormat format = geometry_.weight_format;
    QuantMatrix quantized{.codes = {memory->codes.data(), code_dtype(format), Shape{n, k / 2}},
                          .scales = {memory->scales.data(), DType::kFloat32, Shape{n, groups}},
                          .group_size = geometry_.group_size,
                          .format = format};
    if (is_mxfp4()) {
      quantized.scales = {memory->powers.data(), DType::kFloat8E8M0, Shape{n, groups}};
    }
    return as_source(std::move(memory), quantized);
  }

 private:
  [[nodiscard]] bool is_mxfp4() const { return geometry_.weight_format == WeightFormat::kMxfp4; }

  /// One scale group: values, scale, codes.
  void fill_group(const CounterRng& rng, std::int64_t g, float deviation,
                  MatrixMemory& memory) const {
    const auto size = static_cast<std::size_t>(geometry_.group_size);
    const std::size_t begin = static_cast<std::size_t>(g) * size;
    float* const values = &memory.original[begin];
    float amax = 0;
    for (std::size_t i = 0; i < size; ++i) {
      values[i] = deviation * cheap_normal(rng.bits(begin + i));
      amax = std::max(amax, std::fabs(values[i]));
    }
    if (is_mxfp4()) return quantize_mxfp4(begin, amax, static_cast<std::size_t>(g), memory);
    const float scale = std::max(amax, 1e-20f) / 7;
    memory.scales[static_cast<std::size_t>(g)] = scale;
    const float inverse = 1 / scale;
    for (std::size_t i = 0; i < size; i += 2) {
      const auto lo = static_cast<int>(std::nearbyint(values[i] * inverse));
      const auto hi = static_cast<int>(std::nearbyint(values[i + 1] * inverse));
      memory.codes[(begin + i) / 2] = static_cast<std::uint8_t>((std::clamp(lo, -7, 7) & 0xf) |
                                                                (std::clamp(hi, -7, 7) & 0xf) << 4);
    }
  }

  /// The scale is the power of two that brings amax into [4, 8), as the OCP specification has it.
  void quantize_mxfp4(std::size_t begin, float amax, std::size_t g, MatrixMemory& memory) const {
    const int exponent = std::ilogb(std::max(amax, 1e-20f)) - 2;
    memory.powers[g] = static_cast<std::uint8_t>(exponent + 127);
    for (std::size_t i = begin; i < begin + static_cast<std::size_t>(geometry_.group_size);
         i += 2) {
      const auto code = [&](float value) { return e2m1_from_float(std::ldexp(value, -exponent)); };
      memory.codes[i / 2] =
          static_cast<std::uint8_t>(code(memory.original[i]) | code(memory.original[i + 1]) << 4);
    }
  }

  ModelGeometry geometry_;
  std::uint64_t seed_;
  mutable ThreadPool pool_;
};

/// A value that rounds to the code worth `code`, in units of the scale; the outermost codes are
/// reached from inside.
float value_in_cell(WeightFormat format, double code, double uniform) {
  switch (format) {
    case WeightFormat::kInt4:
      if (code >= 7) return static_cast<float>(code - uniform / 2);
      if (code <= -7) return static_cast<float>(code + uniform / 2);
      return static_cast<float>(code + (uniform - 0.5));
    case WeightFormat::kMxfp4: {
      // Halfway to the neighbours; they are 0.5, 1 or 2 apart.
      const double size = std::fabs(code);
      if (size == 0) return static_cast<float>((uniform - 0.5) / 2);
      const double below = size <= 2 ? 0.25 : size <= 4 ? 0.5 : 1;
      const double above = size < 2 ? 0.25 : size < 4 ? 0.5 : size < 6 ? 1 : 0;
      return static_cast<float>(std::copysign(size - below + uniform * (below + above), code));
    }
  }
  fail(ErrorCode::kInternal, "weight format {} does not exist", static_cast<int>(format));
}

class CheckpointSource final : public LayerSource {
 public:
  CheckpointSource(const Checkpoint& checkpoint, int layer, std::uint64_t seed,
                   const Checkpoint* original)
      : weights_(checkpoint.load_experts(layer, 0, checkpoint.geometry().num_experts)),
        geometry_(weights_.geometry),
        layer_(layer),
        seed_(seed),
        original_(original),
        pool_(static_cast<int>(available_cores().size()), available_cores()) {}

  [[nodiscard]] const ModelGeometry& geometry() const noexcept override { return geometry_; }
  [[nodiscard]] std::string original_kind() const override {
    if (original_) return fmt::format("{} ({})", original_->path().string(), original_->format());
    return "drawn from the codes' rounding cells (the checkpoint has no originals)";
  }

  [[nodiscard]] SourceMatrix matrix(int expert, MatrixRole role) const override {
    const QuantMatrix& m = weights_.experts[static_cast<std::size_t>(expert)].matrix(role);
    auto memory = std::make_shared<MatrixMemory>();
    memory->owner = weights_.storage;
    memory->original.resize(static_cast<std::size_t>(m.n() * m.k()));
    // What is padded stays 0: no weight of the model is there.
    const bool is_down = role == MatrixRole::kDown;
    const std::int64_t own_n = is_down ? geometry_.token_width() : geometry_.inner_width();
    const std::int64_t own_k = is_down ? geometry_.inner_width() : geometry_.token_width();
    if (original_) {
      std::vector<float> own(static_cast<std::size_t>(own_n * own_k));
      original_->load_floats(layer_, expert, role, own);
      for (std::int64_t n = 0; n < own_n; ++n) {
        std::copy_n(own.begin() + n * own_k, own_k, memory->original.begin() + n * m.k());
      }
      return as_source(std::move(memory), m);
    }
    const CounterRng rng(seed_, matrix_stream(expert, role));
    pool_.for_each_task(own_n, [&](std::int64_t n, int) {
      const std::uint8_t* codes = m.codes.as<std::uint8_t>() + n * m.codes.dim(1);
      for (std::int64_t k = 0; k < own_k; ++k) {
        const std::int64_t s = n * m.scales.dim(1) + k / m.group_size;
        const auto i = static_cast<std::uint64_t>(n * m.k() + k);
        memory->original[i] =
            value_in_cell(m.format, code_value(m.format, codes, k), rng.uniform(i)) *
            scale_value(m.scales, s);
      }
    });
    return as_source(std::move(memory), m);
  }

 private:
  ExpertWeights weights_;
  ModelGeometry geometry_;
  int layer_;
  std::uint64_t seed_;
  const Checkpoint* original_;
  mutable ThreadPool pool_;
};

void check_original(const Checkpoint& checkpoint, const Checkpoint& original) {
  const ModelGeometry &a = checkpoint.geometry(), &b = original.geometry();
  check_argument(a.num_experts == b.num_experts && a.token_width() == b.token_width() &&
                     a.inner_width() == b.inner_width(),
                 "{}: {} experts, hidden {}, intermediate {}; its original {} has {}, {} and {}",
                 checkpoint.path().string(), a.num_experts, a.token_width(), a.inner_width(),
                 original.path().string(), b.num_experts, b.token_width(), b.inner_width());
}

}  // namespace

std::unique_ptr<LayerSource> make_synthetic_source(const ModelGeometry& geometry,
                                                   std::uint64_t seed) {
  const auto is_width = [](int n) { return n > 0 && n % kActivationGroup == 0; };
  check_argument(is_width(geometry.hidden) && is_width(geometry.intermediate),
                 "hidden {} and intermediate {} must be positive multiples of {}", geometry.hidden,
                 geometry.intermediate, int{kActivationGroup});
  check_argument(!geometry.has_bias && geometry.token_width() == geometry.hidden &&
                     geometry.inner_width() == geometry.intermediate,
                 "{}: made-up weights have no biases and no widths that are padded; write a "
                 "checkpoint (sluice make-checkpoint) and give it instead",
                 geometry.name);
  return std::make_unique<SyntheticSource>(geometry, seed);
}

std::unique_ptr<LayerSource> make_checkpoint_source(const Checkpoint& checkpoint, int layer,
                                                    std::uint64_t seed,
                                                    const Checkpoint* original) {
  if (original) check_original(checkpoint, *original);
  return std::make_unique<CheckpointSource>(checkpoint, layer, seed, original);
}

}  // namespace sluice
