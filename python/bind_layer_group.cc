#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

/// Of the weights as the caller holds them.
LayerSpec spec_of(const ExpertWeights& weights, std::optional<int> layer, std::string name,
                  std::uint64_t identity, Placement placement) {
  if (layer) {
    throw Error(ErrorCode::kInvalidArgument,
                "layer: is for a checkpoint; weights are those of one layer");
  }
  return {.name = std::move(name),
          .weights = weights,
          .identity = identity,
          .placement = std::move(placement)};
}

/// That exactly one of the two ways is taken, and nothing is given that belongs to the other.
void check_source(const Checkpoint* checkpoint, std::optional<int> layer,
                  const ExpertWeights* weights, const std::string& name, std::uint64_t identity) {
  if ((checkpoint == nullptr) == (weights == nullptr)) {
    throw Error(ErrorCode::kInvalidArgument, "checkpoint, weights: give one of the two");
  }
  if (weights != nullptr) return;
  if (!layer) throw Error(ErrorCode::kInvalidArgument, "layer: a checkpoint needs the number");
  if (!name.empty() || identity != 0) {
    throw Error(ErrorCode::kInvalidArgument, "name, identity: a checkpoint has its own");
  }
}

PyLayer wrap(PyLayerGroup& group, Layer layer) {
  return make_layer(group.transport_object, group.backend_object, group.backend,
                    group.group->config(), std::move(layer));
}

PyLayer add_layer(PyLayerGroup& group, const Checkpoint* checkpoint, std::optional<int> layer,
                  const ExpertWeights* weights, std::string name, std::uint64_t identity,
                  const Name& low_latency, const Name& normal, const Name& dispatch_dtype,
                  const ProgressArgument& progress, const std::optional<Placement>& placement) {
  const ModeRecipes recipes = recipes_of(low_latency, normal, dispatch_dtype);
  check_source(checkpoint, layer, weights, name, identity);
  LoadOptions options = load_options(progress, 0);
  if (placement) options.placements = {*placement};
  std::optional<Layer> made;
  {
    const Call call(*group.backend, *group.transport);
    made.emplace(checkpoint != nullptr
                     ? group.group->add_layer(*checkpoint, *layer, recipes, options)
                     : group.group->add_layer(spec_of(*weights, layer, std::move(name), identity,
                                                      placement.value_or(Placement())),
                                              recipes));
  }
  return wrap(group, std::move(*made));
}

nb::typed<nb::list, PyLayer> add_layers(PyLayerGroup& group, const Checkpoint& checkpoint,
                                        const std::vector<int>& layers, const Name& low_latency,
                                        const Name& normal, const Name& dispatch_dtype,
                                        const ProgressArgument& progress, int num_threads,
                                        std::vector<Placement> placements) {
  const ModeRecipes recipes = recipes_of(low_latency, normal, dispatch_dtype);
  LoadOptions options = load_options(progress, num_threads);
  options.placements = std::move(placements);
  std::vector<Layer> made;
  {
    const Call call(*group.backend, *group.transport);
    made = group.group->add_layers(checkpoint, layers, recipes, options);
  }
  nb::list list;
  for (Layer& layer : made) list.append(nb::cast(wrap(group, std::move(layer))));
  return nb::typed<nb::list, PyLayer>(list);
}

void init_group(PyLayerGroup* self, nb::handle transport, nb::handle backend,
                const LayerGroupConfig& config) {
  auto& t = nb::cast<PyTransport&>(transport);
  auto& b = nb::cast<PyBackend&>(backend);
  std::optional<LayerGroup> group;
  {
    const Call call(b, t);
    group.emplace(LayerGroup::create(config, *t.transport, *b.backend));
  }
  new (self) PyLayerGroup{.transport_object = nb::borrow(transport),
                          .backend_object = nb::borrow(backend),
                          .backend = &b,
                          .transport = &t,
                          .group = std::move(group)};
}

}  // namespace

