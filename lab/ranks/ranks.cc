#include "sluice/lab/ranks.h"

#include <thread>

#include "sluice/error.h"

namespace sluice {

std::vector<std::exception_ptr> try_on_every_rank(int num_ranks,
                                                  const std::function<void(int)>& body) {
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(num_ranks));
  std::vector<std::thread> threads;
  for (int r = 0; r < num_ranks; ++r) {
    threads.emplace_back([&, r] {
      try {
        body(r);
      } catch (...) {
        failures[static_cast<std::size_t>(r)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return failures;
}

void throw_cause(const std::vector<std::exception_ptr>& failures) {
  std::exception_ptr consequence;
  for (const std::exception_ptr& failure : failures) {
    if (!failure) continue;
    try {
      std::rethrow_exception(failure);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kPeerTimeout && error.ranks().empty()) throw;
      if (!consequence) consequence = failure;
    }
  }
  if (consequence) std::rethrow_exception(consequence);
}

void on_every_rank(int num_ranks, const std::function<void(int)>& body) {
  throw_cause(try_on_every_rank(num_ranks, body));
}

}  // namespace sluice
