// nccl_rail.h - what crosses the network: a communicator of NCCL between the ranks of one local
// index, one on each host.
//
//   host a          host b
//   rank 0 <------> rank 2      rail 0
//   rank 1 <------> rank 3      rail 1
//
// Rails need no more connections than a network card for each GPU has use for. And NCCL then never
// sees two ranks of one host, which it would connect by paths of its own.
//
// No wait is longer than the timeout and two seconds. The communicator does not block. A thread
// looks at its errors, at who is gone, and at words that the device writes before and after each
// operation. If one of these says that an operation has failed or takes too long, it aborts the
// communicator, which ends the kernels that wait in it. So a stream that the program waits for
// ends, too, also where a captured graph is replayed without a call of this library.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "sluice/error.h"
#include "transport/nccl_api.h"
#include "transport/rails.h"
#include "transport/tcp_link.h"

namespace sluice {

struct NcclRailConfig {
  std::vector<int> members = {};        ///< The rail's ranks, by host.
  int host = 0;                         ///< This rank's index in `members`.
  std::vector<std::string> hosts = {};  ///< [num_ranks] the name of each rank's host, for messages.
  int device = 0;                       ///< CUDA device of this rank.
  NcclId id{};                          ///< The same in the whole rail; made by one of its ranks.
  std::chrono::milliseconds timeout{10'000};
};

class NcclRail final : public Rail {
 public:
  /// Collective over the rail. `api` and `link` outlive it.
  /// Throws: kPeerTimeout or kTransport naming ranks and hosts; kTransport with what NCCL says.
  NcclRail(const NcclApi& api, TcpLink& link, NcclRailConfig config);
  ~NcclRail() override;  ///< Waits for nobody: what is under way is aborted.
  NcclRail(const NcclRail&) = delete;
  NcclRail& operator=(const NcclRail&) = delete;

  [[nodiscard]] int num_hosts() const noexcept override {
    return static_cast<int>(config_.members.size());
  }
  [[nodiscard]] int host() const noexcept override { return config_.host; }
  [[nodiscard]] std::string names_of(const std::vector<int>& ranks) const override;
  void exchange(std::span<const Send> sends, std::span<const Receive> receives,
                void* stream) override;
  [[nodiscard]] int watch(RailProgress progress,
                          std::function<void(const Error&)> on_failure) override;
  void stop_watching(int watch) override;
  void check() const override;

 private:
  struct Watch {
    RailProgress progress;
    std::function<void(const Error&)> on_failure;
    std::uint64_t seen_done = 0;
    std::chrono::steady_clock::time_point since{};  // When that was seen, or there was nothing.
  };
  using Lock = std::unique_lock<std::mutex>;

  void connect();
  void settle(const char* operation);
  void look_after();
  [[nodiscard]] std::optional<Error> look(Lock& lock);
  [[nodiscard]] std::optional<Error> error_of(int status, const char* call) const;
  [[nodiscard]] std::optional<Error> gone_error(const std::string& operation) const;
  [[nodiscard]] Error late_error(const std::string& operation) const;
  [[nodiscard]] Error with_names(const Error& said, const std::string& operation) const;
  [[nodiscard]] std::string place(const std::string& operation) const;
  void fail_with(const Error& error, Lock& lock);
  void break_off();

  const NcclApi& api_;
  TcpLink& link_;
  const NcclRailConfig config_;
  mutable std::mutex mutex_;
  std::condition_variable ended_;
  NcclComm comm_ = nullptr;  // Null once it has failed.
  std::optional<Error> failure_;
  std::thread::id telling_;  // The thread that calls what watches have left here.
  std::condition_variable told_;
  std::map<int, Watch> watches_;
  int next_watch_ = 0;
  std::uint64_t num_begun_ = 0;  // Operations begun that no watch counts: connecting is the first.
  bool is_ending_ = false;
  std::thread thread_;
};

}  // namespace sluice
