// write_text.h - files that are written whole.
#pragma once

#include <filesystem>
#include <string_view>

namespace sluice {

/// Makes a file of exactly this content, or replaces one. Who reads it meanwhile, also through a
/// mapping, sees the old content or the new, never a part: it is written beside its place and
/// renamed. Devices and FIFOs are written to as they are. Throws: kIo naming the file and what the
/// system said.
void write_text(const std::filesystem::path& path, std::string_view text);

}  // namespace sluice
