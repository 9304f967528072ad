// expert_names.h - how checkpoints spell the tensors of routed experts, in one place.
//
//   model.language_model.layers.3 .block_sparse_moe.experts. 17 . w1 .weight_packed
//   `------- prefix -----------'  `----- container -------'       stem
//
// Everything else works with one spelling of the part after the expert's number: gate_proj,
// up_proj, down_proj. Messages and converted files use the checkpoint's own (ExpertSpelling).
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace sluice {

/// What the names of one checkpoint have in common. Default: Hugging Face's spelling of DeepSeek.
struct ExpertSpelling {
  std::string_view prefix = "model.layers.";     ///< Before the layer's number. Static storage.
  std::string_view container = ".mlp.experts.";  ///< Before the expert's. Static storage.
  bool has_numbered_stems = false;  ///< w1, w3, w2 instead of gate_proj, up_proj, down_proj.

  /// The checkpoint's own name of a canonical part: "gate_proj.weight" may become "w1.weight". That
  /// of a FusedName's part has no expert.
  [[nodiscard]] std::string name(int layer, int expert, std::string_view part) const;
};

enum class StemKind { kNone, kWords, kNumbers };

/// A tensor of one routed expert. Views point into the name and into static storage.
struct ExpertName {
  int layer = 0, expert = 0;
  std::string_view part;  ///< After "experts.17.", as spelled.
  std::string_view prefix, container;
};

/// Empty if `name` is no tensor of a numbered routed expert under a known prefix and container.
[[nodiscard]] std::optional<ExpertName> parse_expert_name(std::string_view name);

/// Throws: kUnsupported naming `file` for a layer or an expert with a number of 2^31 or more, which
/// parse_expert_name() does not take.
void check_expert_numbers(std::string_view name, const std::string& file);

/// Which kind of stem a part proves. `wN.input_scale` proves nothing: W4AFP8 has it beside
/// gate_proj.weight.
[[nodiscard]] StemKind stem_kind(std::string_view part) noexcept;

/// "gate_proj.weight" for "w1.weight"; parts without a numbered stem as they are.
[[nodiscard]] std::string canonical_part(std::string_view part);

/// Weights or biases of all experts of a layer in one tensor: "...mlp.experts.gate_up_proj_packed".
/// The value is the layer's number, or -1 if the name has none in a known place.
[[nodiscard]] std::optional<int> fused_experts_layer(std::string_view name);

/// A tensor of all experts of a layer in gpt-oss' layout: gate_up_proj_ or down_proj_ before
/// blocks, scales or bias. Views point into the name and into static storage.
struct FusedName {
  int layer = 0;
  std::string_view part, prefix, container;
};
/// Empty if `name` is no such tensor under a known prefix and container.
[[nodiscard]] std::optional<FusedName> parse_fused_name(std::string_view name);

/// The layer of a tensor under a known prefix and container, whatever it is.
[[nodiscard]] std::optional<int> layer_among_experts(std::string_view name);

/// True of a tensor among the experts that says which of them a token takes.
[[nodiscard]] bool is_routing(std::string_view name) noexcept;

/// "gate_up_proj_bias", "down_proj.bias": no weights.
[[nodiscard]] bool is_bias(std::string_view name) noexcept;

/// True of names under "experts", shared ones excepted, whoever spelled them.
[[nodiscard]] bool looks_like_expert(std::string_view name) noexcept;

/// True of prediction layers with a numbering of their own: "mtp.layers.0...".
[[nodiscard]] bool is_separate_prediction_layer(std::string_view name) noexcept;

}  // namespace sluice
