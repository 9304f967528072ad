#include <fmt/format.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include "bindings.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

using Name = std::optional<std::string_view>;

std::optional<Recipe> recipe_or_none(const Name& name) {
  return name ? std::optional(parse_recipe(*name)) : std::nullopt;
}

Mode mode_of(const PyEngine& engine, const Name& mode) {
  if (mode) return parse_mode(*mode);
  if (engine.only_mode) return *engine.only_mode;
  throw Error(ErrorCode::kInvalidArgument,
              "mode: expected 'low-latency' or 'normal', as this engine has both; got None");
}

nb::object moe_forward(PyEngine& engine, const Array& x, const PyRouting& routing, const Name& mode,
                       const std::optional<Array>& out, const StreamArgument& stream) {
  const Mode m = mode_of(engine, mode);
  const Device device = engine.backend->device();
  const Input tokens = import_tokens(x, engine.hidden, device);
  const std::int64_t num_tokens = tokens.view.dim(0);
  const Output y = output_or_new(out,
                                 {.name = "out",
                                  .dtypes = {DType::kBFloat16},
                                  .dims = {num_tokens, engine.hidden},
                                  .shape = "[num_tokens, hidden], as x",
                                  .device = device},
                                 tokens.framework, *engine.backend->backend);
  const Stream queue = to_stream(stream, tokens.framework, device);
  {
    const Call call(*engine.backend);
    engine.engine->forward(m, tokens.view, routing.view(), y.view, queue);
  }
  return y.object;
}

nb::dict stats_dict(const PyEngine& engine) {
  const ForwardStats& s = engine.engine->stats();
  nb::dict times;
  times["dispatch_us"] = s.times.dispatch_us;
  times["quantize_us"] = s.times.quantize_us;
  times["gemm1_us"] = s.times.gemm1_us;
  times["activation_us"] = s.times.activation_us;
  times["gemm2_us"] = s.times.gemm2_us;
  times["combine_us"] = s.times.combine_us;
  times["total_us"] = s.times.total_us;
  nb::list rows;
  for (const std::int64_t n : s.rows_per_expert) rows.append(n);
  nb::dict d;
  d["times"] = times;
  d["rows_per_expert"] = rows;
  d["weight_bytes_read"] = s.weight_bytes_read;
  d["flops"] = s.flops;
  return d;
}

nb::dict plan(const ModelGeometry& geometry, int num_ranks, int max_tokens_per_rank,
              const Name& low_latency, const Name& normal, int max_m, std::string_view scale_dtype,
              std::string_view device) {
  if (scale_dtype != "f32" && scale_dtype != "bf16") {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("scale_dtype '{}' is not f32 or bf16", scale_dtype));
  }
  const EngineMemory m =
      Engine::plan_memory({.low_latency = recipe_or_none(low_latency),
                           .normal = recipe_or_none(normal),
                           .max_tokens_per_rank = max_tokens_per_rank,
                           .max_m = max_m},
                          geometry, scale_dtype == "f32" ? DType::kFloat32 : DType::kBFloat16,
                          parse_device(device).kind, num_ranks);
  nb::dict d;
  d["codes_bytes"] = m.codes_bytes;
  d["scales_bytes"] = m.scales_bytes;
  d["prepared_bytes"] = m.prepared_bytes;
  d["exchange_bytes"] = m.exchange_bytes;
  d["scratch_bytes"] = m.scratch_bytes;
  d["total_bytes"] = m.total_bytes();
  return d;
}

