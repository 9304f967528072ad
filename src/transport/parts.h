// parts.h - what all ranks gave to a collective, as one message.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace sluice {

/// All parts, a size before each.
[[nodiscard]] std::vector<std::byte> pack(const std::vector<std::vector<std::byte>>& parts);

/// The other way round. Throws: kInternal if `all` is no message of `num_parts` parts.
[[nodiscard]] std::vector<std::vector<std::byte>> unpack(std::span<const std::byte> all,
                                                         int num_parts);

/// Every rank brings as many bytes to an all_gather. Throws: kTransport, where `rank` sees another
/// size than its own.
void check_all_gather(const std::vector<std::vector<std::byte>>& parts, int rank);

}  // namespace sluice
