// The built-in machines. Each number has its source beside it.
#include <span>

#include "core/fail.h"
#include "sluice/lab/network_model.h"

namespace sluice {
namespace {

struct Number {
  const char* parameter;
  double value;
  const char* source;
};

// One host of H200s, a GPU for each rank.
constexpr Number kH200[] = {
    {"push_gbytes_per_s", 362,
     "bench_link, bulk copies both ways at once: two H200s over NVLink, "
     "docs/performance-exchange.md, What the link gives"},
    {"pull_gbytes_per_s", 331, "bench_link, loads both ways at once: the same place"},
    {"dispatch_fixed_us", 7,
     "fixed time of dispatch: docs/performance-exchange.md, What bounds it"},
    {"combine_fixed_us", 6, "fixed time of combine: the same place"},
    {"normal_fixed_us", 15,
     "what normal mode takes beyond low-latency mode's latency and its own "
     "bytes at 128 tokens: docs/performance-exchange.md, Normal mode"},
    {"place_gbytes_per_s", 1750,
     "4096 tokens in 103 us without copies and link: "
     "docs/performance-exchange.md, What bounds it"},
    {"memory_gbytes_per_s", 3100, "the receiver's copies, 121 MB in 39 us: the same place"},
};

// What a network of one 400 Gb/s port for each GPU adds.
constexpr Number kIb400[] = {
    {"network_gbytes_per_s", 45,
     "ConnectX-7 of 400 Gb/s: DeepEP's tables (docs/legacy.md, README.md) less their own host's "
     "share are 43.5 to 46 GB/s; NCCL's maintainers expect 46 to 48 (nccl-tests issue 290)"},
    {"network_latency_us", 17,
     "29 us fixed in DeepEP's low-latency table over EP16 to EP256, less 12 us over NVLink alone"},
    {"network_peer_us", 2.2,
     "assumed of NCCL: 8 MiB all-to-all of 64 H800s take 296 us (nccl issue 1531), 163 us of "
     "bytes at 45 GB/s and 10.6 us as in one host (DeepEP issue 303); the rest by 56 peers"},
    {"host_sync_us", 20,
     "a call of normal mode that is not captured takes 10 to 22 us of the CPU: "
     "docs/performance-exchange.md, Dispatch and combine"},
};

// Eight ranks as streams of one H200: every row stays in one memory.
constexpr Number kOneCard[] = {
    {"dispatch_fixed_us", 10.4, "one token: docs/performance-exchange.md, Eight ranks on one GPU"},
    {"combine_fixed_us", 7.5, "the same"},
    {"normal_fixed_us", 15, "as with a GPU for each rank"},
    {"place_gbytes_per_s", 3200,
     "75 MB in 22 us at 128 tokens, 602 MB in 195 us at 1024: the same"},
    {"memory_gbytes_per_s", 3650, "132 MB in 36 us at 128 tokens, 1057 MB in 282 us: the same"},
};

// DeepEP's kernels, to compare with: their figures are what the model of bytes is checked against.
constexpr Number kDeepEpLowLatency[] = {
    {"network_gbytes_per_s", 45, "DeepEP docs/legacy.md, low-latency table: the line through it"},
    {"push_gbytes_per_s", 160, "H800's NVLink as DeepEP docs/legacy.md states it"},
    {"pull_gbytes_per_s", 160, "the same"},
    {"dispatch_fixed_us", 29, "DeepEP docs/legacy.md, low-latency table: the line through it"},
    {"combine_fixed_us", 29, "the same"},
    {"overlap", 1, "rows go straight to their ranks, over network and link at a time"},
};
constexpr Number kDeepEpNormal[] = {
    {"network_gbytes_per_s", 45, "as in the low-latency table: network cards are the same"},
    {"push_gbytes_per_s", 134, "153 GB/s at EP8 (docs/legacy.md), of which 7 in 8 cross"},
    {"pull_gbytes_per_s", 138, "158 GB/s at EP8 (docs/legacy.md), of which 7 in 8 cross"},
    {"overlap", 1, "chunks are forwarded while others come (docs/legacy.md)"},
};
constexpr Number kDeepEpH200[] = {
    {"push_gbytes_per_s", 270,
     "aiconfigurator, 8 x H200, hidden 7168, top-8 of 256: the line "
     "through 1 to 1024 tokens"},
    {"pull_gbytes_per_s", 222, "the same"},
    {"dispatch_fixed_us", 11.5, "the same"},
    {"combine_fixed_us", 11.5, "the same"},
    {"overlap", 1, "rows go straight to their ranks"},
};

struct Preset {
  const char* name;
  const char* about;
  ExchangeRules rules;
  int ranks_per_device;
  bool has_stages;
  std::span<const Number> numbers, more = {};
};

constexpr Preset kPresets[] = {
    {"h200-ib400", "hosts of H200s, NVLink inside, a 400 Gb/s port for each GPU between; over NCCL",
     ExchangeRules::kSluice, 1, true, kH200, kIb400},
    {"h200-nvlink", "one host of H200s over NVLink", ExchangeRules::kSluice, 1, true, kH200},
    {"h200-one-card", "eight ranks as streams of one H200", ExchangeRules::kSluice, 8, true,
     kOneCard},
    {"deepep-ll-h800", "DeepEP's low-latency kernels on H800s, a 400 Gb/s port for each",
     ExchangeRules::kDeepEpLowLatency, 1, false, kDeepEpLowLatency},
    {"deepep-normal-h800", "DeepEP's normal kernels on H800s, a 400 Gb/s port for each",
     ExchangeRules::kDeepEpNormal, 1, false, kDeepEpNormal},
    {"deepep-ll-h200", "DeepEP's low-latency kernels on one host of H200s",
     ExchangeRules::kDeepEpLowLatency, 1, false, kDeepEpH200},
};

/// One H200, 32 experts of DeepSeek-R1: docs/performance-kernels.md, "The stage", the smallest
/// replays where they differ by more than 3 %. What that sweep left out (groups of 32 by token, 32
/// rows of groups of 32) is of docs/performance-gpu-history.md, "Superseded figures". The fixed
/// part is where 32, 16 and 8 experts meet (docs/performance-kernels.md, "Fewer experts, uneven
/// rows"); what one expert takes alone is the fullest expert's time of "all rows to one expert"
/// there.
std::vector<StageTable> h200_stages() {
  const StageTable common{
      .num_experts = 32,
      .hidden = 7168,
      .intermediate = 2048,
      .fixed_us = 10,
      .one_expert_rows = {8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096},
      .one_expert_us = {30.1, 34.0, 39.8, 51.6, 52.0, 63.6, 65.6, 108.2, 212.6, 400.2}};
  const auto table = [&](WeightFormat format, int group_size, StageScales scales,
                         std::vector<int> rows, std::vector<double> us) {
    StageTable one = common;
    one.weight_format = format, one.group_size = group_size, one.scales = scales;
    one.rows = std::move(rows), one.us = std::move(us);
    return one;
  };
  constexpr WeightFormat kInt4 = WeightFormat::kInt4, kMxfp4 = WeightFormat::kMxfp4;
  const std::vector<int> six = {1, 16, 64, 128, 256, 1024};
  const std::vector<int> seven = {1, 16, 32, 64, 128, 256, 1024};
  return {
      table(kInt4, 128, StageScales::kGroup, seven,
            {166.1, 175.4, 188.4, 233.6, 390.5, 733.6, 2817}),
      table(kInt4, 128, StageScales::kStatic, six, {165.5, 174, 211.4, 313.9, 582.5, 2218}),
      table(kInt4, 128, StageScales::kToken, six, {165.9, 175.5, 229.1, 355.8, 658.8, 2468}),
      table(kInt4, 32, StageScales::kGroup, seven, {179.8, 189.6, 215, 314.4, 596.4, 1157, 4507}),
      table(kInt4, 32, StageScales::kStatic, six, {179.1, 188.2, 278.5, 510.8, 987.9, 3856}),
      table(kInt4, 32, StageScales::kToken, six, {180, 185.5, 328.7, 599.5, 1173, 4596}),
      table(kMxfp4, 32, StageScales::kGroup, seven,
            {173.1, 181.7, 219.6, 259.5, 410.3, 775.5, 3001}),
      table(kMxfp4, 32, StageScales::kStatic, seven, {172, 180.6, 210, 247.4, 355.7, 664.5, 2551}),
      table(kMxfp4, 32, StageScales::kToken, seven, {174.5, 182.7, 225, 267.4, 398.8, 744.4, 2788}),
  };
}

const Preset& find_preset(std::string_view name) {
  std::string known;
  for (const Preset& preset : kPresets) {
    if (name == preset.name) return preset;
    known += std::string(known.empty() ? "" : ", ") + preset.name;
  }
  fail(ErrorCode::kInvalidArgument, "machine '{}' is none of: {}", name, known);
}

}  // namespace

std::vector<std::string> machine_names() {
  std::vector<std::string> names;
  for (const Preset& preset : kPresets) names.emplace_back(preset.name);
  return names;
}

MachineModel machine_preset(std::string_view name) {
  const Preset& preset = find_preset(name);
  MachineModel machine{.name = preset.name,
                       .about = preset.about,
                       .rules = preset.rules,
                       .ranks_per_device = preset.ranks_per_device};
  machine.place_gbytes_per_s = machine.memory_gbytes_per_s = 3100;
  for (const auto numbers : {preset.numbers, preset.more}) {
    for (const Number& n : numbers) set_parameter(machine, n.parameter, n.value);
  }
  if (preset.has_stages) machine.stages = h200_stages();
  return machine;
}

std::string machine_source(std::string_view machine, std::string_view parameter) {
  const Preset& preset = find_preset(machine);
  for (const auto numbers : {preset.numbers, preset.more}) {
    for (const Number& n : numbers) {
      if (parameter == n.parameter) return n.source;
    }
  }
  MachineModel unused;
  for (const MachineParameter& p : machine_parameters()) {
    if (parameter == p.name) return {};
  }
  set_parameter(unused, parameter, 0);  // Refuses the name.
  return {};
}

}  // namespace sluice
