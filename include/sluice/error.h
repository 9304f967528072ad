// error.h - the one way Sluice reports failure: an exception with a code.
//
// Everything that can be checked is checked before work is queued; the message names the field, its
// value and the limit it broke. Library code never prints, aborts or exits.
#pragma once

#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace sluice {

enum class ErrorCode {
  kInvalidArgument,  ///< A value the caller passed; nothing has been done.
  kUnsupported,      ///< A legal request that this build, backend or transport cannot serve.
  kOutOfMemory,
  kCorruptFile,  ///< A file's bytes contradict its format.
  kIo,           ///< The operating system refused a file operation.
  kCuda,
  kTransport,    ///< Ranks disagree, or the transport below failed.
  kPeerTimeout,  ///< A peer did not arrive in time; the message and ranks() name it.
  kInterrupted,  ///< The caller ended a wait (interrupt.h).
  kInternal,     ///< A promise inside the library was broken: a bug in Sluice.
};

/// "invalid argument", "peer timeout", ...
[[nodiscard]] const char* to_string(ErrorCode code) noexcept;

/// Process exit status that stands for `code`: 2 for bad input, 3 for files, 4 for peers, 5 else.
[[nodiscard]] int exit_status(ErrorCode code) noexcept;

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message,
        std::source_location where = std::source_location::current());
  Error(ErrorCode code, const std::string& message, std::vector<int> ranks,
        std::source_location where = std::source_location::current());

  [[nodiscard]] ErrorCode code() const noexcept { return code_; }
  /// The ranks that the message says are missing, gone or out of step, ascending: with
  /// kPeerTimeout, and with kTransport where a peer is to blame. Empty otherwise.
  [[nodiscard]] const std::vector<int>& ranks() const noexcept;
  [[nodiscard]] const std::source_location& where() const noexcept { return where_; }

 private:
  ErrorCode code_;
  std::shared_ptr<const std::vector<int>> ranks_;  // Shared: copying an exception must not throw.
  std::source_location where_;
};

}  // namespace sluice
