#include <fmt/format.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include "bindings.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

/// Arrays of an ExpertBatch and the batch that views them.
struct Rows {
  Input x, x_scale, num_rows, row_begin;
  ExpertBatch batch;
};

std::string text_of(const Shape& shape) {
  return shape.to_string();
}

std::vector<std::int64_t> dims_of(const Shape& shape) {
  std::vector<std::int64_t> dims;
  for (int i = 0; i < shape.rank(); ++i) dims.push_back(shape[i]);
  return dims;
}

/// x's shape with another last dimension.
Shape with_width(const Shape& x, std::int64_t width) {
  return x.rank() == 3 ? Shape{x[0], x[1], width} : Shape{x[0], width};
}

struct RowArrays {
  const char* x_name;
  Array x;
  std::optional<Array> x_scale, num_rows, row_begin;
  Cast cast = Cast::kGroup;  ///< That made x, if it is e4m3: says how many scales a row has.
};

std::optional<Array> given(const nb::object& object) {
  if (object.is_none()) return std::nullopt;
  return Array{object};
}

/// Imports and checks; `masked`: which of the two layouts is wanted, if only one is.
Rows import_rows(const RowArrays& arrays, DType x_dtype, std::optional<bool> masked,
                 Device device) {
  Rows rows;
  const bool is_masked = masked ? *masked : rank_of(arrays.x, arrays.x_name) == 3;
  rows.x = import_input(arrays.x,
                        {.name = arrays.x_name,
                         .dtypes = {x_dtype},
                         .dims = std::vector<std::int64_t>(is_masked ? 3 : 2, -1),
                         .shape = is_masked ? "[num_experts, max_m, width]" : "[num_rows, width]",
                         .device = device});
  const Shape& shape = rows.x.view.shape;
  const std::int64_t width = shape[shape.rank() - 1];
  if (arrays.x_scale) {
    // Rows without scales of their own: the experts refuse any that are given.
    const std::int64_t scales = scales_per_row(arrays.cast, width);
    const Shape scale = with_width(shape, scales > 0 ? scales : width / 128);
    rows.x_scale = import_input(*arrays.x_scale, {.name = "x_scale",
                                                  .dtypes = {DType::kFloat32},
                                                  .dims = dims_of(scale),
                                                  .shape = text_of(scale).c_str(),
                                                  .device = device});
  }
  if (arrays.num_rows) {
    rows.num_rows = import_input(*arrays.num_rows, {.name = "num_rows",
                                                    .dtypes = {DType::kInt32},
                                                    .dims = {is_masked ? shape[0] : -1},
                                                    .shape = "[num_experts]",
                                                    .device = device});
  }
  if (arrays.row_begin) {
    const std::int64_t num = arrays.num_rows ? rows.num_rows.view.dim(0) : -1;
    rows.row_begin = import_input(*arrays.row_begin, {.name = "row_begin",
                                                      .dtypes = {DType::kInt64},
                                                      .dims = {num},
                                                      .shape = "[num_experts], as num_rows",
                                                      .device = device});
  }
  rows.batch = {.layout = is_masked ? Mode::kLowLatency : Mode::kNormal,
                .x = rows.x.view,
                .x_scale = rows.x_scale.view,
                .num_rows = rows.num_rows.view,
                .row_begin = rows.row_begin.view};
  return rows;
}

nb::object run_experts(PyExperts& experts, const LayerRecipe& recipe, const PyExpertBatch& batch,
                       const std::optional<Array>& out, const StreamArgument& stream, bool masked) {
  const Device device = experts.backend->device();
  const bool bf16 = recipe.wire == WireFormat::kBf16;
  Rows rows = import_rows({.x_name = "x",
                           .x = {batch.x},
                           .x_scale = given(batch.x_scale),
                           .num_rows = given(batch.num_rows),
                           .row_begin = given(batch.row_begin),
                           .cast = sent_cast(recipe.wire)},
                          bf16 ? DType::kBFloat16 : DType::kFloat8E4M3, masked, device);
  rows.batch.expected_m = batch.expected_m;
  const Output y = output_or_new(out,
                                 {.name = "out",
                                  .dtypes = {DType::kBFloat16},
                                  .dims = dims_of(rows.x.view.shape),
                                  .shape = text_of(rows.x.view.shape).c_str(),
                                  .device = device},
                                 rows.x.framework, *experts.backend->backend);
  const Stream queue = to_stream(stream, rows.x.framework, device);
  {
    const Call call(*experts.backend);
    experts.experts->forward(recipe, rows.batch, y.view, queue);
  }
  return y.object;
}

using OutPair = std::pair<Array, std::optional<Array>>;

