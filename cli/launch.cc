#include "launch.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <optional>

#include "command.h"
#include "report.h"
#include "sluice/config.h"
#include "sluice/lab/ranks.h"
#include "sluice/network.h"

namespace sluice::cli {
namespace {

using std::chrono::milliseconds;

/// How long the ranks that failed wait to hear of each other.
constexpr milliseconds kReportTimeout{600};
constexpr milliseconds kGoodbyeTimeout{5'000};
/// What processes that failed may take to say so, beyond their timeouts.
constexpr milliseconds kPatience{10'000};

struct Cause {
  ErrorCode code;
  std::string text;
  bool blames_peers = false;  ///< It names ranks that failed, and is their consequence.
};

Cause cause_of(const Error& error) {
  return {error.code(), error.what(),
          error.code() == ErrorCode::kPeerTimeout || !error.ranks().empty()};
}

/// Two characters for the code and whom it blames, then the text; empty without a cause.
std::string encode(const std::optional<Cause>& cause) {
  if (!cause) return "";
  std::string text{static_cast<char>('A' + static_cast<int>(cause->code)),
                   cause->blames_peers ? 'p' : '-'};
  return text += cause->text;
}

/// The first cause by rank; one that blames peers only if there is nothing else.
Error worst(const std::vector<std::string>& texts) {
  std::size_t rank = texts.size();
  for (std::size_t r = texts.size(); r-- > 0;) {
    if (texts[r].empty()) continue;
    const bool have_cause = rank < texts.size() && texts[rank][1] != 'p';
    if (texts[r][1] != 'p' || !have_cause) rank = r;
  }
  const auto same = std::ranges::count(texts, texts[rank]);
  const std::string who = same == static_cast<std::ptrdiff_t>(texts.size())
                              ? std::string("every rank: ")
                              : fmt::format("rank {}: ", rank);
  return {static_cast<ErrorCode>(texts[rank][0] - 'A'), who + texts[rank].substr(2)};
}

/// Among the processes that a launcher started.
std::unique_ptr<Transport> make_ipc_world(milliseconds timeout) {
  const auto place = read_job_place();
  if (!place) throw Error(ErrorCode::kInternal, "no launcher has given this process a rank");
  if (place->num_ranks_on_host != place->num_ranks) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("--transport ipc stays on one host: {} of the job's {} ranks are here",
                            place->num_ranks_on_host, place->num_ranks));
  }
  return make_ipc_transport({.job = place->job,
                             .secret = place->secret,
                             .rank = place->rank,
                             .num_ranks = place->num_ranks},
                            timeout);
}

/// The same, on any number of hosts.
std::unique_ptr<Transport> make_nccl_world(milliseconds timeout) {
  const auto place = read_job_place();
  if (!place) {
    throw Error(ErrorCode::kInvalidArgument,
                "--transport nccl: no launcher has given this process a rank: RANK (torchrun), "
                "OMPI_COMM_WORLD_RANK (mpirun), SLURM_PROCID (srun) and SLUICE_RANK are not set");
  }
  return make_nccl_transport({.device = -1}, *place, timeout);
}

std::unique_ptr<Transport> make_world(const std::string& transport, milliseconds timeout) {
  if (transport == "mpi") return make_mpi_transport(timeout);
  return transport == "nccl" ? make_nccl_world(timeout) : make_ipc_world(timeout);
}

}  // namespace

void check_transport(const std::string& transport, const std::string& backend) {
  if (transport != "nccl" || backend == "cuda") return;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("--transport nccl moves the memory of GPUs, --backend is {}: use "
                          "--backend cuda, or --transport mpi for ranks of several hosts",
                          backend));
}

bool ran_as_processes(const std::string& transport, int num_ranks, milliseconds timeout,
                      Output& output) {
  if (transport != "ipc" || read_job_place()) return false;
  output.exit_status =
      run_as_processes(num_ranks, 2 * timeout + kPatience, [](int rank, int signal) {
        fmt::print(stderr, "error: rank {}: signal {} ({}) ended its process\n", rank, signal,
                   strsignal(signal));
      });
  output.json_path.clear();
  return true;
}

Launch::Launch(const std::string& transport, int num_ranks, milliseconds timeout, Output& output)
    : num_ranks_(std::max(1, num_ranks)), timeout_(timeout), output_(output) {
  if (transport == "inproc") return;
  is_mpi_ = transport == "mpi";
  world_ = make_world(transport, timeout);
  has_processes_ = true;
  rank_ = world_->rank();
  num_ranks_ = world_->num_ranks();
  if (rank_ != 0) {
    output.json_path.clear();
    if (std::freopen("/dev/null", "w", stdout) == nullptr) {
      throw Error(ErrorCode::kIo, "cannot open /dev/null");
    }
  }
  find_place();
  together([&] {
    if (num_ranks == 0 || num_ranks == num_ranks_) return;
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--ranks {} over {}: the job has {} processes, one for each rank",
                            num_ranks, transport, num_ranks_));
  });
}

