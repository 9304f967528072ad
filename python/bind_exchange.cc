#include <fmt/format.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <array>

#include "bindings.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

PyExchange& exchange_of(PyDispatched& d, const char* operation) {
  if (!d.value) {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("dispatched: {} of a Dispatched that a combine has consumed", operation));
  }
  return *d.exchange;
}

using DispatchFunction = Dispatched (Exchange::*)(TensorView, const Routing&, Stream, float);

PyDispatched dispatch(nb::handle_t<PyExchange> exchange, const Array& x,
                      nb::handle_t<PyRouting> routing, float static_scale,
                      const StreamArgument& stream, DispatchFunction function) {
  auto& e = nb::cast<PyExchange&>(exchange);
  const auto& r = nb::cast<const PyRouting&>(routing);
  const Input tokens = import_tokens(x, e.exchange->config().hidden, e.backend->device());
  const Stream queue = to_stream(stream, tokens.framework, e.backend->device());
  std::optional<Dispatched> value;
  {
    const Call call(*e.backend);
    value.emplace(((*e.exchange).*function)(tokens.view, r.view(), queue, static_scale));
  }
  return {.exchange_object = nb::borrow(exchange),
          .routing_object = nb::borrow(routing),
          .exchange = &e,
          .num_tokens = tokens.view.dim(0),
          .framework = tokens.framework,
          .value = std::move(value)};
}

/// expert_y, with rows as batch().x.
Input import_expert_y(const PyExchange& e, const Array& expert_y) {
  const ExchangeConfig& c = e.exchange->config();
  const bool masked = c.mode == Mode::kLowLatency;
  std::vector<std::int64_t> dims;
  if (masked) {
    dims = {e.exchange->num_local_experts(), c.max_m, c.hidden};
  } else {
    dims = {e.exchange->max_rows(), c.hidden};
  }
  const std::string shape = masked ? fmt::format("[{}, {}, {}]", dims[0], dims[1], dims[2])
                                   : fmt::format("[{}, {}]", dims[0], dims[1]);
  return import_input(expert_y, {.name = "expert_y",
                                 .dtypes = {DType::kBFloat16},
                                 .dims = dims,
                                 .shape = shape.c_str(),
                                 .device = e.backend->device()});
}

Output output_y(const PyDispatched& d, const std::optional<Array>& out) {
  const std::int64_t hidden = d.exchange->exchange->config().hidden;
  const std::string shape = fmt::format("[{}, {}]", d.num_tokens, hidden);
  return output_or_new(out,
                       {.name = "out",
                        .dtypes = {DType::kBFloat16},
                        .dims = {d.num_tokens, hidden},
                        .shape = shape.c_str(),
                        .device = d.exchange->backend->device()},
                       d.framework, *d.exchange->backend->backend);
}

Stream stream_of(const PyDispatched& d, const StreamArgument& stream) {
  return to_stream(stream, d.framework, d.exchange->backend->device());
}

PyExpertBatch batch_of(PyDispatched& d) {
  PyExchange& e = exchange_of(d, "batch");
  const BackendUse use(*e.backend);
  const ExpertBatch& batch = d.value->batch();
  if (batch.x.shape.rank() == 0) {
    throw Error(ErrorCode::kInvalidArgument, "dispatched: receive() comes before batch");
  }
  // x lies in memory of the exchange; the counts of a host batch go with the Dispatched.
  const nb::handle owner = d.exchange_object;
  const auto small = [&](const TensorView& view) -> nb::object {
    return e.backend->device().kind == Device::Kind::kHost
               ? export_copy(view.data, view.dtype, view.shape, d.framework)
               : export_view(view, owner, d.framework);
  };
  return {.x = export_view(batch.x, owner, d.framework),
          .x_scale = export_view(batch.x_scale, owner, d.framework),
          .num_rows = small(batch.num_rows),
          .row_begin = small(batch.row_begin),
          .layout = batch.layout,
          .expected_m = batch.expected_m};
}

nb::dict counters_dict(const ExchangeCounters& c) {
  const auto list = [](const std::vector<std::uint64_t>& values) {
    nb::list result;
    for (const std::uint64_t v : values) result.append(v);
    return result;
  };
  nb::dict d;
  d["dispatch_bytes"] = list(c.dispatch_bytes);
  d["combine_bytes"] = list(c.combine_bytes);
  d["dispatch_rows"] = list(c.dispatch_rows);
  d["wait_ns"] = list(c.wait_ns);
  d["num_dispatches"] = c.num_dispatches;
  d["saturated_values"] = c.saturated_values;
  return d;
}

