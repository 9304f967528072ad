#include "run_report.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "report.h"
#include "run_stats.h"

namespace sluice::cli {
namespace {

constexpr double StageTimes::*kTimes[] = {&StageTimes::dispatch_us, &StageTimes::quantize_us,
                                          &StageTimes::gemm1_us,    &StageTimes::activation_us,
                                          &StageTimes::gemm2_us,    &StageTimes::combine_us,
                                          &StageTimes::total_us};

}  // namespace

Summary summarize(const LayerRunResult& result) {
  Summary s;
  s.min_rows = std::numeric_limits<std::int64_t>::max();
  std::size_t num_experts = 0;
  for (std::size_t r = 0; r < result.ranks.size(); ++r) {
    const RankResult& rank = result.ranks[r];
    const StageTimes& t = rank.stats.times;
    for (const auto field : kTimes) {
      s.slowest.*field = std::max(s.slowest.*field, t.*field);
    }
    s.experts_us = std::max(s.experts_us, t.gemm1_us + t.activation_us + t.gemm2_us);
    s.weight_bytes += rank.stats.weight_bytes_read;
    s.flops += rank.stats.flops;
    s.num_devices += 1.0 / rank.num_ranks_on_device;
    for (std::size_t peer = 0; peer < result.ranks.size(); ++peer) {
      const std::uint64_t bytes =
          rank.counters.dispatch_bytes[peer] + rank.counters.combine_bytes[peer];
      s.wire_bytes += bytes;
      if (peer != r) s.remote_bytes += bytes;
    }
    for (const std::int64_t rows : rank.stats.rows_per_expert) {
      s.rows += rows;
      s.min_rows = std::min(s.min_rows, rows);
      s.max_rows = std::max(s.max_rows, rows);
      ++num_experts;
    }
  }
  s.gbytes_per_s = static_cast<double>(s.weight_bytes) / s.experts_us * 1e-3;
  s.share_of_read = s.gbytes_per_s * 1e9 / (s.num_devices * result.read_bytes_per_s);
  const double mean = static_cast<double>(s.rows) / static_cast<double>(num_experts);
  s.imbalance_max_over_mean = mean > 0 ? static_cast<double>(s.max_rows) / mean : 0;
  return s;
}

namespace {

std::string ms(double us) {
  return fmt::format("{:.2f}", us / 1000);
}

}  // namespace

void print_ranks(const LayerRunConfig& config, const LayerRunResult& result, const Summary& s) {
  Table table({"rank", "tokens", "rows", "rows/expert", "sent MB", "dispatch ms", "quantize",
               "GEMM1", "activation", "GEMM2", "combine", "total"});
  for (std::size_t r = 0; r < result.ranks.size(); ++r) {
    const RankResult& rank = result.ranks[r];
    const auto& rows = rank.stats.rows_per_expert;
    const auto [low, high] = std::ranges::minmax(rows);
    std::uint64_t sent = 0;
    for (std::size_t peer = 0; peer < result.ranks.size(); ++peer) {
      if (peer == r) continue;
      sent += rank.counters.dispatch_bytes[peer] + rank.counters.combine_bytes[peer];
    }
    const StageTimes& t = rank.stats.times;
    table.add({fmt::format("{}", r), fmt::format("{}", config.tokens[r]),
               fmt::format("{}", std::accumulate(rows.begin(), rows.end(), std::int64_t{0})),
               fmt::format("{}-{}", low, high), fmt::format("{:.2f}", sent * 1e-6),
               ms(t.dispatch_us), ms(t.quantize_us), ms(t.gemm1_us), ms(t.activation_us),
               ms(t.gemm2_us), ms(t.combine_us), ms(t.total_us)});
  }
  const StageTimes& t = s.slowest;
  table.add({"slowest", "", fmt::format("{}", s.rows), fmt::format("{}-{}", s.min_rows, s.max_rows),
             fmt::format("{:.2f}", s.remote_bytes * 1e-6), ms(t.dispatch_us), ms(t.quantize_us),
             ms(t.gemm1_us), ms(t.activation_us), ms(t.gemm2_us), ms(t.combine_us),
             ms(t.total_us)});
  fmt::print("{}", table.to_string());
  fmt::print(
      "experts   {} of weights in {} ms: {:.1f} GB/s, {:.0f} % of the {}{:.1f} GB/s this machine "
      "reads; {:.3g} TFLOPS\n",
      human_bytes(static_cast<double>(s.weight_bytes)), ms(s.experts_us), s.gbytes_per_s,
      s.share_of_read * 100, s.num_devices > 1.5 ? fmt::format("{:.0f} x ", s.num_devices) : "",
      result.read_bytes_per_s * 1e-9, s.flops / s.experts_us * 1e-6);
  fmt::print("balance   fullest expert has {:.2f} x the mean rows\n", s.imbalance_max_over_mean);
}

namespace {

nlohmann::ordered_json to_json(const StageTimes& t) {
  return {{"dispatch_us", t.dispatch_us}, {"quantize_us", t.quantize_us},
          {"gemm1_us", t.gemm1_us},       {"activation_us", t.activation_us},
          {"gemm2_us", t.gemm2_us},       {"combine_us", t.combine_us},
          {"total_us", t.total_us}};
}

/// With the names of `sluice plan`.
nlohmann::ordered_json to_json(const LayerGroupMemory& m) {
  return {{"codes_bytes", m.codes_bytes},       {"scales_bytes", m.scales_bytes},
          {"prepared_bytes", m.prepared_bytes}, {"exchange_bytes", m.exchange_bytes},
          {"scratch_bytes", m.scratch_bytes},   {"total_bytes", m.total_bytes()}};
}

}  // namespace

void fill_json(nlohmann::ordered_json& json, const LayerRunConfig& config,
               const LayerRunResult& result, const Summary& s) {
  json["backend"] = result.backend;
  json["read_bytes_per_s"] = result.read_bytes_per_s;  // Of one device.
  json["num_devices"] = s.num_devices;
  json["recipe"] = {{"name", to_string(result.recipe)},
                    {"mode", to_string(result.recipe.mode)},
                    {"wire", to_string(result.recipe.wire)},
                    {"s1", result.recipe.s1},
                    {"s2", result.recipe.s2},
                    {"describe", result.recipe.describe()}};
  json["outputs_digest"] = fmt::format("{:016x}", outputs_digest(result));
  json["repeats_us"] = result.total_us;
  json["slowest"] = to_json(s.slowest);
  json["experts_gbytes_per_s"] = s.gbytes_per_s;
  json["share_of_read"] = s.share_of_read;
  json["imbalance_max_over_mean"] = s.imbalance_max_over_mean;
  json["wire_bytes"] = s.wire_bytes;
  json["wire_bytes_off_rank"] = s.remote_bytes;
  for (std::size_t r = 0; r < result.ranks.size(); ++r) {
    const RankResult& rank = result.ranks[r];
    json["ranks"].push_back({{"tokens", config.tokens[r]},
                             {"rows_per_expert", rank.stats.rows_per_expert},
                             {"dispatch_bytes", rank.counters.dispatch_bytes},
                             {"dispatch_rows", rank.counters.dispatch_rows},
                             {"combine_bytes", rank.counters.combine_bytes},
                             {"transport_bytes", rank.transport_bytes},
                             {"wait_ns", rank.counters.wait_ns},
                             {"saturated_values", rank.counters.saturated_values},
                             {"weight_bytes", rank.memory.prepared_bytes},
                             {"memory", to_json(rank.memory)},
                             {"times", to_json(rank.stats.times)}});
  }
}

void print_layers(const RunResult& result, const std::vector<VerifyReport>& verified) {
  Table table({"layer", "rows/expert", "dispatch ms", "quantize", "GEMM1", "activation", "GEMM2",
               "combine", "total", "error/bound", "digest"});
  StageTimes sum;
  for (std::size_t i = 0; i < result.layers.size(); ++i) {
    const LayerRunResult& layer = result.layers[i];
    const Summary s = summarize(layer);
    const StageTimes& t = s.slowest;
    for (const auto field : kTimes) sum.*field += t.*field;
    table.add({fmt::format("{}", layer.layer), fmt::format("{}-{}", s.min_rows, s.max_rows),
               ms(t.dispatch_us), ms(t.quantize_us), ms(t.gemm1_us), ms(t.activation_us),
               ms(t.gemm2_us), ms(t.combine_us), ms(t.total_us),
               fmt::format("{:.2f}", verified[i].worst_ratio),
               fmt::format("{:016x}", outputs_digest(layer))});
  }
  table.add({"sum", "", ms(sum.dispatch_us), ms(sum.quantize_us), ms(sum.gemm1_us),
             ms(sum.activation_us), ms(sum.gemm2_us), ms(sum.combine_us), ms(sum.total_us), "",
             ""});
  fmt::print("{}", table.to_string());
}

void print_passes(const RunResult& result) {
  std::vector<double> passes = result.pass_us;
  std::ranges::sort(passes);
  fmt::print("in a row  {} in {} ms, median of {}; {:.2f} ms a layer\n",
             counted(result.layers.size(), "layer"), ms(passes[passes.size() / 2]), passes.size(),
             passes[passes.size() / 2] / 1000 / static_cast<double>(result.layers.size()));
}

void print_load(const LayerRunConfig& config, const RunResult& result,
                nlohmann::ordered_json& json) {
  const LoadStats& load = result.load;
  const auto human = [](auto bytes) { return human_bytes(static_cast<double>(bytes)); };
  fmt::print("loaded    {} in {:.2f} s: {:.2f} GB/s; {} of {}, {} of host memory\n",
             human(load.file_bytes), load.seconds, load.bytes_per_s() * 1e-9,
             counted(config.num_ranks, "rank"), counted(load.num_threads, "thread"),
             human(load.host_bytes));
  json["load_us"] = load.seconds * 1e6;
  json["load"] = {{"seconds", load.seconds},
                  {"file_bytes", load.file_bytes},
                  {"prepared_bytes", load.prepared_bytes},
                  {"gbytes_per_s", load.bytes_per_s() * 1e-9},
                  {"threads_per_rank", load.num_threads},
                  {"host_bytes", load.host_bytes}};
}

void add(VerifyReport& all, const VerifyReport& one) {
  const double squared_error = all.relative_l2 * all.relative_l2 * all.sum_squares +
                               one.relative_l2 * one.relative_l2 * one.sum_squares;
  const VerifyReport& worse = one.worst_ratio > all.worst_ratio ? one : all;
  VerifyReport sum = worse;
  sum.num_rows = all.num_rows + one.num_rows;
  sum.num_elements = all.num_elements + one.num_elements;
  sum.num_wrong = all.num_wrong + one.num_wrong;
  sum.sum_squares = all.sum_squares + one.sum_squares;
  sum.relative_l2 = sum.sum_squares > 0 ? std::sqrt(squared_error / sum.sum_squares) : 0;
  all = sum;
}

void print_verification(const VerifyReport& report) {
  fmt::print(
      "verified  {} rows, {} elements against float64: {}\n", report.num_rows, report.num_elements,
      report.passed() ? "all within bounds" : fmt::format("{} OUT OF BOUNDS", report.num_wrong));
  if (report.worst_token < 0) {
    fmt::print("          every element is that of float64, exactly\n");
    return;
  }
  fmt::print(
      "          worst: token {}, element {}: {:.6g}, float64 {:.6g}, error {:.2f} of its bound "
      "{:.3g}; relative L2 {:.2e}\n",
      report.worst_token, report.worst_element, report.worst_actual, report.worst_expected,
      report.worst_ratio, report.worst_bound, report.relative_l2);
}

nlohmann::ordered_json to_json(const VerifyReport& report) {
  return {{"rows", report.num_rows},
          {"elements", report.num_elements},
          {"wrong", report.num_wrong},
          {"worst_ratio", report.worst_ratio},
          {"worst_token", report.worst_token},
          {"worst_element", report.worst_element},
          {"worst_actual", report.worst_actual},
          {"worst_expected", report.worst_expected},
          {"worst_bound", report.worst_bound},
          {"relative_l2", report.relative_l2},
          {"passed", report.passed()}};
}

double peak_of_ranks(const std::vector<RankResult>& ranks, bool has_processes) {
  if (!has_processes) return peak_resident_bytes();
  double sum = 0;
  for (const RankResult& rank : ranks) sum += rank.peak_resident_bytes;
  return sum;
}

void print_memory(const LayerRunConfig& config, const std::vector<RankResult>& ranks, double peak,
                  bool has_processes, nlohmann::ordered_json& json) {
  double experts_bytes = 0;
  for (const RankResult& rank : ranks) {
    experts_bytes += static_cast<double>(rank.memory.prepared_bytes);
  }
  fmt::print("memory    peak resident {}{}, experts {}\n", human_bytes(peak),
             has_processes ? fmt::format(" in {} process{}", config.num_ranks,
                                         config.num_ranks == 1 ? "" : "es")
                           : "",
             human_bytes(experts_bytes));
  // Every rank has the same sizes.
  const LayerGroupMemory& m = ranks.front().memory;
  const auto human = [](std::size_t bytes) { return human_bytes(static_cast<double>(bytes)); };
  fmt::print("          each rank: prepared {}, exchange {}, scratch {}; {} in all\n",
             human(m.prepared_bytes), human(m.exchange_bytes), human(m.scratch_bytes),
             human(m.total_bytes()));
  json["peak_resident_bytes"] = peak;
  json["experts_bytes"] = experts_bytes;
}

}  // namespace sluice::cli
