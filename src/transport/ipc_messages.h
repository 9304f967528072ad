// ipc_messages.h - what two processes say to each other when they meet, and the proof in it.
//
// The order of the messages is in ipc_rendezvous.h. They never leave the host, and the structs are
// sent as they lie in memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "sluice/transport.h"

namespace sluice {

using Nonce = std::array<std::byte, 32>;
using Proof = std::array<std::byte, 32>;

/// Its number counts the layouts of these messages and of IpcBoard.
inline constexpr char kGreeting[16] = "sluice ipc 2";

struct Hello {
  char greeting[16];
  Nonce nonce;
};

struct Join {
  char greeting[16];
  char version[32];
  std::int32_t rank, num_ranks;
  Nonce nonce;
  Proof proof;
};

enum class AnswerKind : std::uint32_t { kAccept = 1, kWelcome, kRefusal };

struct Answer {
  AnswerKind kind;
  Proof proof;     // Of an acceptance.
  char text[512];  // Of a refusal.
};

/// Random bytes. Throws: kTransport if the system has none.
[[nodiscard]] Nonce new_nonce();

/// Shows that `who`, "host" or "guest", knows the secret of `config`. `who` keeps a proof from
/// being sent back as another's.
[[nodiscard]] Proof prove(const IpcConfig& config, const char* who, const Nonce& host,
                          const Nonce& guest, int rank, int num_ranks);

/// Takes the same time wherever the two differ.
[[nodiscard]] bool same(const Proof& a, const Proof& b);

}  // namespace sluice