void init_engine(PyEngine* self, const Checkpoint& checkpoint, nb::handle transport,
                 nb::handle backend, EngineConfig config) {
  auto& t = nb::cast<PyTransport&>(transport);
  auto& b = nb::cast<PyBackend&>(backend);
  std::optional<Engine> engine;
  {
    const Call call(b, t);
    engine.emplace(Engine::create(config, checkpoint, *t.transport, *b.backend));
  }
  std::optional<Mode> only;
  if (!config.normal) only = Mode::kLowLatency;
  if (!config.low_latency) only = Mode::kNormal;
  new (self) PyEngine{.transport_object = nb::borrow(transport),
                      .backend_object = nb::borrow(backend),
                      .backend = &b,
                      .transport = &t,
                      .hidden = checkpoint.geometry().hidden,
                      .num_topk = checkpoint.geometry().num_topk,
                      .only_mode = only,
                      .engine = std::move(engine)};
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::class_<PyEngine>(
      m, "Engine",
      "One MoE layer of a checkpoint, ready to run under expert parallelism.\n"
      "Construction and moe_forward() are collective. Keeps transport and backend\n"
      "alive; the checkpoint is not needed afterwards.")
      .def(
          "__init__",
          [](PyEngine* self, const Checkpoint& checkpoint, nb::handle_t<PyTransport> transport,
             nb::handle_t<PyBackend> backend, int layer, int max_tokens_per_rank,
             const Name& low_latency, const Name& normal, int max_m, float routed_scaling_factor,
             const Name& dispatch_dtype, std::optional<int> timeout_ms) {
            init_engine(self, checkpoint, transport, backend,
                        {.layer = layer,
                         .low_latency = recipe_or_none(low_latency),
                         .normal = recipe_or_none(normal),
                         .dispatch_dtype = dispatch_dtype ? parse_dispatch_dtype(*dispatch_dtype)
                                                          : read_environment().dispatch_dtype,
                         .max_tokens_per_rank = max_tokens_per_rank,
                         .max_m = max_m,
                         .routed_scaling_factor = routed_scaling_factor,
                         .peer_timeout = timeout_or_environment(timeout_ms)});
          },
          "checkpoint"_a, "transport"_a, "backend"_a, nb::kw_only(), "layer"_a,
          "max_tokens_per_rank"_a, "low_latency"_a = "direct", "normal"_a = "direct", "max_m"_a = 0,
          "routed_scaling_factor"_a = 1.0f, "dispatch_dtype"_a = nb::none(),
          "timeout_ms"_a = nb::none(),
          "low_latency, normal: recipe of each mode; None for a mode that is not called.\n"
          "max_m: low-latency, rows reserved for each expert; 0 for the worst case.\n"
          "routed_scaling_factor: 1 where the host model applies it.\n"
          "dispatch_dtype: 'auto', 'bf16', 'fp8' or 'fp8-static'; None: SLUICE_DISPATCH_DTYPE.\n"
          "timeout_ms: longest wait for a peer; None: SLUICE_TIMEOUT_MS or 10 s.\n\n"
          "Raises Error: transport naming ranks and field if ranks differ, and whatever Recipe,\n"
          "Checkpoint and Exchange raise.")
      .def(
          "recipe",
          [](const PyEngine& e, const Name& mode) { return e.engine->recipe(mode_of(e, mode)); },
          "mode"_a = nb::none(), "Recipe of a mode.")
      .def(
          "record_stats", [](PyEngine& e, bool on) { e.engine->record_stats(on); }, "on"_a = true,
          "When on, moe_forward() times its stages; it then waits for the device after each.")
      .def("stats", &stats_dict,
           "dict of the last moe_forward() with record_stats(): times (microseconds of each "
           "stage),\n"
           "rows_per_expert, weight_bytes_read, flops.")
      .def(
          "record_gemm_input_digest",
          [](PyEngine& e, bool on) { e.engine->record_gemm_input_digest(on); }, "on"_a = true,
          "When on, moe_forward() digests the bytes that GEMM1 reads.")
      .def_prop_ro(
          "gemm_input_digest", [](const PyEngine& e) { return e.engine->gemm_input_digest(); },
          "Sum over rows; 'direct' and 'direct-bf16' give the same.")
      .def_prop_ro(
          "weight_bytes", [](const PyEngine& e) { return e.engine->weight_bytes(); },
          "Of the repacked weights of this rank.")
      .def(
          "check",
          [](PyEngine& e) {
            const Call call(*e.backend);
            e.engine->check();
          },
          "Raises what earlier asynchronous calls found on the device.");

  m.def(
      "moe_forward", &moe_forward, "engine"_a, "x"_a, "routing"_a, nb::kw_only(),
      "mode"_a = nb::none(), "out"_a = nb::none(), "stream"_a = nb::none(),
      "The whole layer, y = combine(experts(dispatch(x))): y [num_tokens, hidden] bfloat16.\n"
      "Collective.\n\n"
      "x: [num_tokens, hidden] bfloat16 (or uint16), num_tokens <= max_tokens_per_rank; 0 is "
      "fine.\n"
      "mode: 'low-latency' or 'normal'; None where the engine has one.\n"
      "out: y's memory; None makes a new array: torch's for tensors of torch, else numpy uint16.\n"
      "stream: handle of a CUDA stream, None: torch's current one for tensors of torch, else the\n"
      "default stream; the CPU backend returns when done.\n\n"
      "Raises Error: invalid_argument naming the argument, peer_timeout naming ranks.");
  m.def("stats", &stats_dict, "engine"_a, "Engine.stats().");
  m.def("plan", &plan, "geometry"_a, nb::kw_only(), "num_ranks"_a, "max_tokens_per_rank"_a,
        "low_latency"_a = "direct", "normal"_a = "direct", "max_m"_a = 0, "scale_dtype"_a = "f32",
        "device"_a = "cpu",
        "dict of the bytes an Engine takes on each rank, before anything is loaded: codes_bytes,\n"
        "scales_bytes, prepared_bytes, exchange_bytes, scratch_bytes, total_bytes (of the last\n"
        "three).\n\n"
        "Raises Error: invalid_argument.");
}

}  // namespace sluice::python
