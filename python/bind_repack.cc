#include <fmt/format.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string_view.h>

#include <array>
#include <utility>

#include "bindings.h"
#include "sluice/repack.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

using Tensor = nb::ndarray<nb::ro>;

DType dtype_of(const Tensor& tensor, const char* name) {
  const nb::dlpack::dtype d = tensor.dtype();
  const auto is = [&](nb::dlpack::dtype_code code, int bits) {
    return d.code == static_cast<std::uint8_t>(code) && d.bits == bits && d.lanes == 1;
  };
  using Code = nb::dlpack::dtype_code;
  if (is(Code::Int, 8) || is(Code::UInt, 8)) return DType::kInt8;
  if (is(Code::Int, 32)) return DType::kInt32;
  if (is(Code::Float, 32)) return DType::kFloat32;
  if (is(Code::Bfloat, 16) || is(Code::UInt, 16)) return DType::kBFloat16;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: expected int8, int32, float32 or bfloat16 (or its bits as uint16), "
                          "got a type of {} bits that is none of these",
                          name, int{d.bits}));
}

/// Any strides; checked by stacked_sources().
StridedView strided(const Array& array, const Tensor& tensor, const char* name,
                    const Device& device) {
  if (tensor.ndim() != 3) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: expected 3 dimensions, got {}", name, tensor.ndim()));
  }
  StridedView view;
  view.tensor.data = tensor.data();
  view.tensor.dtype = dtype_of(tensor, name);
  view.tensor.shape = {static_cast<std::int64_t>(tensor.shape(0)),
                       static_cast<std::int64_t>(tensor.shape(1)),
                       static_cast<std::int64_t>(tensor.shape(2))};
  for (std::size_t i = 0; i < 3; ++i) view.strides[i] = tensor.stride(i);
  view.tensor.device = device_of(array, name);
  if (view.tensor.device != device) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: expected memory on {}, got {}", name, to_text(device),
                            to_text(view.tensor.device)));
  }
  return view;
}

template <class Value, std::size_t N>
Value named(std::string_view name, const char* argument,
            const std::array<std::pair<std::string_view, Value>, N>& values) {
  std::string known;
  for (const auto& [text, value] : values) {
    if (text == name) return value;
    known += (known.empty() ? "" : ", ") + std::string(text);
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: '{}' is none of {}", argument, name, known));
}

WeightLayout weight_layout(std::string_view name) {
  return named<WeightLayout, 4>(name, "weight_layout",
                                {{{"int4", WeightLayout::kInt4},
                                  {"uint4b8", WeightLayout::kUint4b8},
                                  {"uint4b8-transposed", WeightLayout::kUint4b8Transposed},
                                  {"mxfp4", WeightLayout::kMxfp4}}});
}

ScaleLayout scale_layout(std::string_view name) {
  return named<ScaleLayout, 3>(name, "scale_layout",
                               {{{"by-shape", ScaleLayout::kByShape},
                                 {"plain", ScaleLayout::kPlain},
                                 {"interleaved", ScaleLayout::kInterleaved}}});
}

/// What of the tensors' sizes is the model's; the rest is padded.
void set_own_widths(const std::pair<int, int>& widths, ModelGeometry& geometry) {
  ModelGeometry own = geometry;
  own.set_widths(widths.first, widths.second);
  if (widths.first < 1 || widths.second < 1 || own.hidden != geometry.hidden ||
      own.intermediate != geometry.intermediate) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("widths: ({}, {}) are not padded to hidden {} and intermediate {}",
                            widths.first, widths.second, geometry.hidden, geometry.intermediate));
  }
  geometry = own;
}

