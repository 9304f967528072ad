// work_lock.h - who may write into a directory of a conversion, and who may give it its place.
//
//   run A  |--- shared: makes experts ---|   waits   |-- alone: verifies, moves DIR --|
//   run B       |--- shared: makes experts ---|                     waits             | DIR is gone
//
// The lock is on the directory itself, so that it goes where the directory goes, ends with its
// process and leaves nothing behind. It holds between processes and threads of one host.
#pragma once

#include <filesystem>

#include "core/file_descriptor.h"

namespace sluice {

class WorkLock {
 public:
  enum class Kind { kShared, kAlone };

  /// Shared; makes the directory where there is none. Waits while somebody has it alone, and may
  /// have moved it afterwards: is_in_place() is true. Throws: kIo (a file system without locks).
  explicit WorkLock(std::filesystem::path dir);

  /// Lets go, and waits for the other kind: anybody may have done anything in between.
  void change_to(Kind kind);
  /// As change_to(kAlone), if nobody else has the directory; false if somebody has.
  [[nodiscard]] bool try_alone();

  /// False once the directory has been moved or removed, also if there is another in its place.
  [[nodiscard]] bool is_in_place() const;

 private:
  std::filesystem::path dir_;
  FileDescriptor fd_;
};

}  // namespace sluice
