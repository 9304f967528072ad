#include "checkpoint/expert_names.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <limits>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

/// docs/checkpoints.md#names says whose each is.
constexpr std::string_view kPrefixes[] = {
    "model.layers.",
    "model.language_model.layers.",
    "language_model.model.layers.",
    "language_model.layers.",
    "layers.",
};
constexpr std::string_view kContainers[] = {
    ".mlp.experts.",
    ".block_sparse_moe.experts.",
    ".ffn.experts.",
    ".feed_forward.experts.",
};
constexpr std::pair<std::string_view, std::string_view> kStems[] = {
    {"gate_proj.", "w1."}, {"up_proj.", "w3."}, {"down_proj.", "w2."}};
constexpr std::string_view kExperts = ".experts.";
/// gpt-oss' own, each [E, ..].
constexpr std::string_view kFusedParts[] = {"gate_up_proj_blocks", "gate_up_proj_scales",
                                            "gate_up_proj_bias",   "down_proj_blocks",
                                            "down_proj_scales",    "down_proj_bias"};

bool is_fused_part(std::string_view part) noexcept {
  return std::ranges::find(kFusedParts, part) != std::end(kFusedParts);
}

/// Takes a decimal number without leading zeros off the front of `text`.
std::optional<int> take_number(std::string_view& text) {
  int value = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  const auto length = static_cast<std::size_t>(end - text.data());
  if (problem != std::errc{} || value < 0 || (length > 1 && text[0] == '0')) return std::nullopt;
  text.remove_prefix(length);
  return value;
}

bool is_digit(char c) noexcept {
  return c >= '0' && c <= '9';
}

/// Takes prefix, layer and container off the front of `name`; what is left begins after "experts.".
std::optional<ExpertName> take_container(std::string_view& name) {
  for (const std::string_view prefix : kPrefixes) {
    if (!name.starts_with(prefix)) continue;
    std::string_view rest = name.substr(prefix.size());
    const auto layer = take_number(rest);
    if (!layer) return std::nullopt;
    for (const std::string_view container : kContainers) {
      if (!rest.starts_with(container)) continue;
      name = rest.substr(container.size());
      return ExpertName{.layer = *layer, .part = {}, .prefix = prefix, .container = container};
    }
    return std::nullopt;
  }
  return std::nullopt;
}

}  // namespace

std::string ExpertSpelling::name(int layer, int expert, std::string_view part) const {
  if (is_fused_part(part)) return fmt::format("{}{}{}{}", prefix, layer, container, part);
  std::string_view stem;
  if (has_numbered_stems) {
    for (const auto& [word, number] : kStems) {
      const std::string_view bare = word.substr(0, word.size() - 1);
      if (!part.starts_with(bare)) continue;
      stem = number.substr(0, number.size() - 1);
      part.remove_prefix(bare.size());
      break;
    }
  }
  return fmt::format("{}{}{}{}.{}{}", prefix, layer, container, expert, stem, part);
}

std::optional<ExpertName> parse_expert_name(std::string_view name) {
  auto result = take_container(name);
  if (!result) return std::nullopt;
  const auto expert = take_number(name);
  if (!expert || !name.starts_with('.')) return std::nullopt;
  result->expert = *expert;
  result->part = name.substr(1);
  return result;
}

void check_expert_numbers(std::string_view name, const std::string& file) {
  const auto take_digits = [](std::string_view& text) {
    const auto end = std::ranges::find_if_not(text, is_digit);
    const auto digits = text.substr(0, static_cast<std::size_t>(end - text.begin()));
    text.remove_prefix(digits.size());
    return digits;
  };
  const auto check = [&](std::string_view digits, const char* whose) {
    std::string_view rest = digits;
    if (digits.starts_with('0') || take_number(rest)) return;
    fail(ErrorCode::kUnsupported, "{}: tensor {}: {} {} is above {}", file, name, whose, digits,
         std::numeric_limits<int>::max());
  };
  for (const std::string_view prefix : kPrefixes) {
    if (!name.starts_with(prefix)) continue;
    std::string_view rest = name.substr(prefix.size());
    const std::string_view layer = take_digits(rest);
    const auto container = std::ranges::find_if(
        kContainers, [&](std::string_view each) { return rest.starts_with(each); });
    if (layer.empty() || container == std::end(kContainers)) return;
    rest.remove_prefix(container->size());
    const std::string_view expert = take_digits(rest);
    if (expert.empty() || !rest.starts_with('.')) return;
    check(layer, "layer");
    return check(expert, "expert");
  }
}

StemKind stem_kind(std::string_view part) noexcept {
  for (const auto& [word, number] : kStems) {
    if (part.starts_with(word)) return StemKind::kWords;
    if (part.starts_with(number)) {
      return part.substr(number.size()) == "input_scale" ? StemKind::kNone : StemKind::kNumbers;
    }
  }
  return StemKind::kNone;
}

std::string canonical_part(std::string_view part) {
  for (const auto& [word, number] : kStems) {
    if (part.starts_with(number)) return fmt::format("{}{}", word, part.substr(number.size()));
  }
  return std::string(part);
}

std::optional<int> fused_experts_layer(std::string_view name) {
  if (is_separate_prediction_layer(name)) return std::nullopt;
  std::string_view rest = name;
  const auto known = take_container(rest);
  if (!known) {
    const auto at = name.find(kExperts);
    if (at == std::string_view::npos) return std::nullopt;
    rest = name.substr(at + kExperts.size());
  }
  // A routing bias may lie here, too; weights are projections by name, or w1, w2, w13.
  const bool is_numbered_weight = rest.size() > 1 && rest[0] == 'w' && is_digit(rest[1]);
  if (rest.empty() || is_digit(rest[0])) return std::nullopt;
  if (!is_numbered_weight && rest.find("proj") == std::string_view::npos) return std::nullopt;
  return known ? known->layer : -1;
}

std::optional<FusedName> parse_fused_name(std::string_view name) {
  const auto known = take_container(name);
  if (!known || !is_fused_part(name)) return std::nullopt;
  return FusedName{known->layer, name, known->prefix, known->container};
}

std::optional<int> layer_among_experts(std::string_view name) {
  const auto known = take_container(name);
  return known ? std::optional(known->layer) : std::nullopt;
}

bool is_routing(std::string_view name) noexcept {
  return name.find(".experts.router.") != std::string_view::npos ||
         name.find(".experts.gate.") != std::string_view::npos || name.ends_with("correction_bias");
}

bool is_bias(std::string_view name) noexcept {
  return name.ends_with("bias") || name.ends_with("biases");
}

bool looks_like_expert(std::string_view name) noexcept {
  return name.find(kExperts) != std::string_view::npos;
}

bool is_separate_prediction_layer(std::string_view name) noexcept {
  return name.starts_with("mtp.") || name.find(".mtp.") != std::string_view::npos;
}

}  // namespace sluice
