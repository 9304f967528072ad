// mpi_link_impl.h - what an MpiLink holds. Only for the sources of the transport: mpi.h is in it.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>

#include "core/home_process.h"
#include "sluice/error.h"
#include "transport/mpi_link.h"
#include "transport/mpi_start.h"

namespace sluice {

struct MpiLink::Impl {
  using Clock = std::chrono::steady_clock;
  using milliseconds = std::chrono::milliseconds;
  using Bytes = std::vector<std::byte>;

  struct Sending {
    MPI_Request request = MPI_REQUEST_NULL;
    Bytes bytes;
  };
  struct Receiving {
    MPI_Request request = MPI_REQUEST_NULL;
    Bytes bytes;
    std::size_t size = 0;
  };

  /// Both directions of one pair of processes.
  struct Peer {
    FrameWriter open;
    std::deque<Sending> sending;      // In order; MPI completes them in any.
    std::deque<Receiving> receiving;  // In order of arrival; applied in it.
    std::uint64_t next_sent = 0, next_received = 0;
    std::optional<Farewell> farewell;  // The last one that it sent.
  };

  struct Share {
    Bytes bytes;
    std::uint64_t arrived = 0;
  };

  explicit Impl(const MpiStart& start)
      : rank(start.rank),
        num_ranks(start.num_ranks),
        owns_mpi(start.owns_mpi),
        comm(start.comm),
        peers(static_cast<std::size_t>(start.num_ranks)),
        thread([this] { look_in(); }) {}

  const int rank, num_ranks;
  const bool owns_mpi;
  MPI_Comm comm;
  const HomeProcess home;  // MPI is of no use in a child, and `mutex` may be held there for ever.

  std::mutex mutex;  // Everything below, and every call of MPI.
  std::vector<Peer> peers;
  std::vector<Bytes> spare;
  std::map<std::pair<std::uint16_t, std::uint32_t>, std::shared_ptr<WindowMemory>> windows;
  std::map<std::tuple<std::uint16_t, std::uint32_t, int>, Share> shares;
  std::uint32_t num_groups = 0;
  std::optional<Error> failure;  // The first fatal one.

  std::condition_variable stopping;
  bool stop = false;
  std::thread thread;

  void look_in();
  void stop_thread();
  bool pump();
  bool receive();
  bool pump_peer(int source);
  void apply(int source, const Record& record, std::span<const std::byte> payload);
  void require_healthy() const;
  void ship(std::unique_lock<std::mutex>& lock, int peer, milliseconds timeout);
  void require_home() const { home.require("transport mpi"); }
  [[nodiscard]] bool all_sent() const;
  [[nodiscard]] bool all_said(Farewell farewell) const;
  [[nodiscard]] bool somebody_leaves() const;
  [[nodiscard]] Bytes take_spare();
  [[nodiscard]] Peer& peer(int r) { return peers[static_cast<std::size_t>(r)]; }
};

}  // namespace sluice
