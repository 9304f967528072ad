// file_write.h - writing files that are laid out before their content is known.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>

namespace sluice {

/// Writes all of `bytes` at `offset` of a file that exists, or is made. Throws: kIo naming the file
/// and what the system said.
void write_at(const std::filesystem::path& path, std::uint64_t offset,
              std::span<const std::byte> bytes);

/// Makes a file of this content at once, so that nobody reads it without. One that is there, or
/// comes first, stays. Throws: kIo.
void write_new_text(const std::filesystem::path& path, std::string_view text);

/// Appends in one write, so that lines of several processes do not mix. Throws: kIo.
void append_text(const std::filesystem::path& path, std::string_view text);

/// Makes or resizes a file; what is new reads as zeros. Throws: kIo.
void set_file_size(const std::filesystem::path& path, std::uint64_t bytes);

/// Throws: kIo unless `needed` bytes, and a reserve, are free where `dir` is.
void check_free_space(const std::filesystem::path& dir, std::uint64_t needed);

}  // namespace sluice
