#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "sluice/lab/accuracy.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

nb::object number_or_none(const std::optional<double>& value) {
  return value ? nb::object(nb::float_(*value)) : nb::object(nb::none());
}

nb::dict errors_dict(const ErrorNumbers& e) {
  nb::dict d;
  d["relative_l2"] = e.relative_l2;
  d["sqnr_db"] = e.sqnr_db;
  d["worst_token_error"] = e.worst_token_error;
  d["p99_token_error"] = e.p99_token_error;
  d["worst_token"] = e.worst_token;
  d["p99_channel_error"] = e.p99_channel_error;
  return d;
}

nb::dict counts_dict(const CastCounts& c) {
  nb::dict d;
  d["values"] = c.values;
  d["saturated"] = c.saturated;
  d["underflowed"] = c.underflowed;
  return d;
}

nb::dict recipe_dict(const RecipeCertificate& r) {
  nb::dict roundings;
  roundings["weights"] = number_or_none(r.roundings.weights);
  roundings["activation1"] = r.roundings.activation1;
  roundings["activation2"] = r.roundings.activation2;
  roundings["accumulation"] = r.roundings.accumulation;
  roundings["combine"] = r.roundings.combine;
  roundings["together"] = r.roundings.together;
  roundings["quadrature"] = r.roundings.quadrature;
  nb::dict d;
  d["refused"] = r.refused;
  d["output"] = errors_dict(r.output);
  d["activation1"] = errors_dict(r.activation1);
  d["total"] = r.total ? nb::object(errors_dict(*r.total)) : nb::object(nb::none());
  d["added_percent"] = number_or_none(r.added_percent);
  d["cast1"] = counts_dict(r.cast1);
  d["cast2"] = counts_dict(r.cast2);
  d["roundings"] = roundings;
  return d;
}

}  // namespace

void bind_accuracy(nb::module_& m) {
  m.def(
      "suite_names", [] { return suite_names(); }, "Sets of tokens that accuracy() knows.");
  m.def(
      "accuracy",
      [](const Checkpoint& checkpoint, int layer, std::string_view suite, std::int64_t num_tokens,
         std::uint64_t seed, const std::vector<std::string>& recipes, int num_threads) {
        SuiteCertificate certificate;
        {
          const Released released;
          AccuracyConfig config;
          config.static_scales = checkpoint.static_scales(layer);
          config.expert_scales = checkpoint.input_scales(layer);
          config.num_threads = num_threads;
          for (const std::string& name : recipes) config.recipes.push_back(parse_recipe(name));
          const auto source = make_checkpoint_source(checkpoint, layer, seed);
          certificate =
              certify(*source, make_suite(suite, checkpoint.geometry(), num_tokens, seed), config);
        }
        nb::dict by_recipe;
        for (const auto& r : certificate.recipes) {
          by_recipe[to_string(r.recipe).c_str()] = recipe_dict(r);
        }
        nb::dict d;
        d["suite"] = certificate.name;
        d["num_tokens"] = certificate.num_tokens;
        d["num_rows"] = certificate.num_rows;
        d["recipes"] = by_recipe;
        d["recommendation"] = certificate.safety.recommendation;
        return d;
      },
      "checkpoint"_a, nb::kw_only(), "layer"_a, "suite"_a = "gaussian", "num_tokens"_a = 64,
      "seed"_a = 1, "recipes"_a = nb::list(), "num_threads"_a = 0,
      "What each rounding of each recipe costs on a layer, against float64: dict with suite,\n"
      "num_tokens, num_rows, recipes (by name: output, total, added_percent, roundings, casts) "
      "and\n"
      "recommendation. Errors are relative L2 norms.\n\n"
      "suite: one of suite_names(). recipes: names; empty for all. num_threads: 0 for all "
      "cores.\n\n"
      "Raises Error: invalid_argument, corrupt_file.");
}

}  // namespace sluice::python
