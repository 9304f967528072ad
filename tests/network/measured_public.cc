// Published figures of other engines' exchanges, for the model of bytes and of the network.
//
//   DeepEP V1     https://github.com/deepseek-ai/DeepEP/blob/main/docs/legacy.md
//   DeepEP V2     https://github.com/deepseek-ai/DeepEP, README.md
//   aiconfigurator https://github.com/ai-dynamo/aiconfigurator, wideep_deepep_ll_perf of SGLang
//                 0.5.12: kernel times of DeepEP 1.2.1
//   NCCL EP       arXiv 2603.13606; bf16 both ways, GB/s of the 14.68 MB of 128 tokens of top-8
//   pplx-garden   arXiv 2510.27656: DeepEP in its comparison, ConnectX-7
//   Triton-distributed  its README: DeepEP in its comparison, 32 H800s
#include <utility>

#include "network/measured.h"

namespace sluice::testing {
namespace {

constexpr Mode kLow = Mode::kLowLatency, kNormal = Mode::kNormal;
constexpr Quantity kDispatch = Quantity::kDispatch, kCombine = Quantity::kCombine;

void add_low_latency(std::vector<Series>& all) {
  const std::string where = "Low-latency kernels over hosts of eight H800s or H100s, 128 tokens";
  const MachineModel m = machine_preset("deepep-ll-h800");
  const std::vector<int> ranks = {8, 16, 32, 64, 128, 256};
  all.push_back(over_ranks(where, "DeepEP V1, dispatch", m, kDispatch, 0.10, 128, kLow, ranks,
                           {77, 118, 155, 173, 192, 194}));
  all.push_back(over_ranks(where, "DeepEP V1, combine", m, kCombine, 0.10, 128, kLow, ranks,
                           {114, 195, 273, 314, 369, 360}));
  all.push_back(over_ranks(where, "DeepEP V1 as pplx-garden measured it, dispatch", m, kDispatch,
                           0.10, 128, kLow, {16, 32, 64}, {123.9, 159.1, 177.9}));
  all.push_back(over_ranks(where, "the same, combine", m, kCombine, 0.10, 128, kLow, {16, 32, 64},
                           {203.0, 285.0, 325.0}));
  all.push_back(over_ranks(where, "DeepEP V1 as Triton-distributed measured it, dispatch", m,
                           kDispatch, 0.20, 128, kLow, {32}, {182}));
  const auto us = [](double gbytes_per_s) { return 128 * 8 * 14336 / gbytes_per_s * 1e-3; };
  all.push_back(over_ranks(where, "NCCL EP, dispatch in bf16", m, kDispatch, 0.10, 128, kLow,
                           {16, 32, 64}, {us(76.7), us(53.6), us(48.8)}));
  for (Cell& c : all.back().cells) c.layer.recipe.wire = WireFormat::kBf16;
  all.push_back(over_ranks(where, "NCCL EP, combine", m, kCombine, 0.10, 128, kLow, {16, 32, 64},
                           {us(73.0), us(50.0), us(43.8)}));
}

/// Cells of published rates: a time follows from the bytes that the source counts.
Series over_rates(std::string where, std::string what, const MachineModel& machine,
                  Quantity quantity, double bound, int tokens, int topk_groups,
                  const std::vector<int>& ranks, const std::vector<double>& rates) {
  Series series = over_ranks(std::move(where), std::move(what), machine, quantity, bound, tokens,
                             kNormal, ranks, std::vector<double>(ranks.size(), 0.0));
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    Cell& c = series.cells[i];
    c.published_gbytes_per_s = rates[i];
    if (topk_groups > 0 && c.layer.num_hosts > topk_groups) {  // A group is a host there.
      c.rule.num_groups = c.layer.num_hosts, c.rule.num_topk_groups = topk_groups;
    }
  }
  return series;
}

void add_normal(std::vector<Series>& all) {
  const std::string where = "Normal kernels over hosts of eight, GB/s turned into times";
  const MachineModel m = machine_preset("deepep-normal-h800");
  const std::vector<int> ranks = {8, 16, 32, 64};
  all.push_back(over_rates(where, "DeepEP V1, H800, 4096 tokens, dispatch", m, kDispatch, 0.15,
                           4096, 4, ranks, {153, 43, 58, 51}));
  all.push_back(
      over_rates(where, "the same, combine", m, kCombine, 0.15, 4096, 4, ranks, {158, 43, 57, 50}));
  MachineModel h100 = m;
  set_parameter(h100, "push_gbytes_per_s", 320), set_parameter(h100, "pull_gbytes_per_s", 320);
  all.push_back(over_rates(where, "DeepEP V2, H100, 8192 tokens, dispatch", h100, kDispatch, 0.15,
                           8192, 4, {16, 32}, {90, 61}));
  all.push_back(
      over_rates(where, "the same, combine", h100, kCombine, 0.15, 8192, 4, {16, 32}, {81, 61}));
}

struct Shape {
  int hidden, topk, experts;
  double bound;
  std::vector<double> dispatch, combine;  ///< At 1, 16, 64, 128, 256 and 1024 tokens.
};

void add_shapes(std::vector<Series>& all, const std::string& where, const MachineModel& m,
                const std::vector<Shape>& shapes) {
  for (const Shape& s : shapes) {
    const std::string name = std::to_string(s.hidden) + ", top-" + std::to_string(s.topk) + " of " +
                             std::to_string(s.experts);
    const ModelGeometry geometry = sizes(s.hidden, s.topk, s.experts);
    const std::vector<int> six = {1, 16, 64, 128, 256, 1024};
    all.push_back(over_tokens(where, "dispatch, " + name, m, kDispatch, s.bound, geometry, kLow, 8,
                              six, s.dispatch));
    all.push_back(over_tokens(where, "combine, " + name, m, kCombine, std::min(s.bound, 0.50),
                              geometry, kLow, 8, six, s.combine));
  }
}

void add_one_host(std::vector<Series>& all) {
  const std::string where = "DeepEP V1's low-latency kernels on one host of eight H200s";
  const MachineModel m = machine_preset("deepep-ll-h200");
  const std::vector<int> tokens = {1, 8, 16, 32, 64, 128, 256, 512, 1024};
  all.push_back(over_tokens(where, "dispatch, 7168, top-8 of 256 (fitted)", m, kDispatch, 0.15,
                            sizes(7168, 8, 256), kLow, 8, tokens,
                            {11.9, 12.3, 14.2, 16.5, 23.0, 35.1, 60.5, 112.4, 211.1}));
  all.push_back(over_tokens(where, "combine, the same (fitted)", m, kCombine, 0.15,
                            sizes(7168, 8, 256), kLow, 8, tokens,
                            {12.6, 15.0, 18.3, 24.6, 38.8, 67.7, 124.5, 244.1, 481.0}));
  const std::vector<Shape> shapes = {
      {2048, 8, 128, 0.35, {8.8, 9.7, 12.6, 16.0, 24.3, 73.5}, {10.5, 11.5, 17.6, 25.4, 40.4, 147}},
      {4096,
       6,
       256,
       0.20,
       {10.6, 12.2, 16.4, 21.4, 31.5, 104},
       {11.2, 12.7, 20.9, 32.9, 58.3, 216}},
      {4096, 8, 128, 0.25, {9.6, 11.0, 16.6, 23.3, 38.2, 129}, {11.4, 14.3, 25.5, 40.3, 76.7, 284}},
      {4096,
       10,
       512,
       0.25,
       {14.4, 16.5, 23.3, 31.9, 48.5, 157},
       {11.8, 15.5, 29.5, 51.0, 89.4, 333}},
      {6144, 8, 160, 0.20, {10.3, 12.7, 20.4, 31.8, 56.1, 195}, {12.5, 17.6, 37.8, 64.7, 123, 472}},
      {7168,
       6,
       384,
       0.20,
       {13.3, 14.9, 22.2, 30.2, 47.0, 162},
       {12.6, 17.4, 30.6, 51.1, 93.9, 353}},
      {7168, 8, 384, 0.20, {13.4, 15.8, 24.4, 36.5, 61.2, 213}, {12.5, 18.7, 37.7, 64.3, 123, 473}},
  };
  // Few experts, or one for each token: DeepEP gives an SM's warps to experts, and the model has no
  // number for that.
  const std::vector<Shape> few = {
      {5120, 1, 128, 0.50, {8.1, 9.6, 10.5, 11.5, 14.6, 34}, {10.1, 10.0, 10.6, 13.6, 19.3, 50}},
      {5120, 1, 16, 0.90, {8.7, 9.0, 15.7, 24.1, 41.0, 145}, {9.2, 9.7, 10.7, 14.7, 20.8, 70}},
      {4096, 2, 8, 0.90, {8.7, 10.8, 23.7, 41.6, 76.7, 304}, {8.8, 10.0, 14.4, 19.7, 30.1, 94}},
      {6144, 2, 8, 0.90, {9.0, 11.9, 26.7, 46.6, 89.4, 346}, {9.6, 12.0, 18.2, 25.5, 43.4, 143}},
  };
  add_shapes(all, where, m, shapes);
  add_shapes(all, "The same with few experts, which the model does not know", m, few);
}

}  // namespace

std::vector<Series> public_series() {
  std::vector<Series> all;
  add_low_latency(all);
  add_normal(all);
  add_one_host(all);
  return all;
}

}  // namespace sluice::testing
