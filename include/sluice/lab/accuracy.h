// accuracy.h - what every rounding of a recipe costs, for one layer and a set of tokens.
//
//   LayerSource --+
//                 +--> certify() --> Certificate: each rounding alone, all together, and the budget
//   TokenSuite  --+
//
// One float64 evaluator with a switch for each rounding (docs/accuracy.md has every definition).
// Errors are relative L2 norms, ||y - reference|| / ||reference||, unless a name says otherwise.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/lab/workload.h"
#include "sluice/recipe.h"

namespace sluice {

class Backend;

/// Tokens to judge recipes on, and those that static scales may be calibrated on.
struct TokenSuite {
  std::string name;
  Workload tokens;
  Workload calibration;  ///< Other tokens; none for a dump.
};

/// gaussian, student-t, outliers, massive, token-spread, dead-expert, one-hot.
[[nodiscard]] const std::vector<std::string>& suite_names();
/// Throws: kInvalidArgument listing the names.
[[nodiscard]] TokenSuite make_suite(std::string_view name, const ModelGeometry& geometry,
                                    std::int64_t num_tokens, std::uint64_t seed);

/// Reads a dump: a safetensors file with x [T, hidden] BF16 or F32 (rounded to bf16), topk_idx
/// [T, k] I32 or I64, topk_weights [T, k] F32.
/// Throws: kIo, kCorruptFile; kInvalidArgument naming tensor, shape or value that does not fit.
[[nodiscard]] TokenSuite read_dump(const std::filesystem::path& file,
                                   const ModelGeometry& geometry);
/// Writes what read_dump() reads. Throws: kIo.
void write_dump(const std::filesystem::path& file, const Workload& tokens);

/// One matrix of one expert; alive as long as `storage`.
struct SourceMatrix {
  QuantMatrix quantized;
  const float* original = nullptr;  ///< [n, k], or null where nothing is known of it.
  std::shared_ptr<const void> storage;
};

/// Weights of one layer, a matrix at a time. Threads: matrix() from one thread at a time.
class LayerSource {
 public:
  virtual ~LayerSource() = default;
  [[nodiscard]] virtual const ModelGeometry& geometry() const noexcept = 0;
  [[nodiscard]] virtual SourceMatrix matrix(int expert, MatrixRole role) const = 0;
  /// What `original` is, for reports.
  [[nodiscard]] virtual std::string original_kind() const = 0;
};

/// Normal weights of variance 1 / k, quantized with amax / 7 per group, or as MXFP4 by the power of
/// two that brings amax into [4, 8): the originals are known.
[[nodiscard]] std::unique_ptr<LayerSource> make_synthetic_source(const ModelGeometry& geometry,
                                                                 std::uint64_t seed);
/// A checkpoint's experts, and those of `original`, which it was quantized from: any layout, the
/// same sizes, borrowed. Without one, values drawn uniformly from each code's rounding cell (of
/// INT4 [w - scale / 2, w + scale / 2]), which quantize to these very codes, stand in their place.
/// Throws: as Checkpoint::load_experts(); kInvalidArgument for other sizes.
[[nodiscard]] std::unique_ptr<LayerSource> make_checkpoint_source(
    const Checkpoint& checkpoint, int layer, std::uint64_t seed,
    const Checkpoint* original = nullptr);

/// One approximation of a result against its reference.
struct ErrorNumbers {
  double relative_l2 = 0;
  double sqnr_db = 0;  ///< -20 log10(relative_l2)
  double worst_token_error = 0, p99_token_error = 0;
  std::int64_t worst_token = -1;
  double p99_channel_error = 0;
};

/// What e4m3 casts did to the values they met.
struct CastCounts {
  std::uint64_t values = 0;
  std::uint64_t saturated = 0;    ///< |x / scale| > 464, where rounding would leave +-448.
  std::uint64_t underflowed = 0;  ///< Not zero before, zero after.
};

/// Output errors with one rounding switched on, against exact arithmetic on the INT4 weights; the
/// weights' own against the original ones.
struct RoundingErrors {
  std::optional<double> weights;
  double activation1 = 0, activation2 = 0, accumulation = 0, combine = 0;
  double together = 0;    ///< The four above at once.
  double quadrature = 0;  ///< Root of the sum of their squares.
};

/// A real engine's output on the same tokens, beside the evaluator's.
struct EngineAgreement {
  bool same_bytes = false;  ///< GEMM1 read, byte for byte, what the scalar definition gives.
  ErrorNumbers output;      ///< Against exact arithmetic on the INT4 weights.
  /// ||y_engine - y_evaluator|| / ||exact||. The two relative errors differ by no more than this.
  double distance = 0;
  double limit = 0;  ///< engine_limit() of its device.
  /// As RecipeCertificate::added_percent, with this output in place of the evaluator's.
  std::optional<double> added_percent;
  [[nodiscard]] bool passed() const noexcept { return same_bytes && distance <= limit; }
};

struct RecipeCertificate {
  LayerRecipe recipe;                      ///< Without static scales if it was refused.
  std::string refused;                     ///< Why it was not evaluated; empty if it was.
  ErrorNumbers activation1;                ///< Input of GEMM1 against x.
  ErrorNumbers output;                     ///< Against exact arithmetic on the INT4 weights.
  std::optional<ErrorNumbers> total;       ///< Against the original weights, exact arithmetic.
  std::optional<ErrorNumbers> total_bf16;  ///< The same if GEMM1 took x unquantized.
  /// What the FP8 activation into GEMM1 adds to the layer's total error: 100 * (a / b - 1), where a
  /// and b are the root sums of squares of the weights' error and of all other roundings, with and
  /// without that one. The two are independent; taking their measured sum instead (total over
  /// total_bf16) gives the same number plus the noise of their chance correlation.
  std::optional<double> added_percent;
  CastCounts cast1, cast2;
  RoundingErrors roundings;
  std::vector<double> token_errors;       ///< [num_tokens] of `output`.
  std::vector<double> channel_errors;     ///< [hidden] of `output`.
  std::optional<EngineAgreement> engine;  ///< If AccuracyConfig::engine could run this recipe.
};

/// Static scales against what the suite's tokens really contain.
struct ScaleSafety {
  struct PerExpert {
    std::int64_t rows = 0;
    double amax1 = 0, amax2 = 0;            ///< Largest input of GEMM1, of GEMM2.
    double clip_rate1 = 0, clip_rate2 = 0;  ///< Under the layer's scale, which every expert has.
    double scale1 = 0, scale2 = 0;  ///< The checkpoint's for this very expert; 0 if it has none.
    double own_headroom1 = 0, own_headroom2 = 0;  ///< 448 * scale / amax; 0 if either is 0.
  };
  std::string origin;  ///< "checkpoint", "calibration" or "none".
  StaticScales scales;
  double amax1 = 0, amax2 = 0;
  double headroom1 = 0, headroom2 = 0;    ///< 448 * scale / amax; below 448 / 464 values clip.
  double clip_rate1 = 0, clip_rate2 = 0;  ///< Share of values beyond 464 * scale.
  std::vector<PerExpert> experts;
  std::string recommendation;
};

struct SuiteCertificate {
  std::string name;
  std::int64_t num_tokens = 0, num_rows = 0;
  std::vector<RecipeCertificate> recipes;
  ScaleSafety safety;
};

/// One row as GEMM1 reads it: value k is e4m3 codes[k] * scales[k / 128], or codes[k] * scales[0].
struct Gemm1Row {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
  CastCounts counts;
};
/// How `recipe` turns x [hidden] into GEMM1's input: the scalar definition.
[[nodiscard]] Gemm1Row gemm1_row(const LayerRecipe& recipe, const std::uint16_t* x, int hidden);

using Gemm1Function =
    std::function<Gemm1Row(const LayerRecipe&, const std::uint16_t* x, int hidden)>;

/// Makes the backend of one rank; all ranks are threads of this process.
using BackendFactory = std::function<std::unique_ptr<Backend>(int rank, int num_ranks)>;
/// Backends that share one device of this kind.
[[nodiscard]] BackendFactory backends_on(Device::Kind kind);

/// How to run a layer for real.
struct EngineRanks {
  const Checkpoint* checkpoint = nullptr;  ///< Borrowed.
  int layer = 0;
  int num_ranks = 1;
  Mode mode = Mode::kLowLatency;
  BackendFactory make_backend = backends_on(Device::Kind::kHost);  ///< A test plants a fault here.
};

struct EngineOutcome {
  Device::Kind device = Device::Kind::kHost;
  std::vector<std::uint16_t> y;    ///< [num_tokens, hidden] bf16
  std::uint64_t gemm1_digest = 0;  ///< Of GEMM1's input bytes, over all ranks.
};
/// Runs `recipe` on tokens that are spread evenly over the ranks in order. Throws: as Engine.
[[nodiscard]] EngineOutcome run_engines(const EngineRanks& ranks, const Recipe& recipe,
                                        const Workload& tokens);
/// How far an engine's output may be from the evaluator's, both roundings of the same sums: see
/// docs/accuracy.md#engines.
[[nodiscard]] double engine_limit(Device::Kind kind);

struct AccuracyConfig {
  std::vector<Recipe> recipes;                ///< Empty: all.
  std::optional<StaticScales> static_scales;  ///< Empty: from the suite's calibration tokens.
  std::vector<InputScales> expert_scales;     ///< Of each expert, for ScaleSafety; may be empty.
  Gemm1Function gemm1 = gemm1_row;            ///< A test plants a fault here.
  /// Also runs every recipe whose static scales are the checkpoint's own. Borrowed; may be null.
  const EngineRanks* engine = nullptr;
  int num_threads = 0;  ///< 0: every core the process may run on.
  Progress progress;
};

/// Evaluates every recipe on the tokens of `suite`. Throws: kInvalidArgument for tokens that do not
/// fit the layer.   Cost: reads every matrix once; O(tokens * num_topk * recipes) layers of work.
[[nodiscard]] SuiteCertificate certify(const LayerSource& source, const TokenSuite& suite,
                                       const AccuracyConfig& config);

/// The gate over the suites of a certificate: `added_percent` of `recipe` against a budget; of the
/// engine, too, where one ran.
struct BudgetVerdict {
  Recipe recipe;
  double budget_percent = 0;
  double worst_percent = 0;
  std::string worst_suite;
  bool is_of_engine = false;  ///< `worst_percent` is of what ran, not of the definition.
  bool passed = false;
};
/// Throws: kInvalidArgument if no suite has a total error for `recipe`.
[[nodiscard]] BudgetVerdict judge_budget(const std::vector<SuiteCertificate>& suites,
                                         const Recipe& recipe, double budget_percent);

/// GEMM1's input bytes over all ranks of a real Engine, one digest per recipe.
struct IdentityProof {
  int num_ranks = 1;
  Mode mode = Mode::kLowLatency;
  std::int64_t num_tokens = 0;
  std::uint64_t direct = 0;       ///< FP8 on the wire, consumed as sent.
  std::uint64_t direct_bf16 = 0;  ///< BF16 on the wire, quantized by the receiver.
  std::uint64_t definition = 0;   ///< The scalar definition's bytes.
  /// Rows that experts received; without one the digests are 0, and there is nothing to compare.
  std::int64_t num_rows = -1;
  [[nodiscard]] bool passed() const noexcept {
    return direct == direct_bf16 && direct == definition && (direct != 0) == (num_rows != 0);
  }
};

/// Runs `direct` and its twin() `direct-bf16` on the tokens of all suites.   Throws: as Engine.
[[nodiscard]] IdentityProof prove_identity(const EngineRanks& ranks,
                                           const std::vector<TokenSuite>& suites,
                                           const Gemm1Function& gemm1 = gemm1_row);

}  // namespace sluice
