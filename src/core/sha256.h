// sha256.h - FIPS 180-4, so that people can check files with the tools they have; and RFC 2104.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace sluice {

class Sha256 {
 public:
  void update(std::span<const std::byte> bytes) noexcept;
  /// Call once, at the end.
  [[nodiscard]] std::array<std::byte, 32> finish() noexcept;

 private:
  void consume(const std::byte* block) noexcept;

  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::byte, 64> pending_{};
  std::size_t num_pending_ = 0;
  std::uint64_t num_bytes_ = 0;
};

/// Lower-case hexadecimal digits, two for each byte.
[[nodiscard]] std::string to_hex(std::span<const std::byte> bytes);

/// RFC 2104: proves knowledge of `key` without showing it.
[[nodiscard]] std::array<std::byte, 32> hmac_sha256(std::span<const std::byte> key,
                                                    std::span<const std::byte> message);

}  // namespace sluice
