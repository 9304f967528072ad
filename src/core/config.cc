#include "sluice/config.h"

#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <fstream>
#include <string_view>

#include "core/fail.h"

namespace sluice {
namespace {

std::string text_of(const char* name) {
  const char* const text = std::getenv(name);
  return text != nullptr ? text : "";
}

int number_of(const char* name, int least, int most) {
  const std::string text = text_of(name);
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  check_argument(
      error == std::errc{} && end == text.data() + text.size() && value >= least && value <= most,
      "{}='{}' is not a whole number in [{}, {}]", name, text, least, most);
  return value;
}

/// Which variables a launcher sets. `local_size` and `num_hosts` may be missing: then all ranks are
/// on one host.
struct Launcher {
  const char *rank, *size, *local_size, *num_hosts;
  const char* identity[3];  // Together they name the job; missing ones count as empty.
};

constexpr Launcher kLaunchers[] = {
    {"SLUICE_RANK", "SLUICE_WORLD_SIZE", "SLUICE_LOCAL_WORLD_SIZE", "", {"SLUICE_JOB", "", ""}},
    {"RANK",
     "WORLD_SIZE",
     "LOCAL_WORLD_SIZE",
     "",
     {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}},
    {"OMPI_COMM_WORLD_RANK",
     "OMPI_COMM_WORLD_SIZE",
     "OMPI_COMM_WORLD_LOCAL_SIZE",
     "",
     {"OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE", ""}},
    {"SLURM_PROCID",
     "SLURM_NTASKS",
     "",
     "SLURM_STEP_NUM_NODES",
     {"SLURM_JOB_ID", "SLURM_STEP_ID", ""}},
};

/// How many ranks are on this host. Where only the number of hosts is known, an even share.
int ranks_on_host(const Launcher& launcher, int num_ranks) {
  if (!text_of(launcher.local_size).empty()) return number_of(launcher.local_size, 1, num_ranks);
  if (text_of(launcher.num_hosts).empty()) return num_ranks;
  const int num_hosts = number_of(launcher.num_hosts, 1, num_ranks);
  return (num_ranks + num_hosts - 1) / num_hosts;
}

std::string meeting_address() {
  const std::string given = text_of("SLUICE_MEETING");
  if (!given.empty()) return given;
  const std::string host = text_of("MASTER_ADDR");
  if (host.empty() || text_of("MASTER_PORT").empty()) return "";
  const int port = number_of("MASTER_PORT", 1, 65'534) + 1;
  return host.find(':') == std::string::npos ? fmt::format("{}:{}", host, port)
                                             : fmt::format("[{}]:{}", host, port);
}

}  // namespace

std::optional<JobPlace> read_job_place() {
  constexpr int kMostRanks = 1 << 20;
  for (const Launcher& launcher : kLaunchers) {
    if (text_of(launcher.rank).empty()) continue;
    JobPlace place;
    place.num_ranks = number_of(launcher.size, 1, kMostRanks);
    place.rank = number_of(launcher.rank, 0, place.num_ranks - 1);
    place.num_ranks_on_host = ranks_on_host(launcher, place.num_ranks);
    for (const char* name : launcher.identity) place.job += text_of(name) + "/";
    check_argument(place.job != "///", "{} is set, but not {}: nothing names the job",
                   launcher.rank, launcher.identity[0]);
    place.secret = text_of("SLUICE_SECRET");
    place.has_own_secret = !place.secret.empty();
    if (place.secret.empty()) place.secret = place.job;
    if (place.num_ranks_on_host != place.num_ranks) place.meeting = meeting_address();
    return place;
  }
  return std::nullopt;
}

Environment read_environment() {
  Environment environment;
  if (const char* text = std::getenv("SLUICE_DISPATCH_DTYPE")) {
    try {
      environment.dispatch_dtype = parse_dispatch_dtype(text);
    } catch (const Error& error) {
      fail(ErrorCode::kInvalidArgument, "SLUICE_DISPATCH_DTYPE: {}", error.what());
    }
  }
  if (const char* text = std::getenv("SLUICE_TIMEOUT_MS")) {
    const std::string_view view = text;
    int ms = 0;
    const auto [end, error] = std::from_chars(view.data(), view.data() + view.size(), ms);
    check_argument(
        error == std::errc{} && end == view.data() + view.size() && ms >= 1 && ms <= 3'600'000,
        "SLUICE_TIMEOUT_MS='{}' is not a whole number of milliseconds in [1, 3600000]", view);
    environment.peer_timeout = std::chrono::milliseconds(ms);
  }
  return environment;
}

std::string host_id() {
  const std::string named = text_of("NCCL_HOSTID");
  if (!named.empty()) return named;
  char name[256] = {};
  (void)gethostname(name, sizeof(name) - 1);
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot;
  return std::getline(file, boot) ? fmt::format("{} {}", name, boot) : name;
}

const char* version() noexcept {
  return SLUICE_VERSION;
}

}  // namespace sluice
