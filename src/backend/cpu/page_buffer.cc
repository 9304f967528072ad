#include "backend/cpu/page_buffer.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/fail.h"

namespace sluice::cpu {
namespace {

/// Below this, huge pages waste more than the TLB misses they save.
constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

}  // namespace

PageBuffer::PageBuffer(std::size_t bytes, Pages pages) : bytes_(bytes) {
  if (bytes == 0) return;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    fail(ErrorCode::kOutOfMemory, "cannot map {} bytes: {}", bytes, std::strerror(errno));
  }
  if (pages == Pages::kHuge && bytes >= 2 * kHugePageBytes) {
    madvise(p, bytes, MADV_HUGEPAGE);  // A hint; may be refused.
  }
  data_ = static_cast<std::byte*>(p);
}

PageBuffer::PageBuffer(PageBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

PageBuffer& PageBuffer::operator=(PageBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

PageBuffer::~PageBuffer() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

}  // namespace sluice::cpu
