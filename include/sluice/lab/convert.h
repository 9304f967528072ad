// convert.h - from one published checkpoint layout to another.
//
//   FROM (any of seven layouts) --expert by expert--> .TO.converting/ --verified--> TO
//                                                       |
//                                 journal of finished experts: an interrupted run goes on
//
// Experts of 4 bits keep their codes and scales: dequantized(source) == dequantized(result), bit
// for bit, and what the target cannot represent is refused by name. FP8 and BF16 experts are
// quantized by a rule that the caller states, and so is, if asked for, INT4 that cannot be kept, or
// MXFP4 that is to become INT4. The bytes of the result depend on the source and the options alone,
// not on interruptions, threads or the order of the work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/tensor.h"

namespace sluice {

/// How a group of float weights gets its scale s; codes are round(w / s), ties to even, in [-8, 7],
/// with s as it is stored.
enum class ScaleRule {
  kAmax7,  ///< s = amax / 7: nothing is clipped, -8 is never used.
  kAmax8,  ///< s = amax / 8: a finer step; a positive amax is clipped to 7.
  kMse,    ///< The s in [amax / 16, amax / 6], of those that can be stored, with the least sum of
           ///< squared errors.
};

/// "amax7", "amax8", "mse"
[[nodiscard]] const char* to_string(ScaleRule rule) noexcept;
/// Throws: kInvalidArgument listing the names.
[[nodiscard]] ScaleRule parse_scale_rule(const std::string& name);

struct ConvertOptions {
  std::filesystem::path from;
  std::filesystem::path to;  ///< Must be absent or empty.
  std::string format;        ///< "w4afp8", "compressed-tensors" or "deepseek-fp4"
  /// Must be given if the source's experts are floats. If they are INT4, codes and scales are kept
  /// and a rule is refused, except where they cannot be kept: groups of another size, or a
  /// pre_quant_scale that cannot be folded in exactly. The rule then quantizes the dequantized
  /// weights anew, a second rounding. If they are MXFP4, they stay so without a rule, and become
  /// INT4 by one.
  std::optional<ScaleRule> scale_rule = {};
  /// Of what is quantized: 128 if absent, and in compressed-tensors what an INT4 source has.
  std::optional<int> group_size = {};
  /// float32 or bfloat16. Absent: INT4 experts keep theirs; floats get float32 in w4afp8 and
  /// bfloat16 in compressed-tensors. INT4 scales that bfloat16 does not hold exactly are refused.
  std::optional<DType> scale_dtype = {};
  std::vector<int> layers = {};  ///< What the result holds; empty = all layers with experts.
  /// The experts of each layer that this run converts; the result is complete, and takes its place,
  /// when runs have converted all of them. Runs of one host may overlap and work side by side: the
  /// last of those that have made everything verifies the result, while others wait for it.
  int first_expert = 0;
  int num_experts = 0;             ///< 0 = up to the last.
  bool experts_only = false;       ///< Leave out all other tensors and files of the model.
  bool drop_input_scales = false;  ///< Leave out static activation scales.
  bool verify = true;              ///< Read the result back and compare it with the source.
  std::size_t max_shard_bytes = std::size_t{1} << 32;
};

struct ConvertReport {
  std::string source_format, source_evidence;
  std::string format;
  bool is_requantized = false;
  std::string requantized_because;  ///< Why codes could not be kept; empty of float sources.
  bool is_complete =
      false;  ///< The result is in its place. Otherwise experts of other runs remain.
  bool is_made_by_another = false;  ///< Complete, since a run at the same time finished it.
  ModelGeometry geometry;
  DType scale_dtype = DType::kFloat32;
  std::vector<int> layers;
  std::int64_t experts_written = 0;  ///< By this run.
  std::int64_t experts_kept = 0;     ///< Found finished, and intact.
  std::int64_t experts_left = 0;     ///< For other runs.
  std::int64_t other_tensors = 0;
  std::uint64_t bytes = 0;  ///< Of the result's tensors.
  int num_shards = 0;
  bool has_input_scales = false;
  bool is_verified = false;
  std::int64_t weights_compared = 0;
  /// Of requantized experts: ||w - dequantized|| / ||w||, over all and for the worst matrix.
  double relative_error = 0, worst_relative_error = 0;
  std::string worst_matrix;
};

/// Throws: kInvalidArgument, kUnsupported (what cannot be represented, by name), kCorruptFile (in
/// the source, and where verification fails), kIo.   Cost: memory of about one expert.
[[nodiscard]] ConvertReport convert_checkpoint(const ConvertOptions& options,
                                               const Progress& progress = {});

}  // namespace sluice
