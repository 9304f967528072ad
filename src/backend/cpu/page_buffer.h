// page_buffer.h - page-aligned memory whose untouched pages cost nothing.
#pragma once

#include <cstddef>

#include "sluice/backend.h"

namespace sluice::cpu {

inline constexpr std::size_t kPageBytes = 4096;

/// Zero-filled by the system when first touched.
class PageBuffer final : public DeviceBuffer {
 public:
  PageBuffer() = default;
  /// kHuge asks for huge pages: for what is used as a whole. Rows that are mostly not used would
  /// become resident with their neighbours.
  enum class Pages { kNormal, kHuge };
  /// Throws: kOutOfMemory.
  explicit PageBuffer(std::size_t bytes, Pages pages = Pages::kNormal);
  PageBuffer(PageBuffer&& other) noexcept;
  PageBuffer& operator=(PageBuffer&& other) noexcept;
  ~PageBuffer() override;

  [[nodiscard]] std::byte* data() const noexcept override { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept override { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace sluice::cpu
