#include "core/mmap.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "core/fail.h"
#include "core/file_descriptor.h"

namespace sluice {
namespace {

std::uintptr_t page_bytes() noexcept {
  static const auto kBytes = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  return kBytes;
}

}  // namespace

std::shared_ptr<const MappedFile> MappedFile::open(const std::filesystem::path& path) {
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
  const auto size = static_cast<std::size_t>(status.st_size);
  std::span<const std::byte> bytes;
  if (size > 0) {
    void* const address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (address == MAP_FAILED) {
      fail(ErrorCode::kIo, "{}: cannot map {} bytes: {}", path.string(), size,
           std::strerror(errno));
    }
    (void)::madvise(address, size, MADV_RANDOM);
    bytes = {static_cast<const std::byte*>(address), size};
  }
  return std::shared_ptr<const MappedFile>(new MappedFile(path, std::move(file), bytes));
}

MappedFile::MappedFile(std::filesystem::path path, FileDescriptor file,
                       std::span<const std::byte> bytes) noexcept
    : path_(std::move(path)), file_(std::move(file)), bytes_(bytes) {}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

bool MappedFile::contains(const void* data, std::size_t size) const noexcept {
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes_.data());
  const auto at = reinterpret_cast<std::uintptr_t>(data);
  return at >= begin && size <= bytes_.size() && at - begin <= bytes_.size() - size;
}

std::size_t MappedFile::read(std::uint64_t at, std::span<std::byte> out) const {
  std::size_t done = 0;
  while (done < out.size()) {
    const ssize_t got =
        ::pread(file_.get(), out.data() + done, out.size() - done, static_cast<off_t>(at + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      fail(ErrorCode::kIo, "{}: cannot read {} bytes at {}: {}", path_.string(), out.size(), at,
           std::strerror(errno));
    }
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

void MappedFile::will_need(std::span<const std::byte> part) noexcept {
  const auto address = reinterpret_cast<std::uintptr_t>(part.data());
  const std::uintptr_t begin = address / page_bytes() * page_bytes();
  if (part.empty()) return;
  (void)::madvise(reinterpret_cast<void*>(begin), address + part.size() - begin, MADV_WILLNEED);
}

void MappedFile::release(std::span<const std::byte> part) noexcept {
  const auto address = reinterpret_cast<std::uintptr_t>(part.data());
  const std::uintptr_t begin = (address + page_bytes() - 1) / page_bytes() * page_bytes();
  const std::uintptr_t end = (address + part.size()) / page_bytes() * page_bytes();
  if (end > begin) (void)::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace sluice
