// shared_memory.h - memory that processes map together. It has no name: the descriptor is passed
// on.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <utility>

#include "core/fail.h"
#include "core/file_descriptor.h"

namespace sluice {

class SharedMemory {
 public:
  SharedMemory() = default;
  /// Zero, page aligned, free of cost until it is touched.
  [[nodiscard]] static SharedMemory create(std::size_t bytes) {
    FileDescriptor file(memfd_create("sluice", MFD_CLOEXEC));
    if (!file || ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) {
      fail(ErrorCode::kOutOfMemory, "{} bytes of shared memory: {}", bytes, std::strerror(errno));
    }
    return {std::move(file), bytes};
  }
  SharedMemory(FileDescriptor file, std::size_t bytes) : file_(std::move(file)), bytes_(bytes) {
    if (bytes == 0) return;
    void* const p =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_.get(), 0);
    if (p == MAP_FAILED) {
      fail(ErrorCode::kOutOfMemory, "mapping {} bytes of shared memory: {}", bytes,
           std::strerror(errno));
    }
    data_ = static_cast<std::byte*>(p);
  }
  SharedMemory(SharedMemory&& other) noexcept { *this = std::move(other); }
  SharedMemory& operator=(SharedMemory&& other) noexcept {
    std::swap(file_, other.file_), std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~SharedMemory() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] int file() const noexcept { return file_.get(); }

 private:
  FileDescriptor file_;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace sluice
