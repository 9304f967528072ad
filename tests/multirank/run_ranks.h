// run_ranks.h - runs one body per rank, each with its transport: threads here, processes elsewhere.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "sluice/error.h"
#include "sluice/transport.h"

namespace sluice::testing {

/// Puts something between a rank and its transport, to inject faults.
using WrapTransport = std::function<std::unique_ptr<Transport>(int, std::unique_ptr<Transport>)>;

/// Runs body(transport) on a thread for each rank; returns what each threw, null for nothing.
template <class Body>
std::vector<std::exception_ptr> try_ranks(int num_ranks, const Body& body,
                                          const WrapTransport& wrap = {}) {
  auto transports = make_inproc_transports(num_ranks);
  std::vector<std::exception_ptr> failures(transports.size());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      const auto r = static_cast<std::size_t>(rank);
      try {
        std::unique_ptr<Transport> transport = std::move(transports[r]);
        if (wrap) transport = wrap(rank, std::move(transport));
        body(*transport);
      } catch (...) {
        failures[r] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return failures;
}

template <class Body>
void run_ranks(int num_ranks, const Body& body) {
  for (const auto& failure : try_ranks(num_ranks, body)) {
    if (failure) std::rethrow_exception(failure);
  }
}

/// Code and text of a failure.
struct Failure {
  ErrorCode code = ErrorCode::kInternal;
  std::string text;
};
inline std::optional<Failure> describe(const std::exception_ptr& failure) {
  if (!failure) return std::nullopt;
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    return Failure{error.code(), error.what()};
  } catch (const std::exception& error) {
    return Failure{ErrorCode::kInternal, error.what()};
  }
}

}  // namespace sluice::testing
