// checkpoint.h - routed experts of a published INT4 or MXFP4 checkpoint, as canonical tensors.
//
//   DIR/config.json, model-0000x-of-0000y.safetensors, model.safetensors.index.json, act_scales...
//        |  open(): headers only, every offset checked before a byte is trusted
//        v
//   Checkpoint --load_experts(layer, first, count)--> ExpertWeights: codes + group scales
//
// Only the bytes of the experts asked for are read (static scales excepted: they are the maximum
// over all experts of the layer). Formats: docs/checkpoints.md.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sluice/activation.h"
#include "sluice/error.h"
#include "sluice/quant.h"
#include "sluice/recipe.h"
#include "sluice/tensor.h"
#include "sluice/weight_format.h"

namespace sluice {

/// Sizes of one MoE layer and what the router does with it.
struct ModelGeometry {
  std::string name;  ///< Preset name, or model_type of config.json.
  int num_experts = 0;
  int num_topk = 0;
  int hidden = 0;        ///< Multiple of 128.
  int intermediate = 0;  ///< Multiple of 128.
  int group_size = 128;  ///< Weights per scale along K: 128 or 32.
  float routed_scaling_factor = 1.0f;
  WeightFormat weight_format = WeightFormat::kInt4;  ///< Of gate, up and down.
  ActivationFn activation = {};                      ///< Of gate and up.
  /// The model's own widths, where they are no multiples of 128: hidden and intermediate are then
  /// the next ones, and the channels between are zeros, which change no bit. 0: the same.
  int model_hidden = 0, model_intermediate = 0;
  bool has_bias = false;  ///< Each matrix has a bias for its outputs: QuantMatrix::bias.

  /// Channels of a token, and between gate, up and down, without what was padded.
  [[nodiscard]] int token_width() const noexcept {
    return model_hidden != 0 ? model_hidden : hidden;
  }
  [[nodiscard]] int inner_width() const noexcept {
    return model_intermediate != 0 ? model_intermediate : intermediate;
  }
  /// Sets all four of them for a model's widths.
  void set_widths(int token, int inner) noexcept {
    const auto padded = [](int width) {
      return (width + kActivationGroup - 1) / kActivationGroup * kActivationGroup;
    };
    hidden = padded(token), intermediate = padded(inner);
    model_hidden = token == hidden ? 0 : token;
    model_intermediate = inner == intermediate ? 0 : inner;
  }
};

/// Sizes and activation of a published model's layer. Throws: kInvalidArgument listing the names.
[[nodiscard]] ModelGeometry preset_geometry(const std::string& name);
[[nodiscard]] std::vector<std::string> preset_names();

/// One weight matrix of one expert: w[n, k] = value of codes[n, k] * scales[n, k / group_size].
struct QuantMatrix {
  TensorView codes;   ///< [N, K / 2] of code_dtype(format), even k in the low nibble.
  TensorView scales;  ///< [N, K / group_size], see allows_scale_dtype(); finite, > 0.
  int group_size = 128;
  WeightFormat format = WeightFormat::kInt4;
  /// Added to each output before anything else happens to it: [N] float32, or no shape and no data
  /// in models without one.
  TensorView bias = {};
  [[nodiscard]] bool has_bias() const noexcept { return bias.shape.rank() == 1; }
  [[nodiscard]] std::int64_t n() const noexcept { return codes.dim(0); }
  [[nodiscard]] std::int64_t k() const noexcept { return codes.dim(1) * 2; }
};

enum class MatrixRole { kGate, kUp, kDown };

struct Expert {
  QuantMatrix gate;  ///< [intermediate, hidden]
  QuantMatrix up;    ///< [intermediate, hidden]
  QuantMatrix down;  ///< [hidden, intermediate]

