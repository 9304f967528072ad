#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

Mode mode_of(const PyLayer& layer, const Name& mode) {
  if (mode) return parse_mode(*mode);
  if (layer.only_mode) return *layer.only_mode;
  throw Error(ErrorCode::kInvalidArgument,
              "mode: expected 'low-latency' or 'normal', as this layer has both; got None");
}

nb::object moe_forward(PyLayer& layer, const Array& x, const PyRouting& routing, const Name& mode,
                       const std::optional<Array>& out, const StreamArgument& stream) {
  const Mode m = mode_of(layer, mode);
  const Device device = layer.backend->device();
  const Input tokens = import_tokens(x, layer.hidden, device);
  const std::int64_t num_tokens = tokens.view.dim(0);
  const Output y = output_or_new(out,
                                 {.name = "out",
                                  .dtypes = {DType::kBFloat16},
                                  .dims = {num_tokens, layer.hidden},
                                  .shape = "[num_tokens, hidden], as x",
                                  .device = device},
                                 tokens.framework, *layer.backend->backend);
  const Stream queue = to_stream(stream, tokens.framework, device);
  {
    const Call call(*layer.backend);
    layer.layer->forward(m, tokens.view, routing.view(), y.view, queue);
  }
  return y.object;
}

/// A call between its halves. It keeps what finish() reads.
struct PyInFlight {
  nb::object layer_object, routing_object;
  PyLayer* layer;
  std::int64_t num_tokens;
  Framework framework;  ///< Of x.
  std::optional<Dispatched> value;
};

PyInFlight dispatch_send(nb::handle_t<PyLayer> layer_handle, const Array& x,
                         nb::handle_t<PyRouting> routing, const Name& mode,
                         const StreamArgument& stream) {
  auto& layer = nb::cast<PyLayer&>(layer_handle);
  const auto& r = nb::cast<const PyRouting&>(routing);
  const Mode m = mode_of(layer, mode);
  const Input tokens = import_tokens(x, layer.hidden, layer.backend->device());
  const Stream queue = to_stream(stream, tokens.framework, layer.backend->device());
  std::optional<Dispatched> value;
  {
    const Call call(*layer.backend);
    value.emplace(layer.layer->dispatch_send(m, tokens.view, r.view(), queue));
  }
  return {.layer_object = nb::borrow(layer_handle),
          .routing_object = nb::borrow(routing),
          .layer = &layer,
          .num_tokens = tokens.view.dim(0),
          .framework = tokens.framework,
          .value = std::move(value)};
}

nb::object finish(PyInFlight& call_in_flight, const std::optional<Array>& out,
                  const StreamArgument& stream) {
  if (!call_in_flight.value) {
    throw Error(ErrorCode::kInvalidArgument, "finish: this call is finished");
  }
  PyLayer& layer = *call_in_flight.layer;
  const Device device = layer.backend->device();
  const Output y = output_or_new(out,
                                 {.name = "out",
                                  .dtypes = {DType::kBFloat16},
                                  .dims = {call_in_flight.num_tokens, layer.hidden},
                                  .shape = "[num_tokens, hidden], as x",
                                  .device = device},
                                 call_in_flight.framework, *layer.backend->backend);
  const Stream queue = to_stream(stream, call_in_flight.framework, device);
  {
    const Call call(*layer.backend);
    Dispatched value = std::move(*call_in_flight.value);
    call_in_flight.value.reset();
    layer.layer->finish(std::move(value), y.view, queue);
  }
  return y.object;
}

