#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "sluice/recipe.h"

namespace sluice::python {

using namespace nb::literals;

void bind_recipe(nb::module_& m) {
  m.def(
      "recipe_names",
      [] {
        std::vector<std::string> names;
        for (const RecipeName name : all_recipes()) names.emplace_back(to_string(name));
        return names;
      },
      "Names of all recipes.");
  nb::class_<Recipe>(m, "Recipe", "What is rounded where, for one layer and mode.")
      .def(
          "__init__",
          [](Recipe* self, std::string_view name, std::string_view mode, std::optional<float> s1,
             std::optional<float> s2) {
            std::optional<StaticScales> scales;
            if (s1.has_value() != s2.has_value()) {
              throw Error(ErrorCode::kInvalidArgument, "s1 and s2: give both or neither");
            }
            if (s1) scales = StaticScales{*s1, *s2};
            new (self) Recipe(resolve_recipe(parse_recipe(name), parse_mode(mode),
                                             DispatchDtype::kAuto, scales, "the layer"));
          },
          "name"_a, "mode"_a = "low-latency", nb::kw_only(), "s1"_a = nb::none(),
          "s2"_a = nb::none(),
          "name: see recipe_names(). mode: 'low-latency' or 'normal'.\n"
          "s1, s2: static scales of the inputs of GEMM1 and GEMM2; needed by the static "
          "recipes.\n\n"
          "Raises Error: invalid_argument, unsupported.")
      .def_prop_ro(
          "name", [](const Recipe& r) { return to_string(r.name); }, "One of recipe_names().")
      .def_prop_ro(
          "mode", [](const Recipe& r) { return to_string(r.mode); }, "'low-latency' or 'normal'.")
      .def_prop_ro(
          "wire", [](const Recipe& r) { return to_string(r.wire); },
          "Format of rows between ranks; Exchange takes it.")
      .def_ro("gemm1_as_sent", &Recipe::gemm1_as_sent, "Whether GEMM1 reads the received bytes.")
      .def_ro("s1", &Recipe::s1, "Static scale of GEMM1's input, or 0.")
      .def_ro("s2", &Recipe::s2, "Static scale of GEMM2's input, or 0.")
      .def("__repr__", [](const Recipe& r) { return "<sluice.Recipe " + r.describe() + ">"; });
}

}  // namespace sluice::python