  [[nodiscard]] const QuantMatrix& matrix(MatrixRole role) const noexcept {
    return role == MatrixRole::kGate ? gate : role == MatrixRole::kUp ? up : down;
  }
};

/// Experts [first_expert, first_expert + experts.size()) of one layer. Views point into `storage`
/// (the mapped files), which stays alive as long as this value or a copy of it.
struct ExpertWeights {
  int layer = 0;
  int first_expert = 0;
  ModelGeometry geometry;
  std::vector<Expert> experts;
  std::optional<StaticScales> static_scales;  ///< Of the whole layer, if the checkpoint has them.
  std::shared_ptr<const void> storage;

  /// Codes and scales, in bytes.
  [[nodiscard]] std::size_t bytes() const noexcept;
  /// Tells the system that the mapped bytes of expert `index` are not needed again soon.
  void release_pages(int index) const noexcept;
};

/// That the scales of weights which no checkpoint brought are what QuantMatrix says, and below
/// 2^118. Throws: kInvalidArgument naming expert, matrix, place and value.
void check_scales(const ExpertWeights& weights);

/// Calibrated activation scales of one expert: amax / 448 of what each of its matrices is fed.
struct InputScales {
  float w1 = 0;  ///< gate_proj
  float w2 = 0;  ///< down_proj
  float w3 = 0;  ///< up_proj
};

/// Something in the checkpoint that loads but deserves a look.
struct CheckpointWarning {
  std::string tensor;  ///< Or a key: "config.json: num_nextn_predict_layers".
  std::string text;
  std::string kind = {};  ///< "layer-sizes", "input-scales-one"...: docs/checkpoints.md lists them.
  int count = 1;          ///< Places with a warning of this kind; the worst is `tensor`.
  bool is_note = false;   ///< True of what is normal in some published files.
  /// Of kind "unreadable": the code of the error.
  std::optional<ErrorCode> code = {};
};

/// What Checkpoint::review() found, and what it read for that.
struct CheckpointReview {
  std::vector<CheckpointWarning> warnings;  ///< At most one of each kind.
  int num_layers = 0;                       ///< Layers whose weights were looked at.
  int num_experts = 0;                      ///< Experts of all these layers together.
};

class Checkpoint {
 public:
  /// Reads config and safetensors headers. Throws: kIo; kCorruptFile (file, tensor, value, limit)
  /// for a file that breaks its own format; kUnsupported for a quantization method, a size or a key
  /// of config.json that is not supported, and for sound files that do not go together.
  [[nodiscard]] static Checkpoint open(const std::filesystem::path& dir);

  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint();

  [[nodiscard]] const std::filesystem::path& path() const noexcept;
  /// "w4afp8", "compressed-tensors", "deepseek-fp4", "gpt-oss", "angelslim", "modelopt-w4a8-awq",
  /// "fp8-block" or "bf16".
  [[nodiscard]] std::string format() const;
  [[nodiscard]] const std::string& format_evidence() const noexcept;  ///< Why we think so.
  /// Empty for fp8-block and bf16: such experts can be converted, but not loaded.
  [[nodiscard]] std::optional<WeightFormat> weight_format() const noexcept;
  /// The activation in it is that of the first layer with experts.
  [[nodiscard]] const ModelGeometry& geometry() const noexcept;
  /// Layers may differ. Throws: kInvalidArgument for a layer without experts; kUnsupported for one
  /// that config.json's list of limits does not reach.
  [[nodiscard]] ActivationFn activation(int layer) const;
  /// Layers that hold routed experts, ascending.
  [[nodiscard]] const std::vector<int>& moe_layers() const noexcept;
  /// Stable digest of config and headers, not of weights: two trainings of one model may share it.
  [[nodiscard]] std::uint64_t identity() const noexcept;

  /// Of every expert of the layer, in order; empty if the checkpoint has none. Throws: kCorruptFile
  /// for a scale that is not finite or not positive, kUnsupported for one that is missing for some
  /// expert or of another dtype or shape.
  [[nodiscard]] std::vector<InputScales> input_scales(int layer) const;

