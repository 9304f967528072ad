#include "rank_results.h"

#include <cstring>
#include <nlohmann/json.hpp>

namespace sluice::cli {
namespace {

using Json = nlohmann::json;

Json to_json(const ExchangeCounters& c) {
  return {c.dispatch_bytes, c.combine_bytes,  c.dispatch_rows,
          c.wait_ns,        c.num_dispatches, c.saturated_values};
}

ExchangeCounters counters_from(const Json& j) {
  return {.dispatch_bytes = j[0],
          .combine_bytes = j[1],
          .dispatch_rows = j[2],
          .wait_ns = j[3],
          .num_dispatches = j[4],
          .saturated_values = j[5]};
}

Json to_json(const LoadStats& s) {
  return {s.seconds, s.file_bytes, s.prepared_bytes, s.host_bytes, s.num_threads};
}

LoadStats load_stats_from(const Json& j) {
  return {.seconds = j[0],
          .file_bytes = j[1],
          .prepared_bytes = j[2],
          .host_bytes = j[3],
          .num_threads = j[4]};
}

Json to_json(const RebalanceCounters& c) {
  return {c.num_rebalances, c.num_received,   c.num_sent,   c.num_copied,
          c.num_rounds,     c.received_bytes, c.sent_bytes, c.seconds};
}

RebalanceCounters moves_from(const Json& j) {
  return {.num_rebalances = j[0],
          .num_received = j[1],
          .num_sent = j[2],
          .num_copied = j[3],
          .num_rounds = j[4],
          .received_bytes = j[5],
          .sent_bytes = j[6],
          .seconds = j[7]};
}

Json to_json(const std::optional<RebalanceResult>& r) {
  if (!r) return nullptr;
  return {{"slot_experts", r->slot_experts},
          {"rows", r->rows},
          {"counted_rows", r->counted_rows},
          {"total_us", r->total_us},
          {"has_same_bits", r->has_same_bits}};
}

std::optional<RebalanceResult> rebalance_from(const Json& j) {
  if (j.is_null()) return std::nullopt;
  return RebalanceResult{.slot_experts = j["slot_experts"],
                         .rows = j["rows"],
                         .counted_rows = j["counted_rows"],
                         .total_us = j["total_us"],
                         .has_same_bits = j["has_same_bits"]};
}

Json to_json(const RankResult& r) {
  const StageTimes& t = r.stats.times;
  const auto* y = reinterpret_cast<const std::uint8_t*>(r.y.data());
  return {{"times",
           {t.dispatch_us, t.quantize_us, t.gemm1_us, t.activation_us, t.gemm2_us, t.combine_us,
            t.total_us}},
          {"rows_per_expert", r.stats.rows_per_expert},
          {"weight_bytes_read", r.stats.weight_bytes_read},
          {"flops", r.stats.flops},
          {"counters", to_json(r.counters)},
          {"totals", to_json(r.totals)},
          {"counted_rows", r.counted_rows},
          {"transport_bytes", r.transport_bytes},
          {"y", Json::binary({y, y + r.y.size() * sizeof(r.y[0])})},
          {"memory",
           {r.memory.codes_bytes, r.memory.scales_bytes, r.memory.prepared_bytes,
            r.memory.exchange_bytes, r.memory.scratch_bytes}},
          {"moves", to_json(r.moves)},
          {"rebalance", to_json(r.rebalance)},
          {"digest", r.digest},
          {"peak_resident_bytes", r.peak_resident_bytes},
          {"num_ranks_on_device", r.num_ranks_on_device}};
}

RankResult result_from(const Json& j) {
  const Json& t = j["times"];
  RankResult r{.stats = {.times = {t[0], t[1], t[2], t[3], t[4], t[5], t[6]},
                         .rows_per_expert = j["rows_per_expert"],
                         .weight_bytes_read = j["weight_bytes_read"],
                         .flops = j["flops"]},
               .counters = counters_from(j["counters"]),
               .totals = counters_from(j["totals"]),
               .counted_rows = j["counted_rows"],
               .transport_bytes = j["transport_bytes"],
               .y = {},
               .memory = {.codes_bytes = j["memory"][0],
                          .scales_bytes = j["memory"][1],
                          .prepared_bytes = j["memory"][2],
                          .exchange_bytes = j["memory"][3],
                          .scratch_bytes = j["memory"][4]},
               .moves = moves_from(j["moves"]),
               .rebalance = rebalance_from(j["rebalance"]),
               .digest = j["digest"],
               .peak_resident_bytes = j["peak_resident_bytes"],
               .num_ranks_on_device = j["num_ranks_on_device"]};
  const auto& y = j["y"].get_binary();
  r.y.resize(y.size() / sizeof(r.y[0]));
  if (!y.empty()) std::memcpy(r.y.data(), y.data(), y.size());
  return r;
}

}  // namespace

std::string pack_results(const RankResults& results) {
  Json layers = Json::array();
  for (const RankResult& layer : results.layers) layers.push_back(to_json(layer));
  std::string bytes;
  Json::to_cbor(Json{{"layers", std::move(layers)}, {"load", to_json(results.load)}}, bytes);
  return bytes;
}

RankResults unpack_results(std::string_view bytes) {
  const Json part = Json::from_cbor(bytes);
  RankResults results{.layers = {}, .load = load_stats_from(part["load"])};
  for (const Json& layer : part["layers"]) results.layers.push_back(result_from(layer));
  return results;
}

}  // namespace sluice::cli
