// output_dir.h - where a new checkpoint goes.
#pragma once

#include <filesystem>

namespace sluice {

/// `dir` as an absolute path with a file name ("DIR/" and "DIR" are the same place), a link
/// followed. Throws: kInvalidArgument if it exists and is not an empty directory, saying what is
/// there, or is one that nothing can be renamed to: a mount point; kIo.
[[nodiscard]] std::filesystem::path checked_target(const std::filesystem::path& dir);

/// Renames a finished directory to its place, which must be absent or empty. Throws: kIo.
void move_to_target(const std::filesystem::path& from, const std::filesystem::path& target);

}  // namespace sluice
