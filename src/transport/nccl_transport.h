// nccl_transport.h - the ranks of several hosts: a rail of NCCL between hosts, ipc within each.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/home_process.h"
#include "sluice/network.h"
#include "transport/nccl_api.h"
#include "transport/nccl_rail.h"
#include "transport/rails.h"
#include "transport/tcp_link.h"

namespace sluice {

/// group_of_communicator() over any table of functions, which outlives the group.
[[nodiscard]] ProcessGroup group_of_communicator(const NcclApi& api, NcclComm comm,
                                                 std::chrono::milliseconds timeout);

class NcclTransport final : public RailTransport {
 public:
  /// Collective. `api` outlives it. Throws as make_nccl_transport() does.
  NcclTransport(const NcclApi& api, const NcclConfig& config, const TcpConfig& meeting,
                std::chrono::milliseconds timeout);

  [[nodiscard]] int rank() const noexcept override { return link_.rank(); }
  [[nodiscard]] int num_ranks() const noexcept override { return link_.num_ranks(); }
  [[nodiscard]] std::string name() const override { return "nccl"; }
  /// Within one host.
  [[nodiscard]] std::unique_ptr<Window> make_window(std::size_t bytes, int num_flags,
                                                    std::chrono::milliseconds timeout) override;
  [[nodiscard]] std::vector<std::vector<std::byte>> all_gather(
      std::span<const std::byte> mine, std::chrono::milliseconds timeout) override;
  /// Within one host.
  [[nodiscard]] std::vector<std::shared_ptr<std::byte>> share_device_memory(
      std::shared_ptr<std::byte> mine, std::size_t bytes,
      std::chrono::milliseconds timeout) override;
  [[nodiscard]] TransportCounters counters() const override;
  [[nodiscard]] Hosts hosts() const override;

  /// [num_ranks] the host of each rank, numbered in the order of their first ranks.
  [[nodiscard]] std::span<const int> host_of_rank() const noexcept { return host_of_; }
  [[nodiscard]] int num_hosts() const noexcept { return static_cast<int>(ranks_of_.size()); }
  /// The ranks of a host, ascending: their local indices are their places here.
  [[nodiscard]] std::span<const int> ranks_of(int host) const {
    return ranks_of_[static_cast<std::size_t>(host)];
  }
  [[nodiscard]] NcclRail* rail() const noexcept override { return rail_.get(); }
  /// Over ipc.
  [[nodiscard]] Transport& mates() const noexcept override { return *mates_; }

 private:
  void place_ranks(const std::string& host, const std::string& secret,
                   std::chrono::milliseconds timeout);
  void connect_rail(const NcclApi& api, int device, std::chrono::milliseconds timeout);

  TcpLink link_;
  std::vector<std::string> hosts_;  // [num_ranks] names.
  std::vector<int> host_of_;        // [num_ranks]
  std::vector<std::vector<int>> ranks_of_;
  std::unique_ptr<Transport> mates_;
  std::unique_ptr<NcclRail, DeletedAtHome<NcclRail>> rail_;  // It has a thread.
};

}  // namespace sluice
