#include "transport/tcp_departure.h"

#include <cstdint>
#include <cstring>
#include <span>

namespace sluice {

std::vector<std::byte> encode(const TcpDeparture& why) {
  std::vector<std::int32_t> words = {static_cast<std::int32_t>(why.presence)};
  words.insert(words.end(), why.blamed.begin(), why.blamed.end());
  const auto bytes = std::as_bytes(std::span(words));
  return {bytes.begin(), bytes.end()};
}

TcpDeparture decode_departure(const std::vector<std::byte>& bytes) {
  std::vector<std::int32_t> words(bytes.size() / sizeof(std::int32_t));
  if (words.empty()) return {};
  std::memcpy(words.data(), bytes.data(), words.size() * sizeof(std::int32_t));
  return {static_cast<Presence>(words[0]), {words.begin() + 1, words.end()}};
}

}  // namespace sluice
