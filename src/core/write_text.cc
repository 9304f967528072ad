#include "core/write_text.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "core/fail.h"
#include "core/file_descriptor.h"

namespace sluice {
namespace {

[[noreturn]] void fail_write(const std::filesystem::path& path, int problem) {
  fail(ErrorCode::kIo, "{}: cannot write: {}", path.string(), std::strerror(problem));
}

/// 0, or what the system said.
int write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = ::write(fd, text.data(), text.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno;
    text.remove_prefix(static_cast<std::size_t>(count));
  }
  return 0;
}

int close_file(FileDescriptor& file) {
  return ::close(file.release()) == 0 ? 0 : errno;
}

/// Of this process and call.
std::filesystem::path temporary_beside(const std::filesystem::path& path) {
  static std::atomic<unsigned> number{0};
  return path.parent_path() /
         fmt::format(".{}.{}-{}.tmp", path.filename().string(), ::getpid(), number++);
}

}  // namespace

void write_text(const std::filesystem::path& path, std::string_view text) {
  struct stat status {};
  const bool is_there = ::stat(path.c_str(), &status) == 0;
  if (is_there && !S_ISREG(status.st_mode)) {
    FileDescriptor file(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
    int problem = file ? write_all(file.get(), text) : errno;
    if (file && problem == 0) problem = close_file(file);
    if (problem != 0) fail_write(path, problem);
    return;
  }
  // A link stays, and the file that it names is replaced, or made where that can be.
  std::error_code ignored;
  auto place = is_there ? std::filesystem::canonical(path, ignored) : path;
  for (int links = 0; !is_there && links < 40; ++links) {
    const auto next = std::filesystem::read_symlink(place, ignored);
    if (ignored) break;
    place = place.parent_path() / next;
  }
  const auto temporary = temporary_beside(place.empty() ? path : place);
  const mode_t mode = is_there ? status.st_mode & 0777U : 0666U;
  FileDescriptor file(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode));
  if (!file) fail_write(path, errno);
  int problem = write_all(file.get(), text);
  if (problem == 0 && is_there && ::fchmod(file.get(), mode) != 0) problem = errno;
  if (const int close_problem = close_file(file); problem == 0) problem = close_problem;
  if (problem == 0 && ::rename(temporary.c_str(), place.c_str()) != 0) problem = errno;
  if (problem == 0) return;
  ::unlink(temporary.c_str());
  fail_write(path, problem);
}

}  // namespace sluice