std::size_t workspace_bytes(int num_experts, int num_topk, int hidden, int max_tokens_per_rank,
                            int num_ranks, std::string_view mode, std::string_view wire, int max_m,
                            int num_in_flight, std::string_view device) {
  return Exchange::workspace_bytes({.mode = parse_mode(mode),
                                    .wire = parse_wire_format(wire),
                                    .num_experts = num_experts,
                                    .num_topk = num_topk,
                                    .hidden = hidden,
                                    .max_tokens_per_rank = max_tokens_per_rank,
                                    .max_m = max_m,
                                    .num_in_flight = num_in_flight},
                                   num_ranks, parse_device(device).kind);
}

void bind_routing(nb::module_& m) {
  nb::class_<PyRouting>(m, "Routing",
                        "The router's choice for each token; keeps its arrays alive. Leave them\n"
                        "unchanged until combine has run.")
      .def(
          "__init__",
          [](PyRouting* self, const Array& topk_idx, const Array& topk_weights) {
            const Device device = device_of(topk_idx, "topk_idx");
            Input idx = import_input(topk_idx, {.name = "topk_idx",
                                                .dtypes = {DType::kInt32, DType::kInt64},
                                                .dims = {-1, -1},
                                                .shape = "[num_tokens, num_topk]",
                                                .device = device});
            const std::string shape = fmt::format("[{}, {}]", idx.view.dim(0), idx.view.dim(1));
            Input weights = import_input(topk_weights, {.name = "topk_weights",
                                                        .dtypes = {DType::kFloat32},
                                                        .dims = {idx.view.dim(0), idx.view.dim(1)},
                                                        .shape = shape.c_str(),
                                                        .device = device});
            new (self) PyRouting{.idx_object = topk_idx.object,
                                 .weights_object = topk_weights.object,
                                 .idx = std::move(idx),
                                 .weights = std::move(weights)};
          },
          "topk_idx"_a, "topk_weights"_a,
          "topk_idx: [num_tokens, num_topk] int32 or int64; -1 leaves an entry empty.\n"
          "topk_weights: [num_tokens, num_topk] float32, used as given.\n\n"
          "Raises Error: invalid_argument.")
      .def_ro("topk_idx", &PyRouting::idx_object, "As given.")
      .def_ro("topk_weights", &PyRouting::weights_object, "As given.");
}

void bind_batch(nb::module_& m) {
  nb::class_<PyExpertBatch>(
      m, "ExpertBatch",
      "Rows by local expert, as dispatch delivers them or of the caller's own.\n\n"
      "Masked layout: x [num_experts, max_m, hidden]; expert e has x[e, :num_rows[e]].\n"
      "Contiguous layout: x [max_rows, hidden]; expert e has num_rows[e] rows from row_begin[e].\n"
      "Rows of a Dispatched are views of the exchange's memory: another dispatch may overwrite\n"
      "them once combine has run.")
      .def(
          "__init__",
          [](PyExpertBatch* self, const Array& x, const Array& num_rows,
             const std::optional<Array>& x_scale, const std::optional<Array>& row_begin,
             int expected_m) {
            const auto object = [](const std::optional<Array>& array) {
              return array ? array->object : nb::none();
            };
            new (self)
                PyExpertBatch{.x = x.object,
                              .x_scale = object(x_scale),
                              .num_rows = num_rows.object,
                              .row_begin = object(row_begin),
                              .layout = rank_of(x, "x") == 3 ? Mode::kLowLatency : Mode::kNormal,
                              .expected_m = expected_m};
          },
          "x"_a, "num_rows"_a, nb::kw_only(), "x_scale"_a = nb::none(), "row_begin"_a = nb::none(),
          "expected_m"_a = 0,
          "x: [num_experts, max_m, hidden] or [max_rows, hidden]; bfloat16 (or uint16), or e4m3 "
          "(as\n"
          "uint8).\n"
          "num_rows: [num_experts] int32.\n"
          "x_scale: shape of x with hidden / 128 or, per token, 1; float32, of e4m3.\n"
          "row_begin: [num_experts] int64; None where rows follow each other.\n"
          "expected_m: mean rows of an expert; a hint.\n\n"
          "The arrays are checked where they are used.")
      .def_ro("x", &PyExpertBatch::x)
      .def_ro("x_scale", &PyExpertBatch::x_scale, "None for bf16 and static wires.")
      .def_ro("num_rows", &PyExpertBatch::num_rows)
      .def_ro("row_begin", &PyExpertBatch::row_begin)
      .def_ro("expected_m", &PyExpertBatch::expected_m)
      .def_prop_ro("masked", [](const PyExpertBatch& b) { return b.layout == Mode::kLowLatency; });
}

