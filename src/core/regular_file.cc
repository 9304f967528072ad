#include "core/regular_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/fail.h"

namespace sluice {
namespace {

constexpr std::uint64_t kMaxTextBytes = std::uint64_t{4} << 30;

}  // namespace

RegularFile RegularFile::open(const std::filesystem::path& path) {
  // Opening a FIFO would wait for its writer.
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file) {
    fail(ErrorCode::kIo, "{}: cannot open: {}", path.string(), std::strerror(errno));
  }
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) {
    fail(ErrorCode::kIo, "{}: cannot stat: {}", path.string(), std::strerror(errno));
  }
  if (!S_ISREG(status.st_mode)) fail(ErrorCode::kIo, "{}: not a regular file", path.string());
  return {.descriptor = std::move(file), .bytes = static_cast<std::uint64_t>(status.st_size)};
}

std::size_t RegularFile::read(std::uint64_t at, std::span<std::byte> out,
                              const std::filesystem::path& path) const {
  std::size_t done = 0;
  while (done < out.size()) {
    const ssize_t got = ::pread(descriptor.get(), out.data() + done, out.size() - done,
                                static_cast<off_t>(at + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      fail(ErrorCode::kIo, "{}: cannot read {} bytes at {}: {}", path.string(), out.size(), at,
           std::strerror(errno));
    }
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

std::string read_text(const std::filesystem::path& path) {
  const RegularFile file = RegularFile::open(path);
  if (file.bytes > kMaxTextBytes) {
    fail(ErrorCode::kUnsupported, "{}: {} bytes; a file of text has at most {}", path.string(),
         file.bytes, kMaxTextBytes);
  }
  std::string text(file.bytes, '\0');
  text.resize(file.read(0, std::as_writable_bytes(std::span(text)), path));
  return text;
}

}  // namespace sluice
