// module_match.h - does an entry of `targets` or `ignore` mean a module?
#pragma once

#include <string>
#include <string_view>

namespace sluice {

/// How precisely an entry names a module; the more precise one wins.
enum class ModuleMatch { kNone, kClass, kPattern, kName };

/// `target` is a module's name, "re:" and a pattern that matches its beginning, or a class. Experts
/// are Linear. Throws: kUnsupported for a pattern that cannot be read, naming `where`.
[[nodiscard]] ModuleMatch match_target(std::string_view target, const std::string& module,
                                       const std::string& where);

/// True if `target` means the module, or may: a pattern that cannot be read says nothing.
[[nodiscard]] bool may_target(const std::string& target, const std::string& module);

/// True if an exclusion's `entry` covers the module or one that it is part of: a pattern, or whole
/// components of the name ("experts" and "mlp.experts" do, "expert" does not). Patterns that cannot
/// be read cover nothing.
[[nodiscard]] bool is_excluded(const std::string& entry, const std::string& module);

}  // namespace sluice
