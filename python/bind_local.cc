#include <fmt/format.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "repeated_calls.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

struct PyLocalGroup {
  nb::object backend_object;
  PyBackend* backend;
  std::optional<LocalGroup> group;
};

/// Scales of a row of x, where its e4m3 codes come with some. Experts whose recipe has none refuse
/// any that are given.
std::int64_t scales_of_row(const PyLocalExperts& self) {
  const Cast sent = sent_cast(self.experts->recipe().wire);
  return scales_per_row(sent == Cast::kToken ? sent : Cast::kGroup, self.hidden);
}

/// What x must have: the model's own width if it is bf16 of that, else hidden.
std::int64_t width_of(const PyLocalExperts& self, const Array& x) {
  if (self.token_width == self.hidden) return self.hidden;
  const Input any = import_input(x, {.name = "x",
                                     .dtypes = {DType::kBFloat16, DType::kFloat8E4M3},
                                     .dims = {-1, -1},
                                     .shape = self.x_shape.c_str(),
                                     .device = self.backend->device()});
  const bool is_own = any.view.dtype == DType::kBFloat16 && any.view.dim(1) == self.token_width;
  return is_own ? self.token_width : self.hidden;
}

nb::object forward_routed(PyLocalExperts& self, const Array& x, const Routing& routing,
                          const std::optional<Array>& x_scale, const std::optional<Array>& out,
                          const StreamArgument& stream, KnownCall* known = nullptr) {
  const Device device = self.backend->device();
  const auto import = [&](std::initializer_list<DType> dtypes) {
    return import_input(x, {.name = "x",
                            .dtypes = dtypes,
                            .dims = {-1, width_of(self, x)},
                            .shape = self.x_shape.c_str(),
                            .device = device});
  };
  const bool sends_bf16 = self.experts->recipe().wire == WireFormat::kBf16;
  const Input tokens =
      sends_bf16 ? import({DType::kBFloat16}) : import({DType::kBFloat16, DType::kFloat8E4M3});
  const std::int64_t num_tokens = tokens.view.dim(0);
  Input scale;
  if (x_scale) {
    scale = import_input(*x_scale, {.name = "x_scale",
                                    .dtypes = {DType::kFloat32},
                                    .dims = {num_tokens, scales_of_row(self)},
                                    .shape = "[num_tokens, hidden / 128 or 1], as x",
                                    .device = device});
  }
  const Output y = output_or_new(out,
                                 {.name = "out",
                                  .dtypes = {DType::kBFloat16},
                                  .dims = {num_tokens, tokens.view.dim(1)},
                                  .shape = "[num_tokens, hidden], as x",
                                  .device = device},
                                 tokens.framework, *self.backend->backend);
  const Stream queue = to_stream(stream, tokens.framework, device);
  {
    const Call call(*self.backend);
    self.experts->forward(tokens.view, routing, y.view, queue, scale.view);
  }
  if (known != nullptr) known->was_made(tokens.view, routing, scale.view, y.view);
  return y.object;
}

nb::object forward(PyLocalExperts& self, const Array& x, const PyRouting& routing,
                   const std::optional<Array>& x_scale, const std::optional<Array>& out,
                   const StreamArgument& stream) {
  return forward_routed(self, x, routing.view(), x_scale, out, stream);
}

/// The same for a call that is made often: nothing is kept of the routing, which C++ checks whole.
nb::object forward_topk(PyLocalExperts& self, const Array& x, const Array& topk_idx,
                        const Array& topk_weights, const std::optional<Array>& x_scale,
                        const std::optional<Array>& out) {
  KnownCall known(self, x, topk_idx, &topk_weights, x_scale, 0, out);
  if (known.run()) return known.y()->object;
  const Device device = self.backend->device();
  const Input idx = import_input(topk_idx, {.name = "topk_idx",
                                            .dtypes = {DType::kInt64, DType::kInt32},
                                            .dims = {-1, -1},
                                            .shape = "[num_tokens, num_topk]",
                                            .device = device});
  const Input weights = import_input(topk_weights, {.name = "topk_weights",
                                                    .dtypes = {DType::kFloat32},
                                                    .dims = {-1, -1},
                                                    .shape = "[num_tokens, num_topk], as topk_idx",
                                                    .device = device});
  return forward_routed(self, x, {.topk_idx = idx.view, .topk_weights = weights.view}, x_scale,
                        known.y(), std::nullopt, &known);
}

