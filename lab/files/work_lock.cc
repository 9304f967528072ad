#include "files/work_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

int operation_of(WorkLock::Kind kind) {
  return kind == WorkLock::Kind::kShared ? LOCK_SH : LOCK_EX;
}

}  // namespace

WorkLock::WorkLock(std::filesystem::path dir) : dir_(std::move(dir)) {
  do {
    std::error_code problem;
    std::filesystem::create_directories(dir_, problem);
    if (problem) fail(ErrorCode::kIo, "{}: cannot create: {}", dir_.string(), problem.message());
    fd_ = FileDescriptor(::open(dir_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!fd_ && errno == ENOENT) continue;  // Moved since it was made.
    if (!fd_) fail(ErrorCode::kIo, "{}: cannot open: {}", dir_.string(), std::strerror(errno));
    change_to(Kind::kShared);
  } while (!is_in_place());
}

void WorkLock::change_to(Kind kind) {
  while (::flock(fd_.get(), operation_of(kind)) != 0) {
    if (errno == EINTR) continue;
    fail(ErrorCode::kIo, "{}: cannot lock: {}", dir_.string(), std::strerror(errno));
  }
}

bool WorkLock::try_alone() {
  return ::flock(fd_.get(), LOCK_EX | LOCK_NB) == 0;
}

bool WorkLock::is_in_place() const {
  struct stat own {
  }, named{};
  return fd_ && ::fstat(fd_.get(), &own) == 0 && ::stat(dir_.c_str(), &named) == 0 &&
         own.st_dev == named.st_dev && own.st_ino == named.st_ino;
}

}  // namespace sluice
