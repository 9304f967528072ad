// What a machine's numbers are called, and machines in files.
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>

#include "core/fail.h"
#include "core/regular_file.h"
#include "sluice/lab/network_model.h"

namespace sluice {
namespace {

// A rate that a machine has is no less than kLeastRate, so that every time is finite.
constexpr double kLeastRate = 1e-3, kMostRate = 1e6, kMostTime = 1e6;

constexpr std::array kParameters = {
    MachineParameter{"network_gbytes_per_s", "GB/s",
                     "a rank sends to other hosts, and receives as much at a time",
                     &MachineModel::network_gbytes_per_s, kLeastRate, kMostRate},
    MachineParameter{"network_latency_us", "us", "one crossing of the network, without its bytes",
                     &MachineModel::network_latency_us, 0, kMostTime},
    MachineParameter{"network_peer_us", "us", "a crossing takes longer for each other host",
                     &MachineModel::network_peer_us, 0, kMostTime},
    MachineParameter{"host_sync_us", "us", "normal mode over hosts: the CPU waits for counts",
                     &MachineModel::host_sync_us, 0, kMostTime},
    MachineParameter{"push_gbytes_per_s", "GB/s",
                     "a device stores to others of its host while they store to it",
                     &MachineModel::push_gbytes_per_s, kLeastRate, kMostRate},
    MachineParameter{"pull_gbytes_per_s", "GB/s",
                     "a device loads from others of its host while they load from it",
                     &MachineModel::pull_gbytes_per_s, kLeastRate, kMostRate},
    MachineParameter{"dispatch_fixed_us", "us", "a dispatch inside a host, without its bytes",
                     &MachineModel::dispatch_fixed_us, 0, kMostTime},
    MachineParameter{"combine_fixed_us", "us", "a combine inside a host, without its bytes",
                     &MachineModel::combine_fixed_us, 0, kMostTime},
    MachineParameter{"normal_fixed_us", "us", "normal mode: the kernel that copies tokens to rows",
                     &MachineModel::normal_fixed_us, 0, kMostTime},
    MachineParameter{"place_gbytes_per_s", "GB/s",
                     "a sender reads its tokens and puts its own rows into place",
                     &MachineModel::place_gbytes_per_s, kLeastRate, kMostRate},
    MachineParameter{"memory_gbytes_per_s", "GB/s",
                     "copies of tokens to rows, and sums of rows, read and written",
                     &MachineModel::memory_gbytes_per_s, kLeastRate, kMostRate},
    MachineParameter{"overlap", "share",
                     "of the shorter of network and steps inside a host that lies beside the other",
                     &MachineModel::overlap, 0, 1},
    MachineParameter{"stage_factor", "factor", "on the measured times of the experts' stage",
                     &MachineModel::stage_factor, 1e-3, 1e3},
};

}  // namespace

std::span<const MachineParameter> machine_parameters() noexcept {
  return kParameters;
}

void set_parameter(MachineModel& machine, std::string_view name, double value) {
  std::string known;
  for (const MachineParameter& p : kParameters) {
    if (name == p.name) {
      check_argument(value >= p.low && value <= p.high, "{} {} is not in {} .. {} {}", name, value,
                     p.low, p.high, p.unit);
      machine.*p.value = value;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + p.name;
  }
  fail(ErrorCode::kInvalidArgument, "parameter '{}' is none of: {}", name, known);
}

MachineModel read_machine(const std::filesystem::path& path) {
  const std::string text = read_text(path);
  const auto json = nlohmann::json::parse(text, nullptr, false);
  const auto corrupt = [&](const std::string& what) {
    fail(ErrorCode::kCorruptFile, "{}: {}", path.string(), what);
  };
  if (!json.is_object()) corrupt("is no JSON object");
  if (!json.contains("parameters") || !json.at("parameters").is_object()) {
    corrupt("has no object \"parameters\"");
  }
  if (!json.contains("base") || !json.at("base").is_string()) {
    corrupt("has no \"base\", the machine that all other numbers are of");
  }
  MachineModel machine = machine_preset(json.at("base").get<std::string>());
  machine.name = path.stem().string();
  machine.about = fmt::format("{} over {}", path.string(), json.at("base").get<std::string>());
  for (const auto& [name, value] : json.at("parameters").items()) {
    if (!value.is_number()) corrupt(fmt::format("parameter '{}' is no number", name));
    set_parameter(machine, name, value.get<double>());
  }
  return machine;
}

}  // namespace sluice