nb::object forward_batch(PyLocalExperts& self, const Array& x, const Array& num_rows,
                         const std::optional<Array>& x_scale, int expected_m,
                         const std::optional<Array>& out, const StreamArgument& stream) {
  std::optional<KnownCall> known;
  if (!stream) known.emplace(self, x, num_rows, nullptr, x_scale, expected_m, out);
  if (known && known->run()) return known->y()->object;
  const Device device = self.backend->device();
  const bool bf16 = self.experts->recipe().wire == WireFormat::kBf16;
  const std::int64_t num_experts = self.experts->num_experts();
  const Input rows = import_input(x, {.name = "x",
                                      .dtypes = {bf16 ? DType::kBFloat16 : DType::kFloat8E4M3},
                                      .dims = {num_experts, -1, self.hidden},
                                      .shape = "[num_experts, max_m, hidden]",
                                      .device = device});
  const std::int64_t max_m = rows.view.dim(1);
  const Input count = import_input(num_rows, {.name = "num_rows",
                                              .dtypes = {DType::kInt32},
                                              .dims = {num_experts},
                                              .shape = "[num_experts]",
                                              .device = device});
  Input scale;
  if (x_scale) {
    scale = import_input(*x_scale, {.name = "x_scale",
                                    .dtypes = {DType::kFloat32},
                                    .dims = {num_experts, max_m, scales_of_row(self)},
                                    .shape = "[num_experts, max_m, hidden / 128 or 1], as x",
                                    .device = device});
  }
  const Output y = output_or_new(known ? known->y() : out,
                                 {.name = "out",
                                  .dtypes = {DType::kBFloat16},
                                  .dims = {num_experts, max_m, self.hidden},
                                  .shape = "[num_experts, max_m, hidden], as x",
                                  .device = device},
                                 rows.framework, *self.backend->backend);
  const Stream queue = to_stream(stream, rows.framework, device);
  const ExpertBatch batch{.layout = Mode::kLowLatency,
                          .x = rows.view,
                          .x_scale = scale.view,
                          .num_rows = count.view,
                          .row_begin = {},
                          .expected_m = expected_m};
  {
    const Call call(*self.backend);
    self.experts->forward_batch(batch, y.view, queue);
  }
  if (known) known->was_made(batch, y.view);
  return y.object;
}

PyLocalExperts add_weights(PyLocalGroup& self, const ExpertWeights& weights,
                           std::string_view recipe, std::string name) {
  std::optional<LocalExperts> experts;
  {
    const Call call(*self.backend);
    experts.emplace(self.group->add_layer(weights, parse_recipe(recipe), std::move(name)));
  }
  return {self.backend_object,
          self.backend,
          self.group->config().hidden,
          weights.geometry.token_width(),
          {},
          std::move(experts)};
}

PyLocalExperts add_experts(PyLocalGroup& self, const PyExperts& repacked, const LayerRecipe& recipe,
                           int first_expert, std::string name) {
  std::optional<LocalExperts> experts;
  {
    const Call call(*self.backend);
    experts.emplace(
        self.group->add_layer(*repacked.experts, recipe, first_expert, std::move(name)));
  }
  return {self.backend_object,
          self.backend,
          self.group->config().hidden,
          repacked.experts->geometry().token_width(),
          repacked.memory,
          std::move(experts)};
}

nb::typed<nb::list, PyLocalExperts> add_checkpoint(PyLocalGroup& self, const Checkpoint& checkpoint,
                                                   const std::vector<int>& layers, int first,
                                                   int count, std::string_view recipe,
                                                   const ProgressArgument& progress,
                                                   int num_threads) {
  const LoadOptions options = load_options(progress, num_threads);
  std::vector<LocalExperts> made;
  {
    const Call call(*self.backend);
    made = self.group->add_layers(checkpoint, layers, first, count, parse_recipe(recipe), options);
  }
  nb::list list;
  for (LocalExperts& experts : made) {
    list.append(nb::cast(PyLocalExperts{self.backend_object,
                                        self.backend,
                                        self.group->config().hidden,
                                        checkpoint.geometry().token_width(),
                                        {},
                                        std::move(experts)}));
  }
  return nb::typed<nb::list, PyLocalExperts>(list);
}