ModeRecipes recipes_of(const Name& low_latency, const Name& normal, const Name& dispatch_dtype) {
  return {.low_latency = recipe_or_none(low_latency),
          .normal = recipe_or_none(normal),
          .dispatch_dtype = dispatch_dtype ? parse_dispatch_dtype(*dispatch_dtype)
                                           : read_environment().dispatch_dtype};
}

LoadOptions load_options(const ProgressArgument& progress, int num_threads) {
  return {.num_threads = num_threads, .progress = [&progress](double fraction) {
            const Acquired acquired;
            if (PyErr_CheckSignals() != 0) nb::raise_python_error();
            if (progress) (*progress)(fraction);
          }};
}

nb::dict load_stats_dict(const LoadStats& stats) {
  nb::dict d;
  d["seconds"] = stats.seconds;
  d["file_bytes"] = stats.file_bytes;
  d["prepared_bytes"] = stats.prepared_bytes;
  d["host_bytes"] = stats.host_bytes;
  d["num_threads"] = stats.num_threads;
  return d;
}

nb::dict memory_dict(const LayerGroupMemory& m) {
  nb::dict d;
  d["num_layers"] = m.num_layers;
  d["codes_bytes"] = m.codes_bytes;
  d["scales_bytes"] = m.scales_bytes;
  d["prepared_bytes"] = m.prepared_bytes;
  d["exchange_bytes"] = m.exchange_bytes;
  d["scratch_bytes"] = m.scratch_bytes;
  d["moving_bytes"] = m.moving_bytes;
  d["total_bytes"] = m.total_bytes();
  return d;
}

