#include "transport/parts.h"

#include <cstdint>
#include <cstring>

#include "core/fail.h"

namespace sluice {

std::vector<std::byte> pack(const std::vector<std::vector<std::byte>>& parts) {
  std::vector<std::byte> all;
  const auto append = [&all](std::span<const std::byte> bytes) {
    all.insert(all.end(), bytes.begin(), bytes.end());
  };
  for (const auto& part : parts) {
    const std::uint64_t size = part.size();
    append(std::as_bytes(std::span(&size, 1)));
    append(part);
  }
  return all;
}

std::vector<std::vector<std::byte>> unpack(std::span<const std::byte> all, int num_parts) {
  std::vector<std::vector<std::byte>> parts;
  for (int r = 0; r < num_parts; ++r) {
    std::uint64_t size = 0;
    SLUICE_ASSERT(all.size() >= sizeof(size));
    std::memcpy(&size, all.data(), sizeof(size));
    all = all.subspan(sizeof(size));
    SLUICE_ASSERT(all.size() >= size);
    parts.emplace_back(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(size));
    all = all.subspan(size);
  }
  return parts;
}

void check_all_gather(const std::vector<std::vector<std::byte>>& parts, int rank) {
  const std::size_t mine = parts[static_cast<std::size_t>(rank)].size();
  for (std::size_t r = 0; r < parts.size(); ++r) {
    if (parts[r].size() == mine) continue;
    fail(ErrorCode::kTransport,
         "all_gather: rank {} brought {} bytes, rank {} brought {}: these ranks call different "
         "functions, or run different builds of sluice",
         rank, mine, r, parts[r].size());
  }
}

}  // namespace sluice