void bind_local_experts(nb::module_& m) {
  nb::class_<PyLocalExperts>(
      m, "LocalExperts",
      "Experts of one layer on a rank's own tokens, without an exchange: for one device, or for a\n"
      "stack whose ranks add up their results. Keeps its group's buffers and backend alive.")
      .def(
          "__init__",
          [](PyLocalExperts* self, const ExpertWeights& weights, nb::handle_t<PyBackend> backend,
             std::int64_t max_entries, std::string_view recipe, float routed_scaling_factor) {
            auto& b = nb::cast<PyBackend&>(backend);
            const LocalGroupConfig config{.hidden = weights.geometry.hidden,
                                          .intermediate = weights.geometry.intermediate,
                                          .max_entries = max_entries,
                                          .routed_scaling_factor = routed_scaling_factor};
            std::optional<LocalExperts> experts;
            {
              const Call call(b);
              experts.emplace(
                  LocalExperts::create(config, weights, *b.backend, parse_recipe(recipe)));
            }
            new (self) PyLocalExperts{
                nb::borrow(backend), &b, config.hidden, weights.geometry.token_width(), {},
                std::move(experts)};
          },
          "weights"_a, "backend"_a, nb::kw_only(), "max_entries"_a, "recipe"_a = "direct",
          "routed_scaling_factor"_a = 1.0f,
          "In a LocalGroup of its own.\n\n"
          "weights: experts [first, first + count) of a layer, as Checkpoint.load_experts() or\n"
          "ExpertWeights.from_arrays() give them; not needed afterwards.\n"
          "max_entries: most top-k entries of a call, num_tokens * num_topk.\n"
          "routed_scaling_factor: 1 where the host model applies it.\n\n"
          "Raises Error: invalid_argument naming the field, unsupported naming the recipe,\n"
          "out_of_memory.")
      .def(
          "forward", &forward, "x"_a, "routing"_a, nb::kw_only(), "x_scale"_a = nb::none(),
          "out"_a = nb::none(), "stream"_a = nb::none(),
          "y[t] = sum over k of topk_weights[t, k] * expert topk_idx[t, k] of x[t]: bfloat16\n"
          "[num_tokens, hidden]. Entries whose expert is not here are skipped: those of other\n"
          "experts, -1, and any other number. Summed in float32 in order of k, rounded once; with\n"
          "all experts of a layer the bits of an Engine.\n\n"
          "x: [num_tokens, hidden] bfloat16 (or uint16), or e4m3 in the recipe's wire format;\n"
          "0 tokens are fine. Where hidden is padded (ModelGeometry.token_width), bfloat16 rows "
          "may\n"
          "have the model's own width, and y has it then.\n"
          "x_scale: [num_tokens, hidden / 128] float32, for e4m3 with group scales;\n"
          "[num_tokens, 1] for e4m3 with one scale per token.\n"
          "out: y's memory, which may be x; None makes a new array: torch's for tensors of torch,\n"
          "else numpy uint16.\n"
          "stream: handle of a CUDA stream, None: torch's current one for tensors of torch, else\n"
          "the default stream. Asynchronous on CUDA, and capturable once a call has run; the CPU\n"
          "backend returns when done.\n\n"
          "Raises Error: invalid_argument naming the argument.")
      .def("forward_topk", &forward_topk, "x"_a, "topk_idx"_a, "topk_weights"_a,
           "x_scale"_a = nb::none(), "out"_a = nb::none(),
           "forward() of a Routing that is used once, on the current stream.\n\n"
           "topk_idx: [num_tokens, num_topk] int64 or int32. topk_weights: the same in float32.\n\n"
           "Raises Error: invalid_argument naming the argument.")
      .def("forward_batch", &forward_batch, "x"_a, "num_rows"_a, "x_scale"_a = nb::none(),
           "expected_m"_a = 0, "out"_a = nb::none(), nb::kw_only(), "stream"_a = nb::none(),
           "Every expert on its rows, masked layout, in the group's memory; the router's weights\n"
           "are left to combine.\n\n"
           "x: [num_experts, max_m, hidden] bfloat16 or e4m3, as the recipe's wire has them.\n"
           "num_rows: [num_experts] int32. x_scale: [num_experts, max_m, hidden / 128] float32, "
           "for\n"
           "e4m3 with group scales, [num_experts, max_m, 1] with one per token. expected_m: mean\n"
           "rows of an expert, a hint.\n"
           "out, stream: as forward(). Rows that are not valid stay as they are.\n\n"
           "Raises Error: invalid_argument naming the argument, or for more rows than "
           "reserve_batch()\nmade room for.")
      .def(
          "reserve_batch",
          [](PyLocalExperts& e, std::int64_t max_rows) {
            const Call call(*e.backend);
            e.experts->reserve_batch(max_rows);
          },
          "max_rows"_a,
          "Makes room for batches of max_rows rows, padding included, for all layers of the "
          "group.\n"
          "Graphs that were captured before stay valid. Allocates: not during a capture.\n\n"
          "Raises Error: invalid_argument, out_of_memory.")
      .def_prop_ro(
          "max_batch_rows", [](const PyLocalExperts& e) { return e.experts->max_batch_rows(); },
          "Largest batch, padding included.")
      .def(
          "__len__", [](const PyLocalExperts& e) { return e.experts->num_experts(); },
          "Experts here.")
      .def_prop_ro(
          "num_repeated_calls", [](const PyLocalExperts& e) { return e.calls.num_repeated(); },
          "Calls of forward_topk() and forward_batch() that came again with the memory of an "
          "earlier\n"
          "one, and so were not converted and checked anew.")
      .def_prop_ro(
          "name", [](const PyLocalExperts& e) { return e.experts->name(); }, "As messages have it.")
      .def_prop_ro(
          "recipe", [](const PyLocalExperts& e) { return e.experts->recipe(); }, "Of the layer.")
      .def_prop_ro(
          "first_expert", [](const PyLocalExperts& e) { return e.experts->first_expert(); },
          "Number of the first expert here.")
      .def_prop_ro(
          "weight_bytes", [](const PyLocalExperts& e) { return e.experts->weight_bytes(); },
          "Of the repacked weights.");
}

}  // namespace

