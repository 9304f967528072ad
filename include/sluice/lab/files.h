// files.h - results in files.
#pragma once

#include <filesystem>
#include <string_view>

namespace sluice {

/// Makes a file of exactly this content, or replaces one. Who reads it meanwhile sees the old
/// content or the new, never a part; a run that is cut off leaves the old. Throws: kIo naming the
/// file and what the system said.
void write_file(const std::filesystem::path& path, std::string_view text);

}  // namespace sluice
