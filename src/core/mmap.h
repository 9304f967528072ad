// mmap.h - a file mapped read-only, whose pages come in only when they are asked for.
//
// read() copies a part instead: the system sees how much is wanted, and a file that has become
// shorter is told, not signalled.
//
// The kernel's guess at what is read next is switched off (it would pull in bytes of experts that
// belong to other ranks); will_need() says it instead. Threads: const functions from any thread.
// A file that shrinks while it is mapped raises SIGBUS at the next access, as with any mapping:
// check_is_whole() makes that unlikely, and find() lets a program's handler name the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>

#include "core/regular_file.h"

namespace sluice {

class MappedFile {
 public:
  /// Throws: kIo naming the file and what the system said; an empty file maps to an empty span.
  [[nodiscard]] static std::shared_ptr<const MappedFile> open(const std::filesystem::path& path);

  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return bytes_; }
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
  /// True if all of [data, data + size) lies in this mapping.
  [[nodiscard]] bool contains(const void* data, std::size_t size) const noexcept;

  /// Copies out.size() bytes from position `at` of the file as it is now. Returns how many there
  /// were: fewer if the file has been cut since it was opened.   Throws: kIo.
  [[nodiscard]] std::size_t read(std::uint64_t at, std::span<std::byte> out) const;

  /// Throws: kCorruptFile if the file is shorter now than bytes().   Cost: a system call.
  void check_is_whole() const;

  struct Found {
    const MappedFile* file = nullptr;  ///< Null: none.
    std::uint64_t bytes_now = 0;       ///< Of the file; 0 if the system does not tell.
  };
  /// Of all that are mapped, the one that holds `address`. Async-signal-safe.
  [[nodiscard]] static Found find(const void* address) noexcept;

  /// Starts reading a part of bytes() in the background. A hint.
  static void will_need(std::span<const std::byte> part) noexcept;
  /// Gives back the whole pages inside a part of bytes(); a later access reads them again.
  static void release(std::span<const std::byte> part) noexcept;

 private:
  MappedFile(std::filesystem::path path, RegularFile file,
             std::span<const std::byte> bytes) noexcept;
  [[nodiscard]] std::uint64_t bytes_now() const noexcept;
  std::filesystem::path path_;
  RegularFile file_;
  std::span<const std::byte> bytes_;
  // In the list of all of the process.
  MappedFile* next_ = nullptr;
  MappedFile* previous_ = nullptr;
};

}  // namespace sluice
