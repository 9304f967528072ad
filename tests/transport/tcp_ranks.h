// tcp_ranks.h - ranks of a TcpLink as threads of a test, which meet at a port that was free.
#pragma once

#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "sluice/error.h"
#include "support/processor_wait.h"
#include "transport/tcp_link.h"
#include "transport/tcp_socket.h"

namespace sluice::testing {

/// Longer than any wait of these tests lasts, unless it is to end at its timeout.
inline constexpr std::chrono::milliseconds kLong{60'000};

/// A job at a port of its own. Rank 0 may come late: the port is known before anybody listens.
struct TcpJob {
  explicit TcpJob(int num_ranks_in) : num_ranks(num_ranks_in) {
    const FileDescriptor listener =
        listen_over_tcp("127.0.0.1:0", std::chrono::steady_clock::now() + kLong);
    address = "127.0.0.1:" + std::to_string(port_of_listener(listener.get()));
  }
  [[nodiscard]] TcpConfig config(int rank) const {
    return {.addresses = {address}, .secret = secret, .rank = rank, .num_ranks = num_ranks};
  }

  int num_ranks;
  std::string address;
  std::string secret = "not in any message";
};

/// What a rank threw, and after how long, without the time for which threads of this process had no
/// processor; no text if it threw nothing.
struct TcpOutcome {
  ErrorCode code = ErrorCode::kInternal;
  std::string text;
  std::vector<int> ranks;
  std::chrono::milliseconds took{0};
};

/// A rank on a thread of its own: it joins, and then runs `body`.
inline std::future<TcpOutcome> start_rank(
    const TcpConfig& config, std::chrono::milliseconds timeout,
    std::function<void(TcpLink&)> body = [](TcpLink&) {}) {
  return std::async(std::launch::async, [config, timeout, body = std::move(body)] {
    ProcessorWait waited;
    const auto begin = std::chrono::steady_clock::now();
    TcpOutcome outcome;
    try {
      TcpLink link(config, timeout);
      body(link);
    } catch (const Error& error) {
      outcome = {error.code(), error.what(), error.ranks(), {}};
    }
    outcome.took = std::chrono::duration_cast<std::chrono::milliseconds>(
        std::chrono::steady_clock::now() - begin - waited.so_far());
    return outcome;
  });
}

}  // namespace sluice::testing
