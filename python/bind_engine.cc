#include <fmt/format.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "bindings.h"
#include "sluice/config.h"
#include "sluice/engine.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

nb::dict plan(const ModelGeometry& geometry, const Whole<"num_ranks">& given_ranks,
              const Whole<"max_tokens_per_rank">& given_tokens, const Name& low_latency,
              const Name& normal, const Whole<"max_m">& max_m, std::string_view scale_dtype,
              std::string_view device, const Whole<"num_layers">& given_layers,
              const Whole<"num_slots">& num_slots) {
  const int num_ranks = given_ranks, max_tokens_per_rank = given_tokens, num_layers = given_layers;
  if (scale_dtype != "f32" && scale_dtype != "bf16") {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("scale_dtype '{}' is not f32 or bf16", scale_dtype));
  }
  constexpr int kMaxLayers = 1000;  // As `sluice plan` has it.
  if (num_layers < 1 || num_layers > kMaxLayers) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("num_layers {} is outside [1, {}]", num_layers, kMaxLayers));
  }
  if (max_tokens_per_rank < 1) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("max_tokens_per_rank {} is not positive", max_tokens_per_rank));
  }
  const ModeRecipes recipes{.low_latency = recipe_or_none(low_latency),
                            .normal = recipe_or_none(normal),
                            .dispatch_dtype = read_environment().dispatch_dtype};
  LayerGroupConfig config{.geometry = geometry, .num_slots = num_slots};
  if (recipes.low_latency) config.low_latency = {max_tokens_per_rank, max_m};
  if (recipes.normal) config.normal.max_tokens_per_rank = max_tokens_per_rank;
  const std::vector<PlannedLayer> planned(
      static_cast<std::size_t>(num_layers),
      {.recipes = recipes,
       .weight_format = geometry.weight_format,
       .scale_dtype = scale_dtype == "f32" ? DType::kFloat32 : DType::kBFloat16,
       .group_size = geometry.group_size});
  return memory_dict(
      LayerGroup::plan_memory(config, planned, parse_device(device).kind, num_ranks));
}

void init_engine(PyEngine* self, const Checkpoint& checkpoint, nb::handle transport,
                 nb::handle backend, const EngineConfig& config) {
  auto& t = nb::cast<PyTransport&>(transport);
  auto& b = nb::cast<PyBackend&>(backend);
  std::optional<Engine> engine;
  {
    const Call call(b, t);
    engine.emplace(Engine::create(config, checkpoint, *t.transport, *b.backend));
  }
  const LayerGroupConfig group = engine->group_config();
  new (self) PyEngine{
      make_layer(nb::borrow(transport), nb::borrow(backend), &b, group, std::move(*engine))};
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::class_<PyEngine, PyLayer>(
      m, "Engine",
      "One MoE layer of a checkpoint, ready to run under expert parallelism: a Layer in a group "
      "of\n"
      "its own. Construction and moe_forward() are collective. Keeps transport and backend alive;\n"
      "the checkpoint is not needed afterwards.")
      .def(
          "__init__",
          [](PyEngine* self, const Checkpoint& checkpoint, nb::handle_t<PyTransport> transport,
             nb::handle_t<PyBackend> backend, const Whole<"layer">& layer,
             const Whole<"max_tokens_per_rank">& max_tokens_per_rank, const Name& low_latency,
             const Name& normal, const Whole<"max_m">& max_m, float routed_scaling_factor,
             const Name& dispatch_dtype, std::optional<int> timeout_ms,
             const Whole<"num_slots">& num_slots, const std::optional<Placement>& placement,
             const std::vector<int>& hosts, const Whole<"sum_parts">& sum_parts) {
            const ModeRecipes recipes = recipes_of(low_latency, normal, dispatch_dtype);
            init_engine(self, checkpoint, transport, backend,
                        {.layer = layer,
                         .low_latency = recipes.low_latency,
                         .normal = recipes.normal,
                         .dispatch_dtype = recipes.dispatch_dtype,
                         .max_tokens_per_rank = max_tokens_per_rank,
                         .max_m = max_m,
                         .num_slots = num_slots,
                         .placement = placement.value_or(Placement()),
                         .hosts = hosts_or_transport(hosts),
                         .sum_parts = sum_parts,
                         .routed_scaling_factor = routed_scaling_factor,
                         .peer_timeout = timeout_or_environment(timeout_ms)});
          },
          "checkpoint"_a, "transport"_a, "backend"_a, nb::kw_only(), "layer"_a,
          "max_tokens_per_rank"_a, "low_latency"_a = "direct", "normal"_a = "direct", "max_m"_a = 0,
          "routed_scaling_factor"_a = 1.0f, "dispatch_dtype"_a = nb::none(),
          "timeout_ms"_a = nb::none(), "num_slots"_a = 0, "placement"_a = nb::none(),
          "hosts"_a = std::vector<int>(), "sum_parts"_a = 0,
          "low_latency, normal: recipe of each mode; None for a mode that is not called.\n"
          "max_m: low-latency, rows reserved for each expert; 0 for the worst case.\n"
          "routed_scaling_factor: 1 where the host model applies it.\n"
          "dispatch_dtype: 'auto', 'bf16', 'fp8' or 'fp8-static'; None: SLUICE_DISPATCH_DTYPE.\n"
          "timeout_ms: longest wait for a peer; None: SLUICE_TIMEOUT_MS or 10 s.\n"
          "num_slots: slots for experts over all ranks, so that experts may repeat and move; 0: "
          "those\n"
          "of placement, or none. placement: a Placement; None: Placement.even().\n"
          "hosts: each rank's host, numbered from 0; empty: those that the transport knows. Over "
          "several\n"
          "hosts a token crosses the network once for each. sum_parts: parts of the experts that "
          "are\n"
          "added up apart; 0: as many as hosts; 1: the order of one host, for more bytes.\n\n"
          "Raises Error: transport naming ranks and field if ranks differ, and whatever Recipe,\n"
          "Checkpoint and Exchange raise.");

  m.def("plan", &plan, "geometry"_a, nb::kw_only(), "num_ranks"_a, "max_tokens_per_rank"_a,
        "low_latency"_a = "direct", "normal"_a = "direct", "max_m"_a = 0, "scale_dtype"_a = "f32",
        "device"_a = "cpu", "num_layers"_a = 1, "num_slots"_a = 0,
        "dict of the bytes that a LayerGroup of num_layers layers takes on each rank, before "
        "anything "
        "is\n"
        "loaded: num_layers; codes_bytes, scales_bytes and prepared_bytes of all layers together;\n"
        "exchange_bytes and scratch_bytes, which they share; moving_bytes, 0 before experts move;\n"
        "total_bytes of the last four.\n\n"
        "num_slots: room for so many experts on all ranks together, as LayerGroup has it.\n\n"
        "Raises Error: invalid_argument.");
}

}  // namespace sluice::python
