// pages.h - anonymous memory for windows: zero, page aligned, and free of cost until it is touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>

#include "core/fail.h"

namespace sluice {

class Pages {
 public:
  explicit Pages(std::size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail(ErrorCode::kOutOfMemory, "a window of {} bytes", bytes);
    data_ = static_cast<std::byte*>(p);
  }
  ~Pages() {
    if (data_) munmap(data_, bytes_);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  [[nodiscard]] std::byte* data() const noexcept { return data_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_;
};

}  // namespace sluice