nb::dict stats_dict(const PyLayer& layer) {
  const ForwardStats& s = layer.layer->stats();
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

/// Waits for other ranks if `of_all`, and for the device: without the interpreter's lock.
std::vector<std::int64_t> counted_rows(PyLayer& layer, bool of_all, const StreamArgument& stream) {
  const Stream queue = to_stream(stream, {}, layer.backend->device());
  const Call call(*layer.backend);
  return of_all ? layer.layer->counted_rows_of_all(queue) : layer.layer->counted_rows(queue);
}

void bind_counts(nb::class_<PyLayer>& layer) {
  layer
      .def(
          "count_rows",
          [](PyLayer& l, bool on) {
            const Call call(*l.backend);
            l.layer->count_rows(on);
          },
          "on"_a = true,
          "When on, calls add up the rows that each of this rank's experts receives. Nothing "
          "waits\n"
          "for it, and a graph captured meanwhile counts in every replay.\n\n"
          "Raises Error: out_of_memory.")
      .def("counted_rows", &counted_rows, nb::kw_only(), "of_all"_a = false,
           "stream"_a = nb::none(),
           "Rows of all calls with count_rows(): [num_local_experts] of this rank; with of_all\n"
           "[num_experts] of all ranks together, which is collective and what balance() takes.\n\n"
           "stream: on which the last call was queued; waits for it. None: the default stream.\n\n"
           "Raises Error: peer_timeout naming ranks.")
      .def(
          "reset_counted_rows",
          [](PyLayer& l, const StreamArgument& stream) {
            const Stream queue = to_stream(stream, {}, l.backend->device());
            const Call call(*l.backend);
            l.layer->reset_counted_rows(queue);
          },
          nb::kw_only(), "stream"_a = nb::none(), "Sets the counts to zero.");
}

void bind_in_flight(nb::module_& m) {
  nb::class_<PyInFlight>(m, "InFlight",
                         "A call of a Layer whose tokens have been sent. Keeps layer and routing\n"
                         "alive; dropped without finish(), it gives its buffers back.")
      .def("finish", &finish, nb::kw_only(), "out"_a = nb::none(), "stream"_a = nb::none(),
           "Receives, runs the experts and combines: y [num_tokens, hidden], the bits of\n"
           "Layer.forward(). Collective; once. The routing's arrays are unchanged until then.\n\n"
           "out, stream: as for moe_forward().\n\n"
           "Raises Error: invalid_argument, peer_timeout naming ranks.");
}

nb::dict rebalance(PyLayer& layer, const Placement& placement, int max_experts_held,
                   bool keep_memory, const StreamArgument& stream) {
  const Stream queue = to_stream(stream, {}, layer.backend->device());
  RebalanceStats s;
  {
    const Call call(*layer.backend, nb::cast<PyTransport&>(layer.transport_object));
    s = layer.layer->rebalance(placement, queue,
                               {.max_experts_held = max_experts_held, .keep_memory = keep_memory});
  }
  nb::dict d;
  d["num_received"] = s.num_received;
  d["num_sent"] = s.num_sent;
  d["num_copied"] = s.num_copied;
  d["num_rounds"] = s.num_rounds;
  d["received_bytes"] = s.received_bytes;
  d["sent_bytes"] = s.sent_bytes;
  d["extra_bytes"] = s.extra_bytes;
  d["seconds"] = s.seconds;
  return d;
}

nb::dict rebalance_counters(const PyLayer& layer) {
  const RebalanceCounters& c = layer.layer->rebalance_counters();
  nb::dict d;
  d["num_rebalances"] = c.num_rebalances;
  d["num_received"] = c.num_received;
  d["num_sent"] = c.num_sent;
  d["num_copied"] = c.num_copied;
  d["num_rounds"] = c.num_rounds;
  d["received_bytes"] = c.received_bytes;
  d["sent_bytes"] = c.sent_bytes;
  d["seconds"] = c.seconds;
  return d;
}

void bind_layer_class(nb::module_& m) {
  nb::class_<PyLayer> layer(
      m, "Layer",
      "One MoE layer; made by LayerGroup.add_layer(). Keeps the group's buffers,\n"
      "transport and backend alive.");
  bind_counts(layer);
  layer
      .def_prop_ro(
          "name", [](const PyLayer& l) { return l.layer->name(); }, "As messages have it.")
      .def("forward", &moe_forward, "x"_a, "routing"_a, nb::kw_only(), "mode"_a = nb::none(),
           "out"_a = nb::none(), "stream"_a = nb::none(), "moe_forward() of this layer.")
      .def("dispatch_send", &dispatch_send, "x"_a, "routing"_a, nb::kw_only(),
           "mode"_a = nb::none(), "stream"_a = nb::none(),
           "First half of forward(): sends the tokens, so that those of up to num_in_flight calls\n"
           "of the group travel at once. InFlight.finish() is the second half. Collective.\n\n"
           "x, routing, mode, stream: as for moe_forward(). Leave the routing's arrays unchanged\n"
           "until finish() has run: it reads the weights again.\n\n"
           "Raises Error: invalid_argument naming the argument or num_in_flight.")
      .def(
          "recipe",
          [](const PyLayer& l, const Name& mode) { return l.layer->recipe(mode_of(l, mode)); },
          "mode"_a = nb::none(), "Recipe of a mode.")
      .def(
          "record_stats", [](PyLayer& l, bool on) { l.layer->record_stats(on); }, "on"_a = true,
          "When on, moe_forward() times its stages; it then waits for the device after each.")
      .def("stats", &stats_dict,
           "dict of the last moe_forward() with record_stats(): times (microseconds of each "
           "stage),\n"
           "rows_per_expert, weight_bytes_read, flops.")
      .def(
          "record_gemm_input_digest",
          [](PyLayer& l, bool on) { l.layer->record_gemm_input_digest(on); }, "on"_a = true,
          "When on, moe_forward() digests the bytes that GEMM1 reads.")
      .def_prop_ro(
          "gemm_input_digest", [](const PyLayer& l) { return l.layer->gemm_input_digest(); },
          "Sum over rows; 'direct' and 'direct-bf16' give the same.")
      .def_prop_ro(
          "placement", [](const PyLayer& l) { return l.layer->placement(); },
          "Placement of the experts; without num_slots, expert e in slot e.")
      .def(
          "rebalance", &rebalance, "placement"_a, nb::kw_only(), "max_experts_held"_a = 2,
          "keep_memory"_a = false, "stream"_a = nb::none(),
          "Moves experts to where the Placement has them, between two calls. Collective; no call\n"
          "of the group may be queued or in flight on another stream. Outputs stay the same bits,\n"
          "captured graphs stay valid.\n\n"
          "max_experts_held: experts that a rank holds beside its own meanwhile, at least 2.\n"
          "keep_memory: keep the memory for them until a rebalance() without it, for experts that\n"
          "move a few at a time.\n"
          "stream: that of the calls before, which must have ended; as for moe_forward().\n\n"
          "Returns a dict: num_received, num_sent, num_copied, num_rounds, received_bytes,\n"
          "sent_bytes, extra_bytes, seconds; of this rank.\n\n"
          "Raises Error: invalid_argument; transport naming ranks that have another placement. "
          "After\n"
          "transport or peer_timeout half-way, which name the ranks to blame, the layer refuses\n"
          "every later call.")
      .def("rebalance_counters", &rebalance_counters,
           "dict of what all rebalance() of this layer did on this rank; counters only grow:\n"
           "num_rebalances; num_received, num_sent, num_copied (experts); num_rounds;\n"
           "received_bytes, sent_bytes; seconds.")
      .def_prop_ro(
          "weight_bytes", [](const PyLayer& l) { return l.layer->weight_bytes(); },
          "Of the repacked weights of this rank.")
      .def(
          "check",
          [](PyLayer& l) {
            const Call call(*l.backend);
            l.layer->check();
          },
          "Raises what earlier asynchronous calls found on the device.");
}

}  // namespace

