#include "transport/handshake.h"

#include <fmt/core.h>

#include <cstring>
#include <span>
#include <vector>

#include "core/fail.h"
#include "core/random_bytes.h"
#include "core/sha256.h"
#include "sluice/config.h"

namespace sluice {

void check_secret(const std::string& secret, const char* name) {
  check_argument(!secret.empty(), "{} '' proves nothing", name);
  check_argument(secret.size() >= kMinSecretBytes,
                 "{} of {} bytes can be guessed; at least {} are needed, drawn at random (for "
                 "example by openssl rand -hex 16)",
                 name, secret.size(), kMinSecretBytes);
}

Nonce new_nonce() {
  Nonce nonce;
  draw_random(nonce);
  return nonce;
}

Proof prove(const std::string& secret, const char* who, const Nonce& host, const Nonce& guest,
            int rank, int num_ranks) {
  std::vector<std::byte> text;
  const auto add = [&text](std::span<const std::byte> part) {
    text.insert(text.end(), part.begin(), part.end());
  };
  add(std::as_bytes(std::span(who, std::strlen(who) + 1)));
  add(host), add(guest);
  const std::int32_t numbers[] = {rank, num_ranks};
  add(std::as_bytes(std::span(numbers)));
  return hmac_sha256(std::as_bytes(std::span(secret)), text);
}

bool same(const Proof& a, const Proof& b) {
  std::byte difference{0};
  for (std::size_t i = 0; i < a.size(); ++i) difference |= a[i] ^ b[i];
  return difference == std::byte{0};
}

std::string difference_of(const Join& join, int num_ranks, bool is_taken) {
  const std::string theirs(join.version, strnlen(join.version, sizeof(join.version)));
  if (theirs != version()) {
    return fmt::format("ranks disagree on version: rank 0 has 'sluice {}', rank {} has '{}'",
                       version(), join.rank, "sluice " + theirs);
  }
  if (join.num_ranks != num_ranks) {
    return fmt::format("ranks disagree on num_ranks: rank 0 has '{}', rank {} has '{}'", num_ranks,
                       join.rank, join.num_ranks);
  }
  if (join.rank < 1 || join.rank >= num_ranks) {
    return fmt::format("a process claims rank {} of {}", join.rank, num_ranks);
  }
  return is_taken ? fmt::format("two processes claim rank {}", join.rank) : "";
}

Join answer_to(const Hello& hello, const std::string& secret, const char* who, int rank,
               int num_ranks) {
  Join join{};
  join.greeting = hello.greeting;
  std::strncpy(join.version, version(), sizeof(join.version) - 1);
  join.rank = rank, join.num_ranks = num_ranks;
  join.nonce = new_nonce();
  join.proof = prove(secret, who, hello.nonce, join.nonce, rank, num_ranks);
  return join;
}

}  // namespace sluice
