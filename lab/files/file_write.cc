#include "files/file_write.h"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "core/fail.h"
#include "core/write_text.h"

namespace sluice {
namespace {

[[noreturn]] void fail_io(const std::filesystem::path& path, const char* what, int problem) {
  fail(ErrorCode::kIo, "{}: cannot {}: {}", path.string(), what, std::strerror(problem));
}

class Descriptor {
 public:
  Descriptor(const std::filesystem::path& path, int flags)
      : path_(path), fd_(::open(path.c_str(), flags | O_WRONLY | O_CREAT | O_CLOEXEC, 0644)) {
    if (fd_ < 0) fail_io(path, "open for writing", errno);
  }
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  [[nodiscard]] int get() const noexcept { return fd_; }
  void close() {
    const int fd = fd_;
    fd_ = -1;
    if (::close(fd) != 0) fail_io(path_, "close", errno);
  }

 private:
  const std::filesystem::path& path_;
  int fd_;
};

}  // namespace

void write_at(const std::filesystem::path& path, std::uint64_t offset,
              std::span<const std::byte> bytes) {
  Descriptor file(path, 0);
  while (!bytes.empty()) {
    const ssize_t count =
        ::pwrite(file.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail_io(path, "write", errno);
    bytes = bytes.subspan(static_cast<std::size_t>(count));
    offset += static_cast<std::uint64_t>(count);
  }
  file.close();
}

void write_new_text(const std::filesystem::path& path, std::string_view text) {
  static std::atomic<unsigned> number{0};
  const auto beside =
      path.parent_path() /
      fmt::format(".{}.new-{}-{}.tmp", path.filename().string(), ::getpid(), number++);
  write_text(beside, text);
  const bool is_linked = ::link(beside.c_str(), path.c_str()) == 0;
  const int problem = is_linked ? 0 : errno;
  ::unlink(beside.c_str());
  if (!is_linked && problem != EEXIST) fail_io(path, "create", problem);
}

void append_text(const std::filesystem::path& path, std::string_view text) {
  Descriptor file(path, O_APPEND);
  const ssize_t count = ::write(file.get(), text.data(), text.size());
  if (count != static_cast<ssize_t>(text.size())) fail_io(path, "append to", errno);
  file.close();
}

void set_file_size(const std::filesystem::path& path, std::uint64_t bytes) {
  Descriptor file(path, 0);
  if (::ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) fail_io(path, "resize", errno);
  file.close();
}

void check_free_space(const std::filesystem::path& dir, std::uint64_t needed) {
  constexpr std::uint64_t kReserve = std::uint64_t{64} << 20;
  struct statvfs status {};
  if (::statvfs(dir.c_str(), &status) != 0) fail_io(dir, "ask for the free space of", errno);
  const std::uint64_t free = static_cast<std::uint64_t>(status.f_bavail) * status.f_frsize;
  if (free < needed + kReserve) {
    fail(ErrorCode::kIo, "{}: {} bytes are free, {} are needed and {} are left in reserve",
         dir.string(), free, needed, kReserve);
  }
}

}  // namespace sluice