void bind_local(nb::module_& m) {
  m.def(
      "slice_experts", &slice_experts, "weights"_a, "slice"_a, "num_slices"_a,
      "ExpertWeights: slice `slice` of `num_slices` of each expert, for tensor parallelism. It is\n"
      "the expert's intermediate channels from slice * intermediate / num_slices on. The outputs\n"
      "of all slices add up to those of the experts.\n\n"
      "Raises Error: invalid_argument if slices are no multiples of 128 channels.");
  bind_local_experts(m);
  bind_repeated_calls(m);
  nb::class_<PyLocalGroup>(
      m, "LocalGroup",
      "What the LocalExperts of several layers share: the backend and the rows between the "
      "stages.\n"
      "They run one after the other, and keep it alive. One thread at a time.",
      nb::is_weak_referenceable())
      .def(
          "__init__",
          [](PyLocalGroup* self, nb::handle_t<PyBackend> backend, int hidden, int intermediate,
             std::int64_t max_entries, float routed_scaling_factor) {
            auto& b = nb::cast<PyBackend&>(backend);
            std::optional<LocalGroup> group;
            {
              const Call call(b);
              group.emplace(LocalGroup::create({.hidden = hidden,
                                                .intermediate = intermediate,
                                                .max_entries = max_entries,
                                                .routed_scaling_factor = routed_scaling_factor},
                                               *b.backend));
            }
            new (self) PyLocalGroup{nb::borrow(backend), &b, std::move(group)};
          },
          "backend"_a, nb::kw_only(), "hidden"_a, "intermediate"_a, "max_entries"_a,
          "routed_scaling_factor"_a = 1.0f,
          "hidden, intermediate: of every layer. max_entries, routed_scaling_factor: as for\n"
          "LocalExperts.\n\n"
          "Raises Error: invalid_argument naming the field, out_of_memory.")
      .def("add_layer", &add_weights, "weights"_a, nb::kw_only(), "recipe"_a = "direct",
           "name"_a = "",
           "LocalExperts of these weights, which are repacked and not needed afterwards. name: "
           "for\n"
           "messages.\n\n"
           "Raises Error: invalid_argument for weights that do not fit the group, unsupported\n"
           "naming the recipe, out_of_memory.")
      .def("add_layer", &add_experts, "experts"_a, nb::kw_only(), "recipe"_a, "first_expert"_a = 0,
           "name"_a = "",
           "The same of experts that repack() made with this backend; shares their memory. "
           "recipe:\n"
           "a Recipe. first_expert: number of the first one.")
      .def(
          "add_layers", &add_checkpoint, "checkpoint"_a, "layers"_a, nb::kw_only(), "first"_a,
          "count"_a, "recipe"_a = "direct", "progress"_a = nb::none(), "num_threads"_a = 0,
          "A list of LocalExperts: experts [first, first + count) of each of these layers, all or\n"
          "none. progress, num_threads: as in LayerGroup.add_layers().\n\n"
          "Raises Error: also whatever Checkpoint.load_experts() raises.")
      .def(
          "load_stats",
          [](const PyLocalGroup& g) { return load_stats_dict(g.group->load_stats()); },
          "As LayerGroup.load_stats().")
      .def(
          "reserve",
          [](PyLocalGroup& g, std::int64_t max_entries) {
            const Call call(*g.backend);
            g.group->reserve(max_entries);
          },
          "max_entries"_a,
          "Makes room for calls of more top-k entries. Graphs that were captured before stay "
          "valid,\n"
          "since the smaller buffers are kept. Allocates: not during a capture.\n\n"
          "Raises Error: out_of_memory.")
      .def_prop_ro(
          "max_entries", [](const PyLocalGroup& g) { return g.group->config().max_entries; },
          "Most top-k entries of a call.")
      .def(
          "memory",
          [](const PyLocalGroup& g) {
            const LocalGroupMemory memory = g.group->memory();
            nb::dict d;
            d["num_layers"] = memory.num_layers;
            d["prepared_bytes"] = memory.prepared_bytes;
            d["scratch_bytes"] = memory.scratch_bytes;
            return d;
          },
          "dict of the bytes that the group and its layers hold.");
}

}  // namespace sluice::python
