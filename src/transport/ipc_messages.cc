#include "transport/ipc_messages.h"

#include <cstring>
#include <span>
#include <vector>

#include "core/random_bytes.h"
#include "core/sha256.h"

namespace sluice {

Nonce new_nonce() {
  Nonce nonce;
  draw_random(nonce);
  return nonce;
}

Proof prove(const IpcConfig& config, const char* who, const Nonce& host, const Nonce& guest,
            int rank, int num_ranks) {
  std::vector<std::byte> text;
  const auto add = [&text](std::span<const std::byte> part) {
    text.insert(text.end(), part.begin(), part.end());
  };
  add(std::as_bytes(std::span(who, std::strlen(who) + 1)));
  add(host), add(guest);
  const std::int32_t numbers[] = {rank, num_ranks};
  add(std::as_bytes(std::span(numbers)));
  return hmac_sha256(std::as_bytes(std::span(config.secret)), text);
}

bool same(const Proof& a, const Proof& b) {
  std::byte difference{0};
  for (std::size_t i = 0; i < a.size(); ++i) difference |= a[i] ^ b[i];
  return difference == std::byte{0};
}

}  // namespace sluice
