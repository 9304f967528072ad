// file_kind.h - files that are sound, and something else than they are taken for.
#pragma once

#include <string>
#include <string_view>

namespace sluice {

/// What a file is by its first bytes, for messages, and what would help: "a Git LFS pointer; ...".
/// Empty if nobody knows, as of safetensors.
[[nodiscard]] std::string_view kind_of_file(std::string_view file) noexcept;

/// Throws: kUnsupported naming `source` if `text` is of another known kind than JSON.
void check_is_json(std::string_view text, const std::string& source);

}  // namespace sluice