void bind_dispatched(nb::module_& m) {
  nb::class_<PyDispatched>(
      m, "Dispatched",
      "Rows received, and their way home. combine() consumes it; dropping it returns its memory\n"
      "to the exchange. Keeps the exchange and the routing alive.")
      .def_prop_ro("batch", &batch_of, "ExpertBatch; after combine an Error.")
      .def_prop_ro(
          "expert_y",
          [](PyDispatched& d) {
            (void)exchange_of(d, "expert_y");
            return export_view(d.value->expert_y(), d.exchange_object, d.framework);
          },
          "Memory of the exchange that combine() sends from without a copy, for the experts' "
          "out=;\n"
          "None on the CPU, where a copy costs nothing more.")
      .def_prop_ro(
          "consumed", [](const PyDispatched& d) { return !d.value; }, "Whether combine has run.")
      .def(
          "receive",
          [](PyDispatched& d, const StreamArgument& stream) {
            PyExchange& e = exchange_of(d, "receive");
            const Stream queue = stream_of(d, stream);
            const Call call(*e.backend);
            e.exchange->dispatch_receive(*d.value, queue);
          },
          nb::kw_only(), "stream"_a = nb::none(),
          "Second half of a dispatch, after Exchange.dispatch_send().")
      .def(
          "combine_send",
          [](PyDispatched& d, const Array& expert_y, const StreamArgument& stream) {
            PyExchange& e = exchange_of(d, "combine_send");
            const Input rows = import_expert_y(e, expert_y);
            const Stream queue = stream_of(d, stream);
            const Call call(*e.backend);
            e.exchange->combine_send(*d.value, rows.view, queue);
          },
          "expert_y"_a, nb::kw_only(), "stream"_a = nb::none(), "First half of combine().")
      .def(
          "combine_receive",
          [](PyDispatched& d, const std::optional<Array>& out, const StreamArgument& stream) {
            PyExchange& e = exchange_of(d, "combine_receive");
            const Output y = output_y(d, out);
            const Stream queue = stream_of(d, stream);
            {
              const Call call(*e.backend);
              Dispatched value = std::move(*d.value);
              d.value.reset();
              e.exchange->combine_receive(std::move(value), y.view, queue);
            }
            return y.object;
          },
          nb::kw_only(), "out"_a = nb::none(), "stream"_a = nb::none(),
          "Second half of combine().");
}

}  // namespace

