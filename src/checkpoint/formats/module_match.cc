#include "checkpoint/formats/module_match.h"

#include <algorithm>
#include <optional>
#include <regex>

#include "core/fail.h"

namespace sluice {
namespace {

constexpr std::string_view kPattern = "re:";
/// Published patterns have fewer than 100 characters.
constexpr std::size_t kMaxPattern = 512;

/// Empty if `pattern` cannot be read.
std::optional<std::regex> compile(std::string_view pattern) {
  if (pattern.size() > kMaxPattern) return std::nullopt;
  auto flags = std::regex::ECMAScript;
#ifdef __GLIBCXX__
  flags |= std::regex_constants::__polynomial;  // A hostile pattern must not take forever.
#endif
  try {
    return std::regex(pattern.begin(), pattern.end(), flags);
  } catch (const std::regex_error&) {
    return std::nullopt;
  }
}

/// As Python's re.match(): from the beginning, not to the end.
bool matches(const std::regex& pattern, const std::string& module) {
  return std::regex_search(module, pattern, std::regex_constants::match_continuous);
}

}  // namespace

ModuleMatch match_target(std::string_view target, const std::string& module,
                         const std::string& where) {
  if (target == module) return ModuleMatch::kName;
  if (target == "Linear") return ModuleMatch::kClass;
  if (!target.starts_with(kPattern)) return ModuleMatch::kNone;
  const auto pattern = compile(target.substr(kPattern.size()));
  if (!pattern) {
    fail(ErrorCode::kUnsupported, "{} = '{}' is not a pattern that can be read", where, target);
  }
  return matches(*pattern, module) ? ModuleMatch::kPattern : ModuleMatch::kNone;
}

bool may_target(const std::string& target, const std::string& module) {
  if (!target.starts_with(kPattern)) return match_target(target, module, {}) != ModuleMatch::kNone;
  const auto pattern = compile(std::string_view(target).substr(kPattern.size()));
  return !pattern || matches(*pattern, module);
}

bool is_excluded(const std::string& entry, const std::string& module) {
  if (entry.starts_with(kPattern)) {
    const auto pattern = compile(std::string_view(entry).substr(kPattern.size()));
    return pattern && matches(*pattern, module);
  }
  std::string_view name = entry;
  while (name.ends_with('*') || name.ends_with('.')) name.remove_suffix(1);
  while (name.starts_with('*') || name.starts_with('.')) name.remove_prefix(1);
  if (name.empty()) return false;
  return fmt::format(".{}.", module).find(fmt::format(".{}.", name)) != std::string::npos;
}

}  // namespace sluice