/// codes (and scales) for rows of `shape`, and the arrays behind them.
struct QuantizedOut {
  Output codes, scale;
  E4m3Rows rows;
};

QuantizedOut quantized_out(const std::optional<OutPair>& out, const Shape& shape,
                           std::optional<float> static_scale, bool pow2, bool per_token,
                           Framework framework, PyBackend& backend) {
  const Device device = backend.device();
  QuantizedOut q;
  q.codes = output_or_new(out ? std::optional(out->first) : std::nullopt,
                          {.name = "out[0]",
                           .dtypes = {DType::kFloat8E4M3},
                           .dims = dims_of(shape),
                           .shape = text_of(shape).c_str(),
                           .device = device},
                          framework, *backend.backend);
  q.rows = {
      .codes = q.codes.view, .scale = {}, .static_scale = 0, .pow2 = pow2, .per_token = per_token};
  if (static_scale) {
    if (*static_scale == 0) {
      throw Error(ErrorCode::kInvalidArgument, "static_scale 0 is not a positive normal number");
    }
    q.rows.static_scale = *static_scale;
    q.scale.object = nb::none();
    if (out && out->second) {
      throw Error(ErrorCode::kInvalidArgument,
                  "out[1]: a static scale has no array; expected None");
    }
    return q;
  }
  if (out && !out->second) {
    throw Error(ErrorCode::kInvalidArgument, "out[1]: expected an array for the scales");
  }
  const Cast cast = per_token ? Cast::kToken : Cast::kGroup;
  const Shape scale = with_width(shape, scales_per_row(cast, shape[shape.rank() - 1]));
  q.scale = output_or_new(out ? out->second : std::nullopt,
                          {.name = "out[1]",
                           .dtypes = {DType::kFloat32},
                           .dims = dims_of(scale),
                           .shape = text_of(scale).c_str(),
                           .device = device},
                          framework, *backend.backend);
  q.rows.scale = q.scale.view;
  return q;
}

nb::tuple py_quantize(PyBackend& backend, const Array& x, std::optional<float> static_scale,
                      bool pow2, bool per_token, const std::optional<Array>& num_rows,
                      const std::optional<Array>& row_begin, const std::optional<OutPair>& out,
                      const StreamArgument& stream) {
  const Rows rows = import_rows({.x_name = "x",
                                 .x = x,
                                 .x_scale = std::nullopt,
                                 .num_rows = num_rows,
                                 .row_begin = row_begin},
                                DType::kBFloat16, std::nullopt, backend.device());
  const QuantizedOut q = quantized_out(out, rows.x.view.shape, static_scale, pow2, per_token,
                                       rows.x.framework, backend);
  const Stream queue = to_stream(stream, rows.x.framework, backend.device());
  {
    const Call call(backend);
    quantize(*backend.backend, rows.batch, q.rows, queue);
  }
  return nb::make_tuple(q.codes.object, q.scale.object);
}

nb::object py_requantize(PyBackend& backend, const Array& codes, const Array& scale,
                         float static_scale, const std::optional<Array>& num_rows,
                         const std::optional<Array>& row_begin, const std::optional<Array>& out,
                         const StreamArgument& stream) {
  const Rows rows = import_rows({.x_name = "codes",
                                 .x = codes,
                                 .x_scale = scale,
                                 .num_rows = num_rows,
                                 .row_begin = row_begin},
                                DType::kFloat8E4M3, std::nullopt, backend.device());
  const QuantizedOut q =
      quantized_out(out ? std::optional(OutPair{*out, std::nullopt}) : std::nullopt,
                    rows.x.view.shape, static_scale, false, false, rows.x.framework, backend);
  const Stream queue = to_stream(stream, rows.x.framework, backend.device());
  {
    const Call call(backend);
    requantize(*backend.backend, rows.batch, q.rows, queue);
  }
  return q.codes.object;
}

