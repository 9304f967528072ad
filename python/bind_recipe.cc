#include <nanobind/operators.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "sluice/recipe.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

LayerRecipe resolve(const Recipe& recipe, std::string_view mode, std::optional<float> s1,
                    std::optional<float> s2) {
  std::optional<StaticScales> scales;
  if (s1.has_value() != s2.has_value()) {
    throw Error(ErrorCode::kInvalidArgument, "s1 and s2: give both or neither");
  }
  if (s1) scales = StaticScales{*s1, *s2};
  return resolve_recipe(recipe, parse_mode(mode), DispatchDtype::kAuto, scales, "the layer");
}

}  // namespace

void bind_recipe(nb::module_& m) {
  m.def(
      "recipe_names",
      [] {
        std::vector<std::string> names;
        for (const NamedRecipe& row : named_recipes()) names.emplace_back(row.name);
        return names;
      },
      "Names of all recipes that have one.");
  nb::class_<LayerRecipe>(
      m, "Recipe",
      "What is rounded where, for one layer and mode. A value; equal ones compare and hash equal.")
      .def(
          "__init__",
          [](LayerRecipe* self, std::string_view name, std::string_view mode,
             std::optional<float> s1, std::optional<float> s2) {
            new (self) LayerRecipe(resolve(parse_recipe(name), mode, s1, s2));
          },
          "name"_a, "mode"_a = "low-latency", nb::kw_only(), "s1"_a = nb::none(),
          "s2"_a = nb::none(),
          "name: see recipe_names(). mode: 'low-latency' or 'normal'.\n"
          "s1, s2: static scales of the inputs of GEMM1 and GEMM2; needed by the static "
          "recipes.\n\n"
          "Raises Error: invalid_argument, unsupported.")
      .def_static(
          "from_fields",
          [](std::string_view wire, std::string_view gemm1, std::string_view gemm2,
             std::string_view mode, std::optional<float> s1, std::optional<float> s2) {
            return resolve({.wire = parse_wire_format(wire),
                            .gemm1 = parse_cast(gemm1),
                            .gemm2 = parse_cast(gemm2)},
                           mode, s1, s2);
          },
          nb::kw_only(), "wire"_a, "gemm1"_a, "gemm2"_a, "mode"_a = "low-latency",
          "s1"_a = nb::none(), "s2"_a = nb::none(),
          "The recipe with these fields, whether or not it has a name.\n\n"
          "wire: as the property of that name. gemm1, gemm2: 'none', 'group', 'group-pow2', "
          "'static',\n'static-pow2' or 'token'. mode, s1, s2: as for Recipe().\n\n"
          "Raises Error: invalid_argument; unsupported naming the fields that nothing computes.")
      .def_prop_ro(
          "name", [](const LayerRecipe& r) { return to_string(r); },
          "One of recipe_names(), or the fields where no name stands for them.")
      .def_prop_ro(
          "mode", [](const LayerRecipe& r) { return to_string(r.mode); },
          "'low-latency' or 'normal'.")
      .def_prop_ro(
          "wire", [](const LayerRecipe& r) { return to_string(r.wire); },
          "Format of rows between ranks; Exchange takes it.")
      .def_prop_ro(
          "gemm1", [](const LayerRecipe& r) { return to_string(r.gemm1); },
          "The receiver's cast before GEMM1; 'none' if GEMM1 reads the received bytes.")
      .def_prop_ro(
          "gemm2", [](const LayerRecipe& r) { return to_string(r.gemm2); },
          "The cast of h before GEMM2.")
      .def_ro("s1", &LayerRecipe::s1, "Static scale of the wire or of GEMM1's input, or 0.")
      .def_ro("s2", &LayerRecipe::s2, "Static scale of GEMM2's input, or 0.")
      .def(nb::self == nb::self)
      .def("__hash__",
           [](const LayerRecipe& r) {
             return nb::hash(nb::make_tuple(to_string(r), to_string(r.mode), r.s1, r.s2));
           })
      .def("__repr__", [](const LayerRecipe& r) { return "<sluice.Recipe " + r.describe() + ">"; });
}

}  // namespace sluice::python