PyExperts repack_stacked(const Array& w13, const Array& w13_scale, const Array& w2,
                         const Array& w2_scale, nb::handle_t<PyBackend> backend,
                         std::string_view activation, std::string_view weights,
                         std::string_view scales, const std::optional<Array>& memory,
                         std::int64_t max_rows, const std::optional<std::pair<int, int>>& widths,
                         const StreamArgument& stream) {
  auto& b = nb::cast<PyBackend&>(backend);
  const Device device = b.device();
  std::array<Tensor, 4> tensors;
  std::array<StridedView, 4> views;
  const std::array<std::pair<const Array*, const char*>, 4> given = {
      {{&w13, "w13"}, {&w13_scale, "w13_scale"}, {&w2, "w2"}, {&w2_scale, "w2_scale"}}};
  for (std::size_t i = 0; i < given.size(); ++i) {
    if (!nb::try_cast(given[i].first->object, tensors[i])) {
      throw Error(
          ErrorCode::kInvalidArgument,
          fmt::format("{}: expected an array (DLPack or buffer protocol)", given[i].second));
    }
    views[i] = strided(*given[i].first, tensors[i], given[i].second, device);
  }
  Output room;
  if (memory) {
    room = import_output(*memory, {.name = "memory",
                                   .dtypes = {DType::kUInt8},
                                   .dims = {-1},
                                   .shape = "[bytes]",
                                   .device = device});
  }
  StackedSources found = stacked_sources({.w13 = views[0],
                                          .w13_scale = views[1],
                                          .w2 = views[2],
                                          .w2_scale = views[3],
                                          .weight_layout = weight_layout(weights),
                                          .scale_layout = scale_layout(scales),
                                          .activation = parse_activation(activation)});
  if (widths) set_own_widths(*widths, found.format.geometry);
  const Stream queue = to_stream(stream, Framework::of(w13.object), device);
  std::optional<Experts> experts;
  {
    const Call call(b);
    experts.emplace(Experts::make_room(found.format, max_rows, *b.backend, room.view));
    experts->repack(0, found.experts, queue);
    experts->finish_repack(queue);
  }
  return PyExperts{.backend_object = nb::borrow(backend),
                   .backend = &b,
                   .memory = room.object,
                   .experts = std::move(experts)};
}

}  // namespace

void bind_repack(nb::module_& m) {
  m.def(
      "repack_stacked", &repack_stacked, "w13"_a, "w13_scale"_a, "w2"_a, "w2_scale"_a, "backend"_a,
      nb::kw_only(), "activation"_a = "swiglu", "weight_layout"_a = "int4",
      "scale_layout"_a = "by-shape", "memory"_a = nb::none(), "max_rows"_a = 1,
      "widths"_a = nb::none(), "stream"_a = nb::none(),
      "Experts of stacked tensors, which lie on the backend's device in any strides and are read\n"
      "there. sluice.compat.w4a8.W4A8Experts has their shapes, the layouts and what memory may "
      "be.\n"
      "widths: the model's own hidden and intermediate size, where the tensors are padded.\n"
      "stream: handle, None: torch's current one for tensors of torch. Waits for it.\n\n"
      "Raises Error: invalid_argument naming the tensor, or the expert and the scale that is not\n"
      "finite; out_of_memory.");
  m.def(
      "packed_sizes",
      [](int num_experts, int hidden, int intermediate, int group_size, bool scales_are_bf16,
         std::string_view device, std::string_view weight_format) {
        const WeightFormat own = parse_weight_format(weight_format);
        const RepackFormat format{.geometry = {.name = "sizes",
                                               .num_experts = num_experts,
                                               .num_topk = 1,
                                               .hidden = hidden,
                                               .intermediate = intermediate,
                                               .group_size = group_size,
                                               .weight_format = own},
                                  .num_experts = num_experts,
                                  .scale_dtype = own == WeightFormat::kMxfp4 ? DType::kFloat8E8M0
                                                 : scales_are_bf16           ? DType::kBFloat16
                                                                             : DType::kFloat32};
        const PackedSizes sizes = packed_sizes(format, parse_device(device).kind);
        return nb::make_tuple(sizes.gate_up_bytes, sizes.down_bytes, sizes.alignment);
      },
      nb::kw_only(), "num_experts"_a, "hidden"_a, "intermediate"_a, "group_size"_a = 128,
      "scales_are_bf16"_a = true, "device"_a = "cpu", "weight_format"_a = "int4",
      "(bytes of one expert's gate and up, bytes of its down, alignment) of packed weights: first\n"
      "gate and up of every expert, then down of every expert.\n\n"
      "Raises Error: invalid_argument naming the field.");
}

}  // namespace sluice::python