void bind_quantize(nb::module_& m) {
  m.def(
      "quantize", &py_quantize, "backend"_a, "x"_a, nb::kw_only(), "static_scale"_a = nb::none(),
      "pow2"_a = false, "per_token"_a = false, "num_rows"_a = nb::none(),
      "row_begin"_a = nb::none(), "out"_a = nb::none(), "stream"_a = nb::none(),
      "Rounds rows to e4m3: (codes, scale), scale None for a static one.\n\n"
      "x: [num_rows, width] or [num_experts, max_m, width] bfloat16 (or uint16).\n"
      "static_scale: one scale for all; None: one for each 128 values, amax / 448, with pow2 the\n"
      "smallest power of two that is no less.\n"
      "per_token: one scale for each row instead.\n"
      "num_rows [num_experts] int32, row_begin [num_experts] int64: which rows are valid, as in\n"
      "ExpertBatch; None: all.\n"
      "codes: shape of x, e4m3 as uint8. scale: shape of x with width / 128 or, per token, 1;\n"
      "float32.\n"
      "out: the pair's memory; rows that are not valid stay as they are.\n\n"
      "Raises Error: invalid_argument.");
  m.def("requantize", &py_requantize, "backend"_a, "codes"_a, "scale"_a, "static_scale"_a,
        nb::kw_only(), "num_rows"_a = nb::none(), "row_begin"_a = nb::none(), "out"_a = nb::none(),
        "stream"_a = nb::none(),
        "Moves group-scaled e4m3 rows to a static scale, a second rounding: codes as uint8.\n\n"
        "codes: [.., width] e4m3 (or uint8) and scale: [.., width / 128] float32, as quantize() "
        "gives\n"
        "them. static_scale: positive.\n"
        "num_rows, row_begin, out: as for quantize(); out is one array and not `codes`.\n\n"
        "Raises Error: invalid_argument.");
}

}  // namespace

void bind_experts(nb::module_& m) {
  nb::class_<PyExperts>(m, "Experts",
                        "A rank's experts repacked for a backend; made by repack(). Keeps the\n"
                        "backend alive, not the weights.")
      .def("__len__", [](const PyExperts& e) { return e.experts->num_experts(); })
      .def_prop_ro(
          "max_rows", [](const PyExperts& e) { return e.experts->max_rows(); },
          "Largest batch, padding included.")
      .def(
          "reserve",
          [](PyExperts& e, std::int64_t max_rows) {
            const Call call(*e.backend);
            e.experts->reserve(max_rows);
          },
          "max_rows"_a,
          "Makes room for batches of more rows; the weights stay as they are. Graphs that were\n"
          "captured before stay valid, since the smaller buffers are kept. Allocates: not during "
          "a\n"
          "capture.\n\n"
          "Raises Error: out_of_memory.")
      .def_prop_ro(
          "geometry", [](const PyExperts& e) { return e.experts->geometry(); }, "Of the layer.")
      .def_prop_ro(
          "weight_bytes", [](const PyExperts& e) { return e.experts->weight_bytes(); },
          "Of the repacked weights.");

  m.def(
      "repack",
      [](const ExpertWeights& weights, nb::handle_t<PyBackend> backend, std::int64_t max_rows) {
        auto& b = nb::cast<PyBackend&>(backend);
        std::optional<Experts> experts;
        {
          const Call call(b);
          experts.emplace(Experts::create(weights, max_rows, *b.backend));
        }
        return PyExperts{.backend_object = nb::borrow(backend),
                         .backend = &b,
                         .memory = {},
                         .experts = std::move(experts)};
      },
      "weights"_a, "backend"_a, nb::kw_only(), "max_rows"_a,
      "Experts: the weights in the backend's own order, and memory for batches of max_rows "
      "rows.\n\n"
      "Raises Error: invalid_argument, out_of_memory.");

  static constexpr const char* kCommon =
      "batch: ExpertBatch in the recipe's wire format. out: shape of batch.x, bfloat16 (or "
      "uint16);\n"
      "None makes a new array. Rows that are not valid stay as they are.\n\n"
      "Raises Error: invalid_argument.";
  static const std::string masked_doc =
      "Every expert on its rows, masked layout; the router's weights are left to combine.\n\n"
      "batch.x: [num_experts, max_m, hidden] bfloat16 or e4m3, as the recipe has them.\n" +
      std::string(kCommon);
  static const std::string grouped_doc =
      "Every expert on its rows, contiguous layout; the router's weights are left to combine.\n\n"
      "batch.x: [max_rows, hidden] bfloat16 or e4m3, as the recipe has them.\n" +
      std::string(kCommon);
  m.def(
      "experts_masked",
      [](PyExperts& experts, const PyExpertBatch& batch, const LayerRecipe& recipe,
         const std::optional<Array>& out, const StreamArgument& stream) {
        return run_experts(experts, recipe, batch, out, stream, true);
      },
      "experts"_a, "batch"_a, "recipe"_a, nb::kw_only(), "out"_a = nb::none(),
      "stream"_a = nb::none(), masked_doc.c_str());
  m.def(
      "experts_grouped",
      [](PyExperts& experts, const PyExpertBatch& batch, const LayerRecipe& recipe,
         const std::optional<Array>& out, const StreamArgument& stream) {
        return run_experts(experts, recipe, batch, out, stream, false);
      },
      "experts"_a, "batch"_a, "recipe"_a, nb::kw_only(), "out"_a = nb::none(),
      "stream"_a = nb::none(), grouped_doc.c_str());
  bind_quantize(m);
}

}  // namespace sluice::python
