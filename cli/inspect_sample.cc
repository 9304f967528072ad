#include "inspect_sample.h"

#include <fmt/core.h>

#include <algorithm>

#include "report.h"
#include "sluice/quant.h"

namespace sluice::cli {
namespace {

Range range_of(std::vector<float> values) {
  if (values.empty()) return {};
  std::ranges::sort(values);
  return {values.front(), values[values.size() / 2], values.back()};
}

nlohmann::ordered_json to_json(const Range& r) {
  return {{"min", r.min}, {"median", r.median}, {"max", r.max}};
}

void count_codes(const TensorView& codes, std::array<std::int64_t, 16>& counts) {
  std::array<std::int64_t, 256> bytes{};
  for (const std::uint8_t byte : std::span(codes.as<std::uint8_t>(), codes.bytes())) ++bytes[byte];
  for (unsigned b = 0; b < bytes.size(); ++b) {
    counts[(b & 0xf) ^ 8] += bytes[b];
    counts[(b >> 4) ^ 8] += bytes[b];
  }
}

void append_scales(const TensorView& scales, std::vector<float>& out) {
  for (std::int64_t i = 0; i < scales.shape.num_elements(); ++i) {
    out.push_back(scale_value(scales, i));
  }
}

/// Share of the sampled weights that have `value`.
double share(const LayerSample& sample, int value) {
  std::int64_t total = 0;
  for (const std::int64_t count : sample.codes) total += count;
  return static_cast<double>(sample.codes[static_cast<std::size_t>(value + 8)]) /
         static_cast<double>(total);
}

}  // namespace

std::vector<int> spread(int count, int limit) {
  std::vector<int> picks;
  if (limit <= 0 || limit >= count) limit = count;
  for (int i = 0; i < limit; ++i) {
    picks.push_back(
        limit == 1 ? 0 : static_cast<int>(static_cast<std::int64_t>(count - 1) * i / (limit - 1)));
  }
  return picks;
}

LayerSample sample_layer(const Checkpoint& checkpoint, int layer, int max_experts) {
  LayerSample sample;
  sample.layer = layer;
  std::array<std::vector<float>, 3> scales;
  for (const int e : spread(checkpoint.geometry().num_experts, max_experts)) {
    const ExpertWeights weights = checkpoint.load_experts(layer, e, 1);
    const Expert& expert = weights.experts.front();
    const std::array matrices = {&expert.gate, &expert.up, &expert.down};
    for (std::size_t i = 0; i < matrices.size(); ++i) {
      append_scales(matrices[i]->scales, scales[i]);
      count_codes(matrices[i]->codes, sample.codes);
    }
    sample.expert_bytes = weights.bytes();
    sample.weight_format = expert.gate.format;
    sample.scale_dtype = expert.gate.scales.dtype;
    sample.static_scales = weights.static_scales;
    ++sample.num_sampled;
    weights.release_pages(0);
  }
  for (std::size_t i = 0; i < scales.size(); ++i) {
    sample.weight_scales[i] = range_of(std::move(scales[i]));
  }
  std::vector<float> w1, w2, w3;
  for (const InputScales& s : checkpoint.input_scales(layer)) {
    w1.push_back(s.w1), w2.push_back(s.w2), w3.push_back(s.w3);
  }
  sample.w1 = range_of(std::move(w1));
  sample.w2 = range_of(std::move(w2));
  sample.w3 = range_of(std::move(w3));
  return sample;
}

NibbleShares nibble_shares(const LayerSample& s) {
  return {.near_0 = share(s, -1) + share(s, 0) + share(s, 1),
          .near_ends = share(s, 7) + share(s, -8) + share(s, -7)};
}

/// Counts of e2m1 codes 0 to 15.
std::array<std::int64_t, 16> e2m1_counts(const LayerSample& s) {
  std::array<std::int64_t, 16> counts{};
  for (std::size_t i = 0; i < counts.size(); ++i) counts[i ^ 8] = s.codes[i];
  return counts;
}

/// Shares of zeros and of the largest magnitude.
void print_e2m1(const LayerSample& s) {
  const auto counts = e2m1_counts(s);
  double total = 0;
  for (const std::int64_t count : counts) total += static_cast<double>(count);
  fmt::print("layer {}: codes +-0 {:.1f} %, +-6 {:.2f} %\n", s.layer,
             100 * static_cast<double>(counts[0] + counts[8]) / total,
             100 * static_cast<double>(counts[7] + counts[15]) / total);
}

void add_codes(const LayerSample& s, nlohmann::ordered_json& json) {
  if (s.weight_format != WeightFormat::kInt4) {
    json["codes"] = e2m1_counts(s);
    return;
  }
  const NibbleShares nibbles = nibble_shares(s);
  json["codes"] = s.codes;
  json["nibbles"] = {{"near_0", nibbles.near_0},
                     {"near_ends", nibbles.near_ends},
                     {"borne_out", nibbles.is_borne_out()}};
}

nlohmann::ordered_json to_json(const LayerSample& s) {
  nlohmann::ordered_json json = {
      {"layer", s.layer},
      {"experts_sampled", s.num_sampled},
      {"weight_scales",
       {{"gate", to_json(s.weight_scales[0])},
        {"up", to_json(s.weight_scales[1])},
        {"down", to_json(s.weight_scales[2])}}},
  };
  add_codes(s, json);
  if (s.static_scales) {
    json["input_scales"] = {{"w1", to_json(s.w1)}, {"w2", to_json(s.w2)}, {"w3", to_json(s.w3)}};
    json["static_scales"] = {{"s1", s.static_scales->s1}, {"s2", s.static_scales->s2}};
  }
  return json;
}

void print_layers(std::span<const LayerSample> samples, int num_experts) {
  Table table({"scales", "min", "median", "max", "of"});
  for (const LayerSample& s : samples) {
    const auto add = [&](const char* what, const Range& r, int of) {
      table.add({fmt::format("layer {} {}", s.layer, what), fmt::format("{:.4g}", r.min),
                 fmt::format("{:.4g}", r.median), fmt::format("{:.4g}", r.max),
                 fmt::format("{} of {} experts", of, num_experts)});
    };
    const char* const names[] = {"gate weights", "up weights", "down weights"};
    for (std::size_t i = 0; i < 3; ++i) add(names[i], s.weight_scales[i], s.num_sampled);
    if (!s.static_scales) continue;
    add("w1 input", s.w1, num_experts);
    add("w3 input", s.w3, num_experts);
    add("w2 input", s.w2, num_experts);
  }
  fmt::print("{}\n", table.to_string());
  for (const LayerSample& s : samples) {
    if (s.static_scales) {
      fmt::print("layer {}: s1 = {:.6g} (w1, w3), s2 = {:.6g} (w2)\n", s.layer, s.static_scales->s1,
                 s.static_scales->s2);
    }
    if (s.weight_format != WeightFormat::kInt4) {
      print_e2m1(s);
      continue;
    }
    fmt::print("layer {}: codes 0 {:.1f} %, +-7 {:.2f} %, -8 {}\n", s.layer, 100 * share(s, 0),
               100 * (share(s, 7) + share(s, -7)),
               s.codes[0] == 0 ? "never" : fmt::format("{:.4f} %", 100 * share(s, -8)));
  }
}

}  // namespace sluice::cli