PyLayer make_layer(nb::object transport, nb::object backend_object, PyBackend* backend,
                   const LayerGroupConfig& config, Layer layer) {
  std::optional<Mode> only;
  if (config.normal.max_tokens_per_rank == 0) only = Mode::kLowLatency;
  if (config.low_latency.max_tokens_per_rank == 0) only = Mode::kNormal;
  return {.transport_object = std::move(transport),
          .backend_object = std::move(backend_object),
          .backend = backend,
          .hidden = config.geometry.token_width(),
          .only_mode = only,
          .layer = std::move(layer)};
}

void bind_layer(nb::module_& m) {
  bind_in_flight(m);
  bind_layer_class(m);
  m.def(
      "moe_forward", &moe_forward, "engine"_a, "x"_a, "routing"_a, nb::kw_only(),
      "mode"_a = nb::none(), "out"_a = nb::none(), "stream"_a = nb::none(),
      "The whole layer, y = combine(experts(dispatch(x))): y [num_tokens, hidden] bfloat16.\n"
      "Collective.\n\n"
      "engine: an Engine, or a Layer of a LayerGroup.\n"
      "x: [num_tokens, hidden] bfloat16 (or uint16), num_tokens <= max_tokens_per_rank; 0 is "
      "fine.\n"
      "mode: 'low-latency' or 'normal'; None where the engine has one.\n"
      "out: y's memory; None makes a new array: torch's for tensors of torch, else numpy uint16.\n"
      "stream: handle of a CUDA stream, None: torch's current one for tensors of torch, else the\n"
      "default stream; the CPU backend returns when done.\n\n"
      "Raises Error: invalid_argument naming the argument, peer_timeout naming ranks.");
  m.def("stats", &stats_dict, "engine"_a, "Engine.stats().");
}

}  // namespace sluice::python
