// safetensors.h - the container: a JSON header that says where each tensor's bytes lie.
//
//   | 8 bytes: header length n, little endian | n bytes: JSON | tensor bytes, without gaps |
//
// The header is checked completely before any of it is believed (docs/formats.md#safetensors).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/mmap.h"

namespace sluice {

/// Largest header accepted, as in the format's reference implementation.
inline constexpr std::uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;
/// Largest number of dimensions accepted.
inline constexpr std::size_t kMaxSafetensorsRank = 32;

struct SafetensorsEntry {
  std::string name;
  std::string dtype;  ///< As written: "F32", "BF16", "I8", "F8_E4M3", ...
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;  ///< First byte, counted from SafetensorsHeader::data_begin.
  std::uint64_t end = 0;    ///< One past the last byte.
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> tensors;  ///< Ascending by position in the file.
  std::uint64_t data_begin = 0;           ///< Where the header ends, counted from the file's start.
};

/// Bits of one element, for the dtype names that the format defines; empty for any other.
[[nodiscard]] std::optional<int> safetensors_dtype_bits(std::string_view dtype) noexcept;

/// "[4096, 3584]"
[[nodiscard]] std::string to_string(std::span<const std::uint64_t> shape);

/// The length and the JSON, as far as the file has them, or the file's first bytes if it is of
/// another kind: read, not mapped.
/// Throws: kIo; kCorruptFile if the file has become shorter.
[[nodiscard]] std::vector<std::byte> read_safetensors_head(const MappedFile& file);

/// `head` has the header of a file of `file_bytes`, or all of the file.
/// Throws: kCorruptFile naming `source`, the tensor, the value and its limit.
[[nodiscard]] SafetensorsHeader parse_safetensors_header(std::span<const std::byte> head,
                                                         std::uint64_t file_bytes,
                                                         const std::string& source);
/// The same of a file that is all there.
[[nodiscard]] inline SafetensorsHeader parse_safetensors_header(std::span<const std::byte> file,
                                                                const std::string& source) {
  return parse_safetensors_header(file, file.size(), source);
}

/// Lays out `tensors` back to back in the order given, filling in `begin` and `end`, and returns
/// the file's first bytes (length and JSON), padded so that the data begins at a multiple of 8.
/// Throws: kInvalidArgument for a dtype or shape that has no whole number of bytes.
[[nodiscard]] std::string make_safetensors_header(std::span<SafetensorsEntry> tensors);

}  // namespace sluice