void bind_exchange(nb::module_& m) {
  bind_routing(m);
  bind_batch(m);
  bind_dispatched(m);
  nb::class_<PyExchange>(
      m, "Exchange",
      "Dispatch and combine for one expert-parallel group. Every rank makes the\n"
      "same calls in the same order. Keeps transport and backend alive.")
      .def(
          "__init__",
          [](PyExchange* self, nb::handle_t<PyTransport> transport, nb::handle_t<PyBackend> backend,
             int num_experts, int num_topk, int hidden, int max_tokens_per_rank,
             std::string_view mode, std::string_view wire, int max_m, float routed_scaling_factor,
             int num_in_flight, std::optional<int> timeout_ms, const std::vector<int>& hosts,
             int sum_parts) {
            auto& t = nb::cast<PyTransport&>(transport);
            auto& b = nb::cast<PyBackend&>(backend);
            const ExchangeConfig config{.mode = parse_mode(mode),
                                        .wire = parse_wire_format(wire),
                                        .num_experts = num_experts,
                                        .num_topk = num_topk,
                                        .hidden = hidden,
                                        .max_tokens_per_rank = max_tokens_per_rank,
                                        .max_m = max_m,
                                        .hosts = hosts_or_transport(hosts),
                                        .sum_parts = sum_parts,
                                        .routed_scaling_factor = routed_scaling_factor,
                                        .num_in_flight = num_in_flight,
                                        .peer_timeout = timeout_or_environment(timeout_ms)};
            std::optional<Exchange> exchange;
            {
              const Call call(b, t);
              exchange.emplace(Exchange::create(config, *t.transport, *b.backend));
            }
            new (self) PyExchange{.transport_object = nb::borrow(transport),
                                  .backend_object = nb::borrow(backend),
                                  .backend = &b,
                                  .exchange = std::move(exchange)};
          },
          "transport"_a, "backend"_a, nb::kw_only(), "num_experts"_a, "num_topk"_a, "hidden"_a,
          "max_tokens_per_rank"_a, "mode"_a = "low-latency",
          "wire"_a = to_string(WireFormat::kE4m3Group), "max_m"_a = 0,
          "routed_scaling_factor"_a = 1.0f, "num_in_flight"_a = 2, "timeout_ms"_a = nb::none(),
          "hosts"_a = std::vector<int>(), "sum_parts"_a = 0,
          "Collective.\n\n"
          "num_experts: over all ranks. mode: 'low-latency' (masked) or 'normal' (contiguous).\n"
          "wire: Recipe.wire.\n"
          "max_m: low-latency, rows reserved for each expert; 0 for the worst case.\n"
          "routed_scaling_factor: applied once, by combine. num_in_flight: Dispatched alive at "
          "once.\n"
          "timeout_ms: longest wait for a peer; None: SLUICE_TIMEOUT_MS or 10 s.\n"
          "hosts: each rank's host, numbered from 0; empty: those that the transport knows. Over "
          "several\n"
          "hosts a token crosses the network once for each. sum_parts: parts of the experts that "
          "are\n"
          "added up apart; 0: as many as hosts; 1: the order of one host, for more bytes.\n\n"
          "Raises Error: invalid_argument naming the field, transport if ranks differ,\n"
          "peer_timeout, out_of_memory, unsupported.")
      .def_prop_ro(
          "max_rows", [](const PyExchange& e) { return e.exchange->max_rows(); },
          "Rows that batch.x holds.")
      .def_prop_ro(
          "max_m", [](const PyExchange& e) { return e.exchange->config().max_m; },
          "Rows of each local expert; 0 in normal mode.")
      .def_prop_ro(
          "num_local_experts", [](const PyExchange& e) { return e.exchange->num_local_experts(); },
          "Experts of this rank.")
      .def_static("workspace_bytes", &workspace_bytes, nb::kw_only(), "num_experts"_a, "num_topk"_a,
                  "hidden"_a, "max_tokens_per_rank"_a, "num_ranks"_a, "mode"_a = "low-latency",
                  "wire"_a = to_string(WireFormat::kE4m3Group), "max_m"_a = 0,
                  "num_in_flight"_a = 2, "device"_a = "cpu",
                  "Bytes that an Exchange of these numbers takes on each rank.")
      .def(
          "counters", [](const PyExchange& e) { return counters_dict(e.exchange->counters()); },
          "dict of monotonic counters; lists are by rank.")
      .def(
          "check",
          [](PyExchange& e) {
            const Call call(*e.backend);
            e.exchange->check();
          },
          "Raises what earlier asynchronous calls found on the device.")
      .def(
          "dispatch_send",
          [](nb::handle_t<PyExchange> self, const Array& x, nb::handle_t<PyRouting> routing,
             float static_scale, const StreamArgument& stream) {
            return dispatch(self, x, routing, static_scale, stream, &Exchange::dispatch_send);
          },
          "x"_a, "routing"_a, nb::kw_only(), "static_scale"_a = 0.0f, "stream"_a = nb::none(),
          "First half of dispatch(); Dispatched.receive() is the second.");

  m.def(
      "dispatch",
      [](nb::handle_t<PyExchange> exchange, const Array& x, nb::handle_t<PyRouting> routing,
         float static_scale, const StreamArgument& stream) {
        return dispatch(exchange, x, routing, static_scale, stream, &Exchange::dispatch);
      },
      "exchange"_a, "x"_a, "routing"_a, nb::kw_only(), "static_scale"_a = 0.0f,
      "stream"_a = nb::none(),
      "Quantizes x to the wire format and sends each token to its experts' ranks. Collective.\n\n"
      "x: [num_tokens, hidden] bfloat16 (or uint16), num_tokens <= max_tokens_per_rank.\n"
      "static_scale: s1 of the layer (Recipe.s1), for the static wire; 0 for the others. Every "
      "rank\n"
      "gives the same.\n"
      "stream: handle of a CUDA stream, None: torch's current one for tensors of torch, else the\n"
      "default stream; the CPU backend returns when done. Arrays of the batch are of x's kind.\n\n"
      "Raises Error: invalid_argument before anything is sent, peer_timeout naming ranks.");
  m.def(
      "combine",
      [](PyDispatched& d, const Array& expert_y, const std::optional<Array>& out,
         const StreamArgument& stream) {
        PyExchange& e = exchange_of(d, "combine");
        const Input rows = import_expert_y(e, expert_y);
        const Output y = output_y(d, out);
        const Stream queue = stream_of(d, stream);
        {
          const Call call(*e.backend);
          Dispatched value = std::move(*d.value);
          d.value.reset();
          e.exchange->combine(std::move(value), rows.view, y.view, queue);
        }
        return y.object;
      },
      "dispatched"_a, "expert_y"_a, nb::kw_only(), "out"_a = nb::none(), "stream"_a = nb::none(),
      "Sends every row home and sums, weighted: y [num_tokens, hidden] bfloat16. Collective;\n"
      "consumes `dispatched`.\n\n"
      "expert_y: shape of batch.x, bfloat16 (or uint16). out: y's memory; None makes a new array\n"
      "(numpy uint16 on the CPU).\n\n"
      "Raises Error: invalid_argument, peer_timeout.");
}

}  // namespace sluice::python
