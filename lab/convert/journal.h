// journal.h - which jobs of a conversion are done, kept beside the half-written shards.
//
//   sluice-convert 1 <digest of source, options and plan>
//   <job> <digest of its bytes>
//
// One line for each finished job, appended in one write after its bytes. A line cut short by a
// crash is no line. Several processes may append.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>

namespace sluice {

class Journal {
 public:
  static constexpr const char* kFileName = "sluice-convert.journal";

  /// Opens the journal of `dir`, or begins one. Throws: kInvalidArgument if it is that of another
  /// conversion; kIo.
  Journal(const std::filesystem::path& dir, std::uint64_t conversion);

  /// Digests of finished jobs, by number. Reads the file again: others may have added to it.
  [[nodiscard]] std::map<std::size_t, std::uint64_t> finished() const;
  void add(std::size_t job, std::uint64_t digest) const;

 private:
  std::filesystem::path path_;
};

}  // namespace sluice
