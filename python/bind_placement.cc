#include <fmt/core.h>
#include <nanobind/operators.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <filesystem>
#include <map>
#include <utility>

#include "bindings.h"
#include "sluice/balance.h"
#include "sluice/placement.h"
#include "sluice/placement_files.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

using Counts = std::vector<std::int64_t>;

std::vector<int> to_vector(std::span<const int> values) {
  return {values.begin(), values.end()};
}

void check_expert(const Placement& placement, int expert) {
  if (expert >= 0 && expert < placement.num_experts()) return;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("expert {} is not in [0, {})", expert, placement.num_experts()));
}

void bind_placement_class(nb::module_& m) {
  nb::class_<Placement>(
      m, "Placement",
      "Which slot holds which expert. A value; equal ones compare and hash equal.\n\n"
      "A rank has slots_per_rank slots: rank r those from r * slots_per_rank on.")
      .def(
          "__init__",
          [](Placement* self, int num_experts, int num_ranks, std::vector<int> slot_experts) {
            new (self)
                Placement(Placement::create(num_experts, num_ranks, std::move(slot_experts)));
          },
          "num_experts"_a, "num_ranks"_a, "slot_experts"_a,
          "slot_experts: [num_slots], the expert of each slot, -1 for an empty one. Other engines "
          "call it\nthe physical to logical map.\n\nRaises Error: invalid_argument.")
      .def_static("identity", &Placement::identity, "num_experts"_a, "num_ranks"_a,
                  "Expert e in slot e.\n\nRaises Error: invalid_argument unless num_ranks divides "
                  "num_experts.")
      .def_static("even", &Placement::even, "num_experts"_a, "num_ranks"_a, "num_slots"_a,
                  "Each expert once, in order, as many on each rank give or take one.\n\n"
                  "Raises Error: invalid_argument.")
      .def_prop_ro("num_experts", &Placement::num_experts, "Logical experts.")
      .def_prop_ro("num_ranks", &Placement::num_ranks)
      .def_prop_ro("num_slots", &Placement::num_slots, "Of all ranks.")
      .def_prop_ro("slots_per_rank", &Placement::slots_per_rank)
      .def_prop_ro(
          "slot_experts", [](const Placement& p) { return to_vector(p.slot_experts()); },
          "[num_slots], the expert of each slot, -1 for an empty one.")
      .def(
          "slots_of",
          [](const Placement& p, int expert) {
            check_expert(p, expert);
            return to_vector(p.slots_of(expert));
          },
          "expert"_a, "The slots that hold the expert, ascending.")
      .def(nb::self == nb::self)
      .def("__hash__",
           [](const Placement& p) {
             return nb::hash(nb::make_tuple(p.num_experts(), p.num_ranks(), p.digest()));
           })
      .def("__repr__", [](const Placement& p) {
        return fmt::format("sluice.Placement({} experts in {} slots of {} ranks)", p.num_experts(),
                           p.num_slots(), p.num_ranks());
      });
}

void bind_balance(nb::module_& m) {
  m.def(
      "balance",
      [](const Counts& counts, int ranks, int slots, int hosts, int groups,
         const std::optional<Placement>& previous) {
        return balance(
            counts,
            {.num_ranks = ranks, .num_slots = slots, .num_hosts = hosts, .num_groups = groups},
            previous.value_or(Placement()));
      },
      "counts"_a, "ranks"_a, "slots"_a, nb::kw_only(), "hosts"_a = 1, "groups"_a = 0,
      "previous"_a = nb::none(),
      "A placement that makes the fullest rank's expected rows small.\n\n"
      "counts: [num_experts], rows of each expert. slots: of all ranks, a multiple of ranks.\n"
      "hosts: with more than one, all replicas of an expert are on one host. groups: groups of\n"
      "consecutive experts that stay on one host; 0: every expert by itself. previous: where the\n"
      "experts are now; as many as possible stay.\n\n"
      "Raises Error: invalid_argument naming the field.");
  m.def(
      "expected_rows",
      [](const Counts& counts, const Placement& placement) {
        return expected_rows(counts, placement);
      },
      "counts"_a, "placement"_a,
      "[num_ranks], the rows that each rank is to expect.\n\nRaises Error: invalid_argument.");
  m.def(
      "max_over_mean", [](const std::vector<double>& values) { return max_over_mean(values); },
      "values"_a,
      "The largest over the mean: 1 if all are alike; 0 if none has anything.\n\n"
      "Raises Error: invalid_argument for a value that is not finite or is below 0.");
  m.def("count_moves", &count_moves, "before"_a, "after"_a,
        "How many experts a rebalance sends from rank to rank.\n\nRaises Error: invalid_argument.");
  m.def("placement_toward", &placement_toward, "before"_a, "after"_a, "max_received"_a,
        "A placement on the way from one to another, for moving experts a few at a time: no rank\n"
        "receives more than max_received experts from others at once. Called again with its "
        "result,\n"
        "it gives `after` in the end.\n\n"
        "Raises Error: invalid_argument.");
}

/// By layer, in the order of their numbers.
std::map<int, Placement> placements_by_layer(const std::filesystem::path& path) {
  std::map<int, Placement> placements;
  for (LayerPlacement& one : read_placements(path)) {
    placements.emplace(one.layer, std::move(one.placement));
  }
  return placements;
}

std::map<int, std::vector<Counts>> rows_by_layer(const std::filesystem::path& path) {
  std::map<int, std::vector<Counts>> rows;
  for (LayerRows& one : read_expert_rows(path).layers)
    rows.emplace(one.layer, std::move(one.steps));
  return rows;
}

void bind_files(nb::module_& m) {
  m.def("read_placements", &placements_by_layer, "path"_a,
        "{layer: Placement} of a file that `sluice balance` wrote.\n\n"
        "Raises Error: io, corrupt_file naming the key, unsupported for a later version.");
  m.def(
      "write_placements",
      [](const std::filesystem::path& path, const std::map<int, Placement>& placements) {
        std::vector<LayerPlacement> layers;
        for (const auto& [layer, placement] : placements) layers.push_back({layer, placement});
        write_placements(path, layers);
      },
      "path"_a, "placements"_a,
      "{layer: Placement} as a file. Raises Error: invalid_argument, io.");
  m.def("read_expert_rows", &rows_by_layer, "path"_a,
        "{layer: [num_steps][num_experts]} of a file that `sluice run --expert-rows` wrote.\n\n"
        "Raises Error: io, corrupt_file naming the key, unsupported for a later version.");
  m.def(
      "write_expert_rows",
      [](const std::filesystem::path& path, const std::map<int, std::vector<Counts>>& rows) {
        ExpertRows file;
        for (const auto& [layer, steps] : rows) file.layers.push_back({layer, steps});
        if (!file.layers.empty() && !file.layers.front().steps.empty()) {
          file.num_experts = static_cast<int>(file.layers.front().steps.front().size());
        }
        write_expert_rows(path, file);
      },
      "path"_a, "rows"_a,
      "{layer: [num_steps][num_experts]} as a file for `sluice balance --counts`.\n\n"
      "Raises Error: invalid_argument, io.");
}

}  // namespace

void bind_placement(nb::module_& m) {
  bind_placement_class(m);
  bind_balance(m);
  bind_files(m);
}

}  // namespace sluice::python
