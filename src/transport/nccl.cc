#include <algorithm>
#include <array>
#include <utility>

#include "core/fail.h"
#include "core/random_bytes.h"
#include "core/sha256.h"
#include "sluice/config.h"
#include "transport/handshake.h"
#include "transport/nccl_transport.h"
#include "transport/parts.h"
#include "transport/tcp_socket.h"

namespace sluice {
namespace {

using std::chrono::milliseconds;

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// Different in any two jobs, whatever their secrets.
std::string new_token() {
  std::array<std::byte, 16> token;
  draw_random(token);
  return to_hex(token);
}

}  // namespace

NcclTransport::NcclTransport(const NcclApi& api, const NcclConfig& config, const TcpConfig& meeting,
                             milliseconds timeout)
    : link_(meeting, timeout) {
  place_ranks(config.host.empty() ? host_id() : config.host, meeting.secret, timeout);
  if (num_hosts() == 1) return;
  SLUICE_ASSERT(api.num_devices > 0);
  const int device = config.device >= 0 ? config.device : mates_->rank() % api.num_devices;
  connect_rail(api, device, timeout);
}

/// Who is where; and the ranks of this host meet.
void NcclTransport::place_ranks(const std::string& host, const std::string& secret,
                                milliseconds timeout) {
  const std::string mine = new_token() + host;
  const auto all = link_.gather(std::as_bytes(std::span(mine)), "make_nccl_transport", timeout);
  const std::size_t token_size = new_token().size();
  for (const auto& part : all) {
    if (part.size() <= token_size) {
      fail(ErrorCode::kTransport, "make_nccl_transport: rank {} gave {} bytes, no host",
           hosts_.size(), part.size());
    }
    hosts_.push_back(text_of(std::span(part).subspan(token_size)));
    const auto first = std::ranges::find(hosts_, hosts_.back());
    const auto r = hosts_.size() - 1, f = static_cast<std::size_t>(first - hosts_.begin());
    host_of_.push_back(f == r ? num_hosts() : host_of_[f]);
    if (f == r) ranks_of_.emplace_back();
    ranks_of_[static_cast<std::size_t>(host_of_.back())].push_back(static_cast<int>(r));
  }
  for (const auto& ranks : ranks_of_) {
    if (ranks.size() == ranks_of_[0].size()) continue;
    fail(ErrorCode::kUnsupported,
         "host {} has {} ranks and host {} has {}: NCCL connects hosts with as many ranks on each",
         hosts_[0], ranks_of_[0].size(), hosts_[static_cast<std::size_t>(ranks[0])], ranks.size());
  }
  const std::string token = text_of(std::span(all[0]).first(token_size));
  const int own = host_of_[static_cast<std::size_t>(rank())];
  const std::span<const int> here = ranks_of(own);
  mates_ =
      make_ipc_transport({.job = fmt::format("{}/{}", token, own),
                          .secret = secret,
                          .rank = static_cast<int>(std::ranges::find(here, rank()) - here.begin()),
                          .num_ranks = static_cast<int>(here.size())},
                         timeout);
}

/// Each rank of host 0 makes the id of its rail.
void NcclTransport::connect_rail(const NcclApi& api, int device, milliseconds timeout) {
  const int own = host_of_[static_cast<std::size_t>(rank())];
  const auto local = static_cast<std::size_t>(mates_->rank());
  NcclRailConfig config{.host = own, .hosts = hosts_, .device = device, .timeout = timeout};
  for (int h = 0; h < num_hosts(); ++h) config.members.push_back(ranks_of(h)[local]);
  NcclId id{};
  if (own == 0) {
    if (const int status = api.new_id(&id); status != kNcclSuccess) {
      fail(ErrorCode::kTransport, "ncclGetUniqueId on rank {}: NCCL says: {}", rank(),
           api.error_string(status));
    }
  }
  const auto ids = link_.gather(id, "make_nccl_transport", timeout);
  const auto& made = ids[static_cast<std::size_t>(config.members[0])];
  SLUICE_ASSERT(made.size() == config.id.size());
  std::ranges::copy(made, config.id.begin());
  rail_.reset(new NcclRail(api, link_, std::move(config)));
}

std::unique_ptr<Window> NcclTransport::make_window(std::size_t bytes, int num_flags,
                                                   milliseconds timeout) {
  if (num_hosts() > 1) {
    fail(ErrorCode::kUnsupported,
         "make_window: transport nccl has no windows of host memory between its {} hosts",
         num_hosts());
  }
  return mates_->make_window(bytes, num_flags, timeout);
}

std::vector<std::vector<std::byte>> NcclTransport::all_gather(std::span<const std::byte> mine,
                                                              milliseconds timeout) {
  std::vector<std::vector<std::byte>> all;
  try {
    all = link_.gather(mine, "all_gather", timeout);
  } catch (const Error& error) {
    // The link knows no hosts.
    if (rail_ == nullptr || error.ranks().empty()) throw;
    fail_of_ranks(error.code(), error.ranks(), "{}: {}", error.what(),
                  rail_->names_of(error.ranks()));
  }
  check_all_gather(all, rank());
  return all;
}

std::vector<std::shared_ptr<std::byte>> NcclTransport::share_device_memory(
    std::shared_ptr<std::byte> mine, std::size_t bytes, milliseconds timeout) {
  if (num_hosts() > 1) {
    fail(
        ErrorCode::kUnsupported,
        "share_device_memory: ranks of {} hosts do not address each other's memory: what is spread "
        "over all of them, such as experts that move, stays on one host",
        num_hosts());
  }
  return mates_->share_device_memory(std::move(mine), bytes, timeout);
}

TransportCounters NcclTransport::counters() const {
  if (num_hosts() == 1) return mates_->counters();
  const auto ranks = static_cast<std::size_t>(num_ranks());
  return {.bytes_put = std::vector<std::uint64_t>(ranks),
          .puts = std::vector<std::uint64_t>(ranks)};
}

Hosts NcclTransport::hosts() const {
  return num_hosts() == 1 ? Hosts() : Hosts::create(host_of_);
}

ProcessGroup group_of_communicator(const NcclApi& api, NcclComm comm, milliseconds timeout) {
  check_argument(comm != nullptr, "nccl_comm is null, not a communicator");
  const auto check = [&api](int status, const char* call) {
    if (status == kNcclSuccess) return;
    fail(ErrorCode::kTransport, "{} of the caller's communicator: NCCL says: {}", call,
         api.error_string(status));
  };
  ProcessGroup group;
  check(api.count(comm, &group.num_ranks), "ncclCommCount");
  check(api.user_rank(comm, &group.rank), "ncclCommUserRank");
  group.all_gather = [&api, comm, timeout, check, rank = group.rank,
                      num_ranks = static_cast<std::size_t>(group.num_ranks)](
                         std::span<const std::byte> mine) {
    check_argument(!mine.empty(),
                   "all_gather of 0 bytes, over the caller's communicator on rank {}", rank);
    std::vector<std::byte> all(num_ranks * mine.size());
    const int status = api.gather(comm, mine.data(), mine.size(), all.data(), timeout);
    if (status == kNcclTimedOut) {
      fail(ErrorCode::kPeerTimeout,
           "ncclAllGather over the caller's communicator on rank {}: after {} ms not all of its {} "
           "ranks have come",
           rank, timeout.count(), num_ranks);
    }
    check(status, "ncclAllGather");
    std::vector<std::vector<std::byte>> parts;
    for (std::size_t r = 0; r < num_ranks; ++r) {
      const auto part = std::span(all).subspan(r * mine.size(), mine.size());
      parts.emplace_back(part.begin(), part.end());
    }
    return parts;
  };
  return group;
}

ProcessGroup group_of_communicator(void* nccl_comm, const NcclConfig& config,
                                   milliseconds timeout) {
  return group_of_communicator(nccl_library(config.library), nccl_comm, timeout);
}

std::unique_ptr<Transport> make_nccl_transport(const NcclConfig& config, const TcpConfig& meeting,
                                               milliseconds timeout) {
  FileDescriptor listener(meeting.listener);  // Closed if this rank has no library or no GPU.
  const NcclApi& api = nccl_library(config.library);
  if (api.num_devices == 0) {
    fail(ErrorCode::kUnsupported,
         "transport 'nccl' needs a GPU for each rank: rank {} sees no CUDA device", meeting.rank);
  }
  check_argument(config.device >= -1 && config.device < api.num_devices,
                 "device {} of rank {} is not in [-1, {})", config.device, meeting.rank,
                 api.num_devices);
  (void)listener.release();  // The transport closes it.
  return std::make_unique<NcclTransport>(api, config, meeting, timeout);
}

std::unique_ptr<Transport> make_nccl_transport(const NcclConfig& config, const ProcessGroup& group,
                                               milliseconds timeout) {
  return make_nccl_transport(config, agree_on_meeting(group), timeout);
}

std::unique_ptr<Transport> make_nccl_transport(const NcclConfig& config, const JobPlace& place,
                                               milliseconds timeout) {
  if (place.num_ranks_on_host == place.num_ranks) {
    (void)nccl_library(config.library);  // Refuses before others are waited for.
    const auto ipc = make_ipc_transport({.job = place.job,
                                         .secret = place.secret,
                                         .rank = place.rank,
                                         .num_ranks = place.num_ranks},
                                        timeout);
    const auto all_gather = [&](std::span<const std::byte> mine) {
      return ipc->all_gather(mine, timeout);
    };
    return make_nccl_transport(config, ProcessGroup{place.rank, place.num_ranks, all_gather},
                               timeout);
  }
  check_argument(!place.meeting.empty(),
                 "SLUICE_MEETING='' names no place, host:port, where rank 0 can be reached by the "
                 "job's {} ranks, of which {} are on this host; nor do MASTER_ADDR and MASTER_PORT",
                 place.num_ranks, place.num_ranks_on_host);
  check_argument(place.has_own_secret,
                 "SLUICE_SECRET='' proves nothing: processes that meet at {} need a secret of the "
                 "job, the same in all of them",
                 place.meeting);
  check_secret(place.secret, "SLUICE_SECRET");
  try {
    (void)parse_address(place.meeting);
  } catch (const Error& error) {
    fail(error.code(), "SLUICE_MEETING: {}", error.what());
  }
  return make_nccl_transport(config,
                             TcpConfig{.addresses = {place.meeting},
                                       .secret = place.secret,
                                       .rank = place.rank,
                                       .num_ranks = place.num_ranks},
                             timeout);
}

}  // namespace sluice
