// eplb_oracle.h - DeepSeek's load balancer for experts (EPLB), written anew from its description
// (https://github.com/deepseek-ai/EPLB, README and the paper on DeepSeek-V3, 2024), as an oracle.
//
// Three steps. Whole groups of experts go to hosts, as many groups on each, by balanced packing.
// On each host the slots that are left go one by one to the expert with the largest load per
// replica. The replicas of a host go to its ranks, as many on each, by balanced packing. Balanced
// packing takes the heaviest item first and puts it where there is room and the least weight.
// Replicas of one expert may meet on a rank.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "sluice/placement.h"

namespace sluice::eplb {

/// The pack of each item. weights.size() is a multiple of num_packs.
inline std::vector<std::size_t> balanced_packing(const std::vector<double>& weights,
                                                 std::size_t num_packs) {
  std::vector<std::size_t> order(weights.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return weights[a] > weights[b]; });
  const std::size_t room = weights.size() / num_packs;
  std::vector<double> total(num_packs);
  std::vector<std::size_t> count(num_packs), pack_of(weights.size());
  for (const std::size_t item : order) {
    std::size_t best = num_packs;
    for (std::size_t p = 0; p < num_packs; ++p) {
      if (count[p] < room && (best == num_packs || total[p] < total[best])) best = p;
    }
    pack_of[item] = best;
    total[best] += weights[item];
    ++count[best];
  }
  return pack_of;
}

/// The expert of each of `num_slots` slots of one host: every one once, then the extra replicas.
inline std::vector<std::size_t> replicate(const std::vector<double>& weights,
                                          std::size_t num_slots) {
  std::vector<std::size_t> expert_of(weights.size()), count(weights.size(), 1);
  std::iota(expert_of.begin(), expert_of.end(), std::size_t{0});
  while (expert_of.size() < num_slots) {
    std::size_t hottest = 0;
    for (std::size_t e = 1; e < weights.size(); ++e) {
      const auto load = [&](std::size_t i) { return weights[i] / static_cast<double>(count[i]); };
      if (load(e) > load(hottest)) hottest = e;
    }
    ++count[hottest];
    expert_of.push_back(hottest);
  }
  return expert_of;
}

/// num_groups and num_ranks are multiples of num_hosts.
inline Placement place(const std::vector<std::int64_t>& rows, std::size_t num_ranks,
                       std::size_t num_slots, std::size_t num_hosts = 1,
                       std::size_t num_groups = 1) {
  const std::size_t group_size = rows.size() / num_groups;
  std::vector<double> group_weights(num_groups);
  for (std::size_t e = 0; e < rows.size(); ++e) {
    group_weights[e / group_size] += static_cast<double>(rows[e]);
  }
  const std::vector<std::size_t> host_of = balanced_packing(group_weights, num_hosts);
  std::vector<int> slots;
  for (std::size_t h = 0; h < num_hosts; ++h) {
    std::vector<int> experts;
    std::vector<double> weights;
    for (std::size_t e = 0; e < rows.size(); ++e) {
      if (host_of[e / group_size] != h) continue;
      experts.push_back(static_cast<int>(e));
      weights.push_back(static_cast<double>(rows[e]));
    }
    const std::vector<std::size_t> expert_of = replicate(weights, num_slots / num_hosts);
    std::vector<std::size_t> count(experts.size());
    for (const std::size_t i : expert_of) ++count[i];
    std::vector<double> loads;
    for (const std::size_t i : expert_of) {
      loads.push_back(weights[i] / static_cast<double>(count[i]));
    }
    const std::vector<std::size_t> rank_of = balanced_packing(loads, num_ranks / num_hosts);
    for (std::size_t r = 0; r < num_ranks / num_hosts; ++r) {
      for (std::size_t i = 0; i < expert_of.size(); ++i) {
        if (rank_of[i] == r) slots.push_back(experts[expert_of[i]]);
      }
    }
  }
  return Placement::create(static_cast<int>(rows.size()), static_cast<int>(num_ranks),
                           std::move(slots));
}

}  // namespace sluice::eplb
