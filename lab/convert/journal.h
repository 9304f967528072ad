// journal.h - which jobs of a conversion are done, kept beside the half-written shards.
//
//   sluice-convert 2 <digest of the source's headers, options and plan>
//   <job> <digest of its bytes> <sample of what it was made of>
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
  /// A job that is finished.
  struct Done {
    std::uint64_t bytes;   ///< Digest of the job's.
    std::uint64_t source;  ///< sample_source() of what they were made of.
  };
  static constexpr const char* kFileName = "sluice-convert.journal";

  /// Opens the journal of `dir`, or begins one. Throws: kInvalidArgument if it is that of another
  /// conversion; kIo.
  Journal(const std::filesystem::path& dir, std::uint64_t conversion);

  /// Finished jobs by number. Reads the file again: others may have added to it.
  /// Throws: kInvalidArgument for a job that was made of two sources; kIo.
  [[nodiscard]] std::map<std::size_t, Done> finished() const;
  void add(std::size_t job, Done done) const;
  [[nodiscard]] std::filesystem::path dir() const { return path_.parent_path(); }

 private:
  std::filesystem::path path_;
};

}  // namespace sluice
