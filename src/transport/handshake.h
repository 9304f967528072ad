// handshake.h - what two processes say to each other when they meet, and the proof in it.
//
//   guest                                         host, which listens
//     connect ------------------------------------>
//     <------------------------------ Hello: nonce
//     Join: rank, nonce, proof -------------------->   checks proof, version, rank
//     <------------------- Answer: proof, kAccept
//
// A proof is an HMAC over both nonces, the rank and the number of ranks; the secret never travels.
// The structs are sent as they lie in memory, between little-endian machines alone. What follows
// an acceptance is the business of each meeting (ipc_rendezvous.h, tcp_link.h).
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>

namespace sluice {

using Nonce = std::array<std::byte, 32>;
using Proof = std::array<std::byte, 32>;
/// Names a kind of meeting, and counts the layouts of its messages.
using Greeting = std::array<char, 16>;
static_assert(std::endian::native == std::endian::little);

struct Hello {
  Greeting greeting;
  Nonce nonce;
};

struct Join {
  Greeting greeting;
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

/// Whoever hears one handshake, or listens where rank 0 should, can try secrets on its proof at
/// leisure. 16 hexadecimal digits are 64 bits: 29 years on average at 10^10 tries a second.
inline constexpr std::size_t kMinSecretBytes = 16;

/// Throws: kInvalidArgument for a secret that can be guessed, naming its length as `name`'s, never
/// the secret.
void check_secret(const std::string& secret, const char* name);

/// Random bytes. Throws: kTransport if the system has none.
[[nodiscard]] Nonce new_nonce();

/// Shows that `who`, "host" or "guest", knows `secret`. `who` keeps a proof from being sent back as
/// another's, or to another kind of meeting.
[[nodiscard]] Proof prove(const std::string& secret, const char* who, const Nonce& host,
                          const Nonce& guest, int rank, int num_ranks);

/// Takes the same time wherever the two differ.
[[nodiscard]] bool same(const Proof& a, const Proof& b);

/// How the version, number and place of a guest differ from the host's; empty if they do not.
/// `is_taken`: another process has that rank already.
[[nodiscard]] std::string difference_of(const Join& join, int num_ranks, bool is_taken);

/// A guest's answer to `hello`, with its proof.
[[nodiscard]] Join answer_to(const Hello& hello, const std::string& secret, const char* who,
                             int rank, int num_ranks);

}  // namespace sluice