void Launch::find_place() {
  char machine[256] = {};
  (void)gethostname(machine, sizeof(machine) - 1);
  hosts_ = gather(host_id(), timeout_);
  // A GPU is one of its host's, as transport nccl counts; cores are shared by the whole machine.
  const std::string name = world_->name() == "nccl" ? host_id() : machine;
  const auto hosts = gather(name, timeout_);
  place_ = {0, 0};
  for (std::size_t r = 0; r < hosts.size(); ++r) {
    if (hosts[r] != name) continue;
    place_.local_rank += static_cast<int>(r) < rank_;
    ++place_.num_local_ranks;
  }
}

Launch::Place Launch::place_of(int rank) const {
  return world_ ? place_ : Place{rank, num_ranks_};
}

std::vector<std::string> Launch::gather(std::string mine, milliseconds timeout) const {
  // An odd number of bytes, which no other collective gathers: a rank that failed in the middle
  // comes here while the others may still be in one of those, and then all must notice.
  std::byte size[17] = {};
  const std::uint64_t length = mine.size();
  std::memcpy(size, &length, sizeof(length));
  std::vector<std::uint64_t> sizes;
  for (const auto& part : world_->all_gather(size, timeout)) {
    std::memcpy(&sizes.emplace_back(), part.data(), sizeof(length));
  }
  mine.resize(*std::ranges::max_element(sizes));
  const auto parts = world_->all_gather(std::as_bytes(std::span(mine)), timeout);
  std::vector<std::string> result;
  for (std::size_t r = 0; r < parts.size(); ++r) {
    result.emplace_back(reinterpret_cast<const char*>(parts[r].data()), sizes[r]);
  }
  return result;
}

void Launch::together(const std::function<void()>& body) {
  if (!world_) return body();
  std::optional<Cause> mine;
  try {
    body();
  } catch (const Error& error) {
    mine = cause_of(error);
  } catch (const std::exception& error) {
    mine = cause_of(error_of(error));
  }
  // Who failed by itself waits for those who will time out because of it; who timed out does not
  // wait for the missing much longer.
  const bool is_consequence = mine && mine->code == ErrorCode::kPeerTimeout;
  std::vector<std::string> texts;
  try {
    texts = gather(encode(mine), is_consequence ? kReportTimeout : timeout_ + kReportTimeout);
  } catch (const Error& error) {
    // Not everybody answers, so each says what it knows; and MPI cannot be ended.
    if (!mine) mine = cause_of(error);
    throw Error(mine->code, fmt::format("rank {}: {}", rank_, mine->text));
  }
  if (std::ranges::all_of(texts, [](const auto& text) { return text.empty(); })) return;
  // Printed before anybody leaves: mpirun ends all processes as soon as one has failed.
  const Error error = worst(texts);
  if (is_reporter()) print_error(error);
  output_.is_silent = true;
  finish();
  throw error;
}

void Launch::check_alike(const std::vector<Option>& options) {
  if (!world_) return;
  std::vector<std::vector<std::string>> values;  // Of each option, by rank.
  together([&] {
    for (const Option& option : options) values.push_back(gather(option.value, timeout_));
  });
  together([&] {
    for (std::size_t i = 0; i < options.size(); ++i) {
      const auto& of = values[i];
      const auto other = std::ranges::find_if(of, [&](const auto& v) { return v != of[0]; });
      if (other == of.end()) continue;
      throw Error(ErrorCode::kTransport,
                  fmt::format("ranks disagree on {}: rank 0 has '{}', rank {} has '{}'; give every "
                              "process the same arguments",
                              options[i].name, of[0], other - of.begin(), *other));
    }
  });
}

std::vector<std::string> Launch::run_ranks(
    const std::function<std::string(int, Transport&)>& body) {
  std::vector<std::string> results(static_cast<std::size_t>(num_ranks_));
  if (world_) {
    std::string mine;
    together([&] { mine = body(rank_, *world_); });
    together([&] { results = gather(std::move(mine), timeout_); });
    return results;
  }
  auto transports = make_inproc_transports(num_ranks_);
  on_every_rank(num_ranks_, [&](int r) {
    const auto i = static_cast<std::size_t>(r);
    results[i] = body(r, *transports[i]);
  });
  return results;
}

void Launch::finish() {
  if (!world_) return;
  world_.reset();
  if (is_mpi_ && !end_mpi(kGoodbyeTimeout)) {
    throw Error(ErrorCode::kPeerTimeout,
                fmt::format("rank {}: the ranks did not reach the end within {} ms of each other",
                            rank_, kGoodbyeTimeout.count()));
  }
}

}  // namespace sluice::cli
