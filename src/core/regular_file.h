// regular_file.h - a regular file that is read: whole, or a part at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "core/file_descriptor.h"

namespace sluice {

struct RegularFile {
  FileDescriptor descriptor;
  std::uint64_t bytes = 0;  ///< When it was opened.

  /// Without waiting, whatever is there. Throws: kIo naming the file and what the system said.
  [[nodiscard]] static RegularFile open(const std::filesystem::path& path);

  /// Copies out.size() bytes from position `at` of the file as it is now. Returns how many there
  /// were: fewer at its end. `path` is for messages.   Throws: kIo.
  [[nodiscard]] std::size_t read(std::uint64_t at, std::span<std::byte> out,
                                 const std::filesystem::path& path) const;
};

/// The file as it is now. Throws: kIo; kUnsupported for one of more than 4 GiB, which is no text.
[[nodiscard]] std::string read_text(const std::filesystem::path& path);

}  // namespace sluice