void bind_layer_group(nb::module_& m) {
  nb::class_<PyLayerGroup>(
      m, "LayerGroup",
      "What the layers of a model share: transport, backend, one exchange for each mode and wire\n"
      "format, and the memory between the stages. Layers keep it alive. Construction, add_layer()\n"
      "and moe_forward() are collective; one thread at a time.")
      .def(
          "__init__",
          [](PyLayerGroup* self, nb::handle_t<PyTransport> transport,
             nb::handle_t<PyBackend> backend, const ModelGeometry& geometry, int low_latency_tokens,
             int normal_tokens, int max_m, float routed_scaling_factor, int num_in_flight,
             std::optional<int> timeout_ms, int num_slots, const std::vector<int>& hosts,
             int sum_parts) {
            init_group(self, transport, backend,
                       {.geometry = geometry,
                        .low_latency = {.max_tokens_per_rank = low_latency_tokens, .max_m = max_m},
                        .normal = {.max_tokens_per_rank = normal_tokens},
                        .num_slots = num_slots,
                        .hosts = hosts_or_transport(hosts),
                        .sum_parts = sum_parts,
                        .routed_scaling_factor = routed_scaling_factor,
                        .num_in_flight = num_in_flight,
                        .peer_timeout = timeout_or_environment(timeout_ms)});
          },
          "transport"_a, "backend"_a, nb::kw_only(), "geometry"_a, "low_latency_tokens"_a = 0,
          "normal_tokens"_a = 0, "max_m"_a = 0, "routed_scaling_factor"_a = 1.0f,
          "num_in_flight"_a = 0, "timeout_ms"_a = nb::none(), "num_slots"_a = 0,
          "hosts"_a = std::vector<int>(), "sum_parts"_a = 0,
          "geometry: num_experts, num_topk, hidden and intermediate of every layer.\n"
          "low_latency_tokens, normal_tokens: most tokens of a rank in a call of that mode; 0 for "
          "a\n"
          "mode that no layer has.\n"
          "max_m: low-latency, rows reserved for each expert; 0 for the worst case.\n"
          "routed_scaling_factor: 1 where the host model applies it.\n"
          "num_in_flight: calls of one mode and wire format at once; 0: as many as moe_forward() "
          "needs.\n"
          "timeout_ms: longest wait for a peer; None: SLUICE_TIMEOUT_MS or 10 s.\n"
          "num_slots: slots for experts over all ranks, so that experts may repeat and move; 0:\n"
          "expert e stays in slot e.\n"
          "hosts: each rank's host, numbered from 0; empty: those that the transport knows. Over "
          "several\n"
          "hosts a token crosses the network once for each. sum_parts: parts of the experts that "
          "are\n"
          "added up apart; 0: as many as hosts; 1: the order of one host, for more bytes.\n\n"
          "Raises Error: invalid_argument naming the field, transport naming ranks and field if "
          "ranks\n"
          "differ, out_of_memory, peer_timeout.")
      .def(
          "add_layer", &add_layer, "checkpoint"_a = nb::none(), nb::kw_only(),
          "layer"_a = nb::none(), "weights"_a = nb::none(), "name"_a = "", "identity"_a = 0,
          "low_latency"_a = nb::none(), "normal"_a = nb::none(), "dispatch_dtype"_a = nb::none(),
          "progress"_a = nb::none(), "placement"_a = nb::none(),
          "A Layer, from a checkpoint and a layer's number or from weights. Collective; no call "
          "of\n"
          "the group may be queued on any rank.\n\n"
          "weights: ExpertWeights of this rank's experts, with the static scales of the whole "
          "layer;\n"
          "not needed afterwards. name: for messages, also of several layers. identity: a number\n"
          "that tells these weights from others. Ranks compare both; of a checkpoint, its "
          "identity.\n"
          "low_latency, normal: recipe of a mode that the group has; None: 'direct'.\n"
          "dispatch_dtype: 'auto', 'bf16', 'fp8' or 'fp8-static'; None: SLUICE_DISPATCH_DTYPE.\n"
          "progress: for a checkpoint, as in add_layers().\n"
          "placement: a Placement, for a group with num_slots; None: Placement.even(). `weights` "
          "are\n"
          "then of the experts in this rank's slots, one after the other.\n\n"
          "Raises Error: invalid_argument for weights that do not fit the group, transport naming\n"
          "ranks and field if ranks differ or naming ranks that could not load their experts, and\n"
          "whatever Recipe, Checkpoint and Exchange raise.")
      .def("add_layers", &add_layers, "checkpoint"_a, "layers"_a, nb::kw_only(),
           "low_latency"_a = nb::none(), "normal"_a = nb::none(), "dispatch_dtype"_a = nb::none(),
           "progress"_a = nb::none(), "num_threads"_a = 0,
           "placements"_a = std::vector<Placement>(),
           "A list of Layers of a checkpoint, all or none, in one load: several threads read, "
           "repack\n"
           "and copy at once. Otherwise as add_layer().\n\n"
           "progress: called with the fraction done, 0 .. 1, ten times a second at most; what it\n"
           "raises ends the load. So does KeyboardInterrupt.\n"
           "num_threads: 0 for this rank's share of the cores, between 4 and 16. Each holds the\n"
           "scales of a matrix and a few MB of its codes in host memory.\n"
           "placements: a Placement for each layer, for a group with num_slots; empty:\n"
           "Placement.even().")
      .def(
          "load_stats",
          [](const PyLayerGroup& g) { return load_stats_dict(g.group->load_stats()); },
          "dict of what loading from checkpoints took on this rank so far: seconds, file_bytes,\n"
          "prepared_bytes, host_bytes (memory that was read into), num_threads.")
      .def(
          "memory", [](const PyLayerGroup& g) { return memory_dict(g.group->memory()); },
          "dict of the bytes that the group and its layers hold on this rank, as plan() names "
          "them;\n"
          "moving_bytes is what rebalance() keeps.")
      .def(
          "check",
          [](PyLayerGroup& g) {
            const Call call(*g.backend);
            g.group->check();
          },
          "Raises what earlier asynchronous calls found on the device.");
}

}  // namespace sluice::python