  /// s1 = max of w1 and w3, s2 = max of w2, over all experts of the layer; empty if the checkpoint
  /// has none.
  /// Throws: as input_scales().
  [[nodiscard]] std::optional<StaticScales> static_scales(int layer) const;

  /// Checks headers and input scales of a whole layer, and no weights. Throws: as load_experts().
  void check(int layer) const;

  /// Throws: kInvalidArgument (layer or range); kCorruptFile (a bad scale, nibbles that are not
  ///   stored as the format says); kUnsupported (floats, a missing tensor, another dtype or shape,
  ///   scales that cannot be represented). All or nothing.   Cost: touches only these experts'
  ///   bytes; codes that lie in the file in another order or with an offset are copied.
  [[nodiscard]] ExpertWeights load_experts(int layer, int first_expert, int num_experts) const;

  /// One matrix of one expert as [n, k] float32, of any format and of the model's own widths: FP8
  /// and BF16 weights exactly, INT4 and MXFP4 as code * scale, times its pre_quant_scale if it has
  /// one.
  /// Throws: kInvalidArgument (layer, expert, size of `out`), kCorruptFile.
  void load_floats(int layer, int expert, MatrixRole role, std::span<float> out) const;

  /// Of the checkpoint as a whole, found by open(): tensors that lie in another shard than the
  /// index says, keys of config.json that are not known, latent widths, layers and prediction
  /// layers that are not there, exclusions of experts that are quantized. One for each kind.
  [[nodiscard]] const std::vector<CheckpointWarning>& warnings() const noexcept;

  /// Compares the input scales of all experts of `layers`, and the weights of some experts: of each
  /// matrix by itself, of gate, up and down, of experts, of layers. Looked at are 4 experts of each
  /// layer, fewer if that were more than 64, and at least 1; of a layer that then stands out, 4. Of
  /// FP8 and BF16 experts no weights are looked at. Thresholds: docs/checkpoints.md.
  /// Throws: kInvalidArgument for a layer that is not there. A layer that cannot be loaded is a
  ///   warning of kind "unreadable".
  [[nodiscard]] CheckpointReview review(std::span<const int> layers) const;
  /// review() of one layer. Throws: as load_experts().
  [[nodiscard]] std::vector<CheckpointWarning> warnings(int layer) const;

 private:
  friend class ExpertReader;
  struct Impl;
  explicit Checkpoint(std::unique_ptr<Impl> impl) noexcept;
  std::unique_ptr<Impl> impl_;
};

/// A file that this process has mapped.
struct MappedState {
  const char* path = nullptr;  ///< As it was opened, of the file's own as long as it is mapped.
  std::uint64_t bytes_mapped = 0;
  std::uint64_t bytes_now = 0;
};

/// The file of a checkpoint whose mapping holds `address`, if any. A program's handler of SIGBUS
/// calls this: the system sends it to whoever reads a mapped file that has become shorter, and no
/// library can turn it into an error. Async-signal-safe.
[[nodiscard]] std::optional<MappedState> find_mapped(const void* address) noexcept;

/// What a model's config.json says, with or without tensors beside it.
struct ModelDescription {
  ModelGeometry geometry;
  std::vector<int> moe_layers;            ///< Ascending; empty if the config does not tell.
  std::vector<ActivationFn> activations;  ///< Of these layers, each once, in their order.
  std::vector<CheckpointWarning> warnings;
};

/// Reads `config_file`, and hf_quant_config.json beside it if it is there. Every key has the
/// verdict that Checkpoint::open() gives it. Floats are described as what they are converted to by
/// default: INT4 in groups of 128.
/// Throws: kIo (no such file), kCorruptFile (not JSON), kUnsupported.
[[nodiscard]] ModelDescription describe_model(const std::filesystem::path& config_file);

/// Fraction done, 0 .. 1.
using Progress = std::function<void(double)>;

}  // namespace sluice
