// This project's figures of exchanges and layers: docs/performance-exchange.md, -models.md.
#include <utility>

#include "network/measured.h"

namespace sluice::testing {
namespace {

constexpr Mode kLow = Mode::kLowLatency, kNormal = Mode::kNormal;
constexpr Quantity kDispatch = Quantity::kDispatch, kCombine = Quantity::kCombine;

void add_two_gpus(std::vector<Series>& all) {
  const std::string where = "Two H200s over NVLink";
  const MachineModel m = machine_preset("h200-nvlink");
  const ModelGeometry r1 = sizes(7168, 8, 256);
  const std::vector<int> tokens = {1, 16, 64, 128, 256, 1024, 4096};
  const std::vector<int> few = {1, 128, 1024, 4096}, some = {128, 1024, 4096};
  all.push_back(over_tokens(where, "dispatch", m, kDispatch, 0.10, r1, kLow, 2, tokens,
                            {6.9, 9.0, 12.4, 18.1, 29.4, 96.5, 356}));
  all.push_back(over_tokens(where, "combine", m, kCombine, 0.17, r1, kLow, 2, tokens,
                            {6.3, 10.5, 18.2, 30.1, 52.1, 187, 710}));
  all.push_back(over_tokens(where, "dispatch, hidden 6144", m, kDispatch, 0.15, sizes(6144, 8, 256),
                            kLow, 2, few, {6.9, 16.8, 84.1, 310}));
  all.push_back(over_tokens(where, "combine, hidden 6144", m, kCombine, 0.10, sizes(6144, 8, 256),
                            kLow, 2, few, {6.2, 26.8, 162, 610}));
  all.push_back(over_tokens(where, "dispatch, hidden 3584", m, kDispatch, 0.15, sizes(3584, 8, 256),
                            kLow, 2, few, {6.8, 12.6, 53.3, 190}));
  all.push_back(over_tokens(where, "combine, hidden 3584", m, kCombine, 0.10, sizes(3584, 8, 256),
                            kLow, 2, few, {6.1, 18.6, 97.4, 359}));
  all.push_back(over_tokens(where, "all-gather, 2 experts of every token", m, kDispatch, 0.30,
                            sizes(7168, 2, 2), kLow, 2, {1, 16, 64, 128, 256, 1024},
                            {6.9, 7.3, 8.3, 9.7, 12.6, 31.0}));
  all.push_back(over_tokens(where, "reduce-scatter, 2 experts of every token", m, kCombine, 0.35,
                            sizes(7168, 2, 2), kLow, 2, {1, 16, 64, 128, 256, 1024},
                            {5.6, 6.5, 9.0, 12.7, 18.2, 51.8}));
  all.push_back(over_tokens(where, "normal mode, dispatch", m, kDispatch, 0.15, r1, kNormal, 2,
                            some, {26.9, 53.5, 155}));
  all.push_back(over_tokens(where, "normal mode, combine", m, kCombine, 0.07, r1, kNormal, 2, some,
                            {30.0, 188, 711}));
  const std::vector<int> decode = {1, 16, 64, 128, 256}, prefill = {512, 1024, 2048, 4096};
  all.push_back(over_tokens(where, "stage", m, Quantity::kStage, 0.20, r1, kLow, 2, decode,
                            {67.5, 433.4, 652.4, 682.1, 711.2}));
  all.push_back(over_tokens(where, "layer, rows leave from the experts", m, Quantity::kLayer, 0.15,
                            r1, kLow, 2, decode, {77.5, 452.3, 684.3, 726.0, 832.4}));
  all.push_back(over_tokens(where, "layer, one part after the other", m, Quantity::kLayerApart,
                            0.15, r1, kLow, 2, decode, {78.4, 452.9, 692.4, 750.4, 854.8}));
  all.push_back(over_tokens(where, "normal mode, stage", m, Quantity::kStage, 0.20, r1, kNormal, 2,
                            prefill, {885.7, 1190.3, 1946.7, 3798.9}));
  all.push_back(over_tokens(where, "normal mode, layer, rows leave from the experts", m,
                            Quantity::kLayer, 0.20, r1, kNormal, 2, prefill,
                            {1058.6, 1340.3, 2106.2, 4083.0}));
  all.push_back(over_tokens(where, "normal mode, layer, one part after the other", m,
                            Quantity::kLayerApart, 0.20, r1, kNormal, 2, prefill,
                            {1140.4, 1609.2, 2407.4, 4298.8}));
}

void add_one_card(std::vector<Series>& all) {
  const std::string where = "Eight ranks on one H200";
  const MachineModel m = machine_preset("h200-one-card");
  const ModelGeometry r1 = sizes(7168, 8, 256);
  const std::vector<int> tokens = {1, 16, 64, 128, 256, 1024};
  all.push_back(over_tokens(where, "dispatch", m, kDispatch, 0.15, r1, kLow, 8, tokens,
                            {10.35, 12.55, 20.65, 32.35, 57.9, 205}));
  all.push_back(over_tokens(where, "combine", m, kCombine, 0.30, r1, kLow, 8, tokens,
                            {7.7, 9.45, 26.5, 44.0, 79.2, 290}));
  all.push_back(over_tokens(where, "dispatch, another card", m, kDispatch, 0.15, r1, kLow, 8,
                            {1, 128, 1024}, {10.9, 36.2, 196}));
  all.push_back(over_tokens(where, "combine, another card", m, kCombine, 0.15, r1, kLow, 8,
                            {1, 128, 1024}, {7.0, 44.4, 291}));
  all.push_back(over_tokens(where, "normal mode, dispatch", m, kDispatch, 0.20, r1, kNormal, 8,
                            {4096}, {1022}));
  all.push_back(over_tokens(where, "normal mode, combine", m, kCombine, 0.10, r1, kNormal, 8,
                            {4096}, {1141}));
  all.push_back(over_tokens(where, "stage", m, Quantity::kStage, 0.30, r1, kLow, 8, {1, 32, 128},
                            {380, 1410, 1735}));
  all.push_back(over_tokens(where, "layer, the host waits after each part", m,
                            Quantity::kLayerApart, 0.40, r1, kLow, 8, {1, 32, 128},
                            {490, 1560, 1930}));
  ModelGeometry flash = sizes(4096, 6, 256);
  flash.weight_format = WeightFormat::kMxfp4, flash.group_size = 32;
  all.push_back(over_tokens(where, "layer of V4-Flash, MXFP4, the host waits after each part", m,
                            Quantity::kLayerApart, 0.25, flash, kLow, 8, {64}, {1110}));
}

}  // namespace

std::vector<Series> sluice_series() {
  std::vector<Series> all;
  add_two_gpus(all);
  add_one_card(all);
  return all;
}

}  // namespace sluice::testing
