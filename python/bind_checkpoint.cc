#include <fmt/format.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <array>

#include "bindings.h"
#include "sluice/checkpoint.h"
#include "sluice/lab/synthetic.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

using Matrix = std::pair<Array, Array>;  // codes, scales

/// Imported arrays that the views of an ExpertWeights point into.
using Storage = std::array<Input, 6>;

/// Frees `storage` whoever lets go of the weights last, with the interpreter's lock.
std::shared_ptr<const void> keep(Storage storage) {
  return {new Storage(std::move(storage)), [](const Storage* p) {
            const Acquired lock;
            delete p;  // NOLINT(cppcoreguidelines-owning-memory)
          }};
}

TensorView expert_of(const TensorView& all, std::int64_t expert) {
  const std::size_t bytes = all.bytes() / static_cast<std::size_t>(all.dim(0));
  return {all.as<std::byte>() + static_cast<std::size_t>(expert) * bytes, all.dtype,
          Shape{all.dim(1), all.dim(2)}, all.device};
}

std::initializer_list<DType> scale_dtypes(WeightFormat format) {
  static constexpr std::initializer_list<DType> kFloats = {DType::kFloat32, DType::kBFloat16};
  static constexpr std::initializer_list<DType> kPowersOfTwo = {DType::kFloat8E8M0};
  return allows_scale_dtype(format, DType::kFloat8E8M0) ? kPowersOfTwo : kFloats;
}

struct MatrixNames {
  const char *codes, *scales;
};

/// codes [E, n, k / 2] and scales [E, n, k / group] of one matrix; -1: not known yet.
void import_matrix(const Matrix& matrix, MatrixNames names, std::array<std::int64_t, 3> sizes,
                   int group_size, WeightFormat format, Input& codes, Input& scales) {
  const auto [num, n, k] = sizes;
  codes = import_input(matrix.first, {.name = names.codes,
                                      .dtypes = {code_dtype(format)},
                                      .dims = {num, n, k < 0 ? -1 : k / 2},
                                      .shape = "[num_experts, n, k / 2], the same for all matrices",
                                      .device = {}});
  scales = import_input(matrix.second, {.name = names.scales,
                                        .dtypes = scale_dtypes(format),
                                        .dims = {codes.view.dim(0), codes.view.dim(1),
                                                 codes.view.dim(2) * 2 / group_size},
                                        .shape = "[num_experts, n, k / group_size]",
                                        .device = {}});
}

ExpertWeights weights_from_arrays(const Matrix& gate, const Matrix& up, const Matrix& down,
                                  int group_size, std::optional<StaticScales> scales,
                                  std::string_view weight_format, std::string_view activation) {
  const WeightFormat format = parse_weight_format(weight_format);
  if (!allows_group_size(format, group_size)) {
    throw Error(ErrorCode::kInvalidArgument,
                format == WeightFormat::kInt4
                    ? fmt::format("group_size {} is not 128 or 32", group_size)
                    : fmt::format("group_size {} is {}", group_size, group_size_refusal(format)));
  }
  Storage s;
  import_matrix(gate, {"gate codes", "gate scales"}, {-1, -1, -1}, group_size, format, s[0], s[1]);
  const std::int64_t num = s[0].view.dim(0), n = s[0].view.dim(1), k = s[0].view.dim(2) * 2;
  import_matrix(up, {"up codes", "up scales"}, {num, n, k}, group_size, format, s[2], s[3]);
  import_matrix(down, {"down codes", "down scales"}, {num, k, n}, group_size, format, s[4], s[5]);
  if (num == 0 || k == 0 || n == 0 || k % 128 != 0 || n % 128 != 0) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("gate codes: {} experts, hidden {}, intermediate {}; expected at least "
                            "one expert and multiples of 128",
                            num, k, n));
  }
  ExpertWeights weights;
  weights.geometry = {.name = "arrays",
                      .num_experts = static_cast<int>(num),
                      .num_topk = 1,
                      .hidden = static_cast<int>(k),
                      .intermediate = static_cast<int>(n),
                      .group_size = group_size,
                      .weight_format = format,
                      .activation = parse_activation(activation)};
  const auto matrix = [&](std::size_t i, std::int64_t e) {
    return QuantMatrix{expert_of(s[i].view, e), expert_of(s[i + 1].view, e), group_size, format};
  };
  for (std::int64_t e = 0; e < num; ++e) {
    weights.experts.push_back({matrix(0, e), matrix(2, e), matrix(4, e)});
  }
  check_scales(weights);
  weights.static_scales = scales;
  weights.storage = keep(std::move(s));
  return weights;
}

nb::object scales_tuple(const std::optional<StaticScales>& scales) {
  if (!scales) return nb::none();
  return nb::make_tuple(scales->s1, scales->s2);
}

void bind_geometry(nb::module_& m) {
  nb::class_<ModelGeometry>(m, "ModelGeometry",
                            "Sizes of one MoE layer and what the router does with it.")
      .def(
          "__init__",
          [](ModelGeometry* self, int num_experts, int num_topk, int hidden, int intermediate,
             int group_size, float routed_scaling_factor, std::string name) {
            new (self) ModelGeometry{.name = std::move(name),
                                     .num_experts = num_experts,
                                     .num_topk = num_topk,
                                     .hidden = hidden,
                                     .intermediate = intermediate,
                                     .group_size = group_size,
                                     .routed_scaling_factor = routed_scaling_factor};
          },
          nb::kw_only(), "num_experts"_a, "num_topk"_a, "hidden"_a, "intermediate"_a,
          "group_size"_a = 128, "routed_scaling_factor"_a = 1.0f, "name"_a = "model")
      .def_static("preset", &preset_geometry, "name"_a, "Raises Error listing the names there are.")
      .def_static("preset_names", &preset_names, "Names that preset() takes.")
      .def_ro("name", &ModelGeometry::name, "Preset, or model_type of config.json.")
      .def_ro("num_experts", &ModelGeometry::num_experts, "Routed experts, over all ranks.")
      .def_ro("num_topk", &ModelGeometry::num_topk, "Experts of a token.")
      .def_ro("hidden", &ModelGeometry::hidden, "Multiple of 128.")
      .def_ro("intermediate", &ModelGeometry::intermediate, "Multiple of 128.")
      .def_prop_ro(
          "token_width", &ModelGeometry::token_width,
          "Channels of a token in the model: hidden, where that is a multiple of 128. The\n"
          "rest of hidden is padded inside, with zeros.")
      .def_prop_ro("inner_width", &ModelGeometry::inner_width, "The same of intermediate.")
      .def_ro("has_bias", &ModelGeometry::has_bias,
              "Whether every matrix has a bias, which the CPU backend alone adds.")
      .def_ro("group_size", &ModelGeometry::group_size, "Weights that share a scale: 128 or 32.")
      .def_ro("routed_scaling_factor", &ModelGeometry::routed_scaling_factor, "Of config.json.")
      .def_prop_ro(
          "weight_format", [](const ModelGeometry& g) { return to_string(g.weight_format); },
          "How the experts' weights are coded: 'int4' or 'mxfp4'.")
      .def_prop_ro(
          "activation", [](const ModelGeometry& g) { return to_string(g.activation); },
          "Function of gate and up, as text: 'swiglu', 'swiglu:limit=10'.\n"
          "Of a checkpoint, that of its first layer with experts: Checkpoint.activation() has\n"
          "each layer's.")
      .def("__repr__", [](const ModelGeometry& g) {
        return fmt::format(
            "<sluice.ModelGeometry {}: {} experts, top-{}, hidden {}, intermediate {}, group {}>",
            g.name, g.num_experts, g.num_topk, g.hidden, g.intermediate, g.group_size);
      });
}

void bind_weights(nb::module_& m) {
  nb::class_<ExpertWeights>(
      m, "ExpertWeights",
      "Experts of one layer as a checkpoint has them: codes of 4 bits (signed int4,\n"
      "or e2m1), two to a byte with even k low, and a scale for each group along k.")
      .def_static(
          "from_arrays",
          [](const Matrix& gate, const Matrix& up, const Matrix& down, int group_size,
             std::optional<float> s1, std::optional<float> s2, std::string_view weight_format,
             std::string_view activation, int first_expert) {
            if (s1.has_value() != s2.has_value()) {
              throw Error(ErrorCode::kInvalidArgument, "s1 and s2: give both or neither");
            }
            ExpertWeights weights =
                weights_from_arrays(gate, up, down, group_size,
                                    s1 ? std::optional(StaticScales{*s1, *s2}) : std::nullopt,
                                    weight_format, activation);
            weights.first_expert = first_expert;
            return weights;
          },
          "gate"_a, "up"_a, "down"_a, nb::kw_only(), "group_size"_a = 128, "s1"_a = nb::none(),
          "s2"_a = nb::none(), "weight_format"_a = "int4", "activation"_a = "swiglu",
          "first_expert"_a = 0,
          "Each matrix is a pair (codes, scales) in host memory, kept alive and not copied:\n"
          "codes [num_experts, n, k / 2] uint8 or int8, scales [num_experts, n, k / group_size]\n"
          "float32 or bfloat16. gate and up have n = intermediate and k = hidden, down the "
          "reverse.\nweight_format: 'int4'; or 'mxfp4', whose codes are e2m1, whose scales are\n"
          "e8m0 as uint8 and whose group_size is 32. activation: 'swiglu', 'swiglu:limit=L',\n"
          "'swiglu-oai:alpha=A,limit=L' or 'situ:beta=B,linear_beta=LB'.\n"
          "first_expert: number of the first one in its layer; LayerGroup.add_layer() wants this "
          "rank's.\n\n"
          "Raises Error: invalid_argument naming the matrix; unsupported naming the format or the\n"
          "activation that there is not.")
      .def_ro("layer", &ExpertWeights::layer, "Layer of the checkpoint.")
      .def_ro("first_expert", &ExpertWeights::first_expert, "Number of the first expert held.")
      .def_ro("geometry", &ExpertWeights::geometry, "Of the whole layer.")
      .def_prop_ro(
          "static_scales", [](const ExpertWeights& w) { return scales_tuple(w.static_scales); },
          "(s1, s2) of the whole layer, or None.")
      .def_prop_ro("nbytes", &ExpertWeights::bytes, "Codes and scales.")
      .def("__len__", [](const ExpertWeights& w) { return w.experts.size(); })
      .def(
          "matrix",
          [](nb::handle_t<ExpertWeights> self, int expert, std::string_view name) {
            const auto& weights = nb::cast<const ExpertWeights&>(self);
            if (expert < 0 || expert >= static_cast<int>(weights.experts.size())) {
              throw Error(ErrorCode::kInvalidArgument, fmt::format("expert {} is not in [0, {})",
                                                                   expert, weights.experts.size()));
            }
            const Expert& e = weights.experts[static_cast<std::size_t>(expert)];
            if (name != "gate" && name != "up" && name != "down") {
              throw Error(ErrorCode::kInvalidArgument,
                          fmt::format("matrix '{}' is not gate, up or down", name));
            }
            const QuantMatrix& matrix = name == "gate" ? e.gate : name == "up" ? e.up : e.down;
            return nb::make_tuple(export_view(matrix.codes, self),
                                  export_view(matrix.scales, self));
          },
          "expert"_a, "name"_a,
          "(codes [n, k / 2] uint8, scales [n, k / group_size] float32 or bfloat16 as uint16) of\n"
          "'gate', 'up' or 'down', read-only and without a copy. Experts count from 0 here.")
      .def("__repr__", [](const ExpertWeights& w) {
        return fmt::format("<sluice.ExpertWeights layer {}, experts {}..{}>", w.layer,
                           w.first_expert, w.first_expert + static_cast<int>(w.experts.size()) - 1);
      });
}

}  // namespace

void bind_checkpoint(nb::module_& m) {
  bind_geometry(m);
  bind_weights(m);
  nb::class_<Checkpoint>(m, "Checkpoint", "Routed experts of a published INT4 checkpoint.")
      .def(
          "__init__",
          [](Checkpoint* self, const std::filesystem::path& directory) {
            const Released released;
            new (self) Checkpoint(Checkpoint::open(directory));
          },
          "directory"_a,
          "Reads config and headers, no weights.\n\n"
          "Raises Error: io, corrupt_file naming file, tensor, value and limit, unsupported.")
      .def_prop_ro("path", &Checkpoint::path, "The directory.")
      .def_prop_ro("format", &Checkpoint::format, "Published layout, for example 'w4afp8'.")
      .def_prop_ro("geometry", &Checkpoint::geometry, "Sizes of its MoE layers.")
      .def_prop_ro("moe_layers", &Checkpoint::moe_layers, "Layers with routed experts, ascending.")
      .def_prop_ro("identity", &Checkpoint::identity,
                   "Digest of config and headers, not of weights.")
      .def(
          "activation",
          [](const Checkpoint& c, int layer) { return to_string(c.activation(layer)); }, "layer"_a,
          "Function of gate and up of a layer, as text.\n\n"
          "Raises Error: invalid_argument for a layer without experts.")
      .def(
          "static_scales",
          [](const Checkpoint& c, int layer) { return scales_tuple(c.static_scales(layer)); },
          "layer"_a, "(s1, s2) over all experts of the layer, or None.")
      .def("check", &Checkpoint::check, nb::call_guard<Released>(), "layer"_a,
           "Checks headers and input scales of a whole layer, and no weights.")
      .def(
          "warnings",
          [](const Checkpoint& c, std::optional<int> layer) {
            nb::list list;
            for (const auto& w : layer ? c.warnings(*layer) : c.warnings()) {
              list.append(text_of(w.tensor + ": " + w.text));
            }
            return nb::typed<nb::list, nb::str>(list);
          },
          "layer"_a = nb::none(),
          "What loads but deserves a look, as text: of a layer, or of the checkpoint as a whole\n"
          "(keys of config.json that are not known, layers that are missing).")
      .def(
          "load_experts",
          [](const Checkpoint& c, const Whole<"layer">& layer,
             const Whole<"first_expert">& first_expert, const Whole<"num_experts">& num_experts) {
            return c.load_experts(layer, first_expert, num_experts);
          },
          nb::call_guard<Released>(), "layer"_a, "first_expert"_a, "num_experts"_a,
          "ExpertWeights, mapped from the files.\n\n"
          "Raises Error: invalid_argument for layer or range, corrupt_file, unsupported.")
      .def("__repr__", [](const Checkpoint& c) {
        return text_of(fmt::format("<sluice.Checkpoint {} {}>", c.format(), c.path().string()));
      });

  m.def(
      "make_checkpoint",
      [](const std::filesystem::path& directory, const ModelGeometry& geometry,
         const std::string& format, std::uint64_t seed, int first_layer, int num_layers,
         std::string_view scale_dtype, bool with_input_scales) {
        if (scale_dtype != "f32" && scale_dtype != "bf16") {
          throw Error(ErrorCode::kInvalidArgument,
                      fmt::format("scale_dtype '{}' is not f32 or bf16", scale_dtype));
        }
        const Released released;
        write_synthetic_checkpoint(
            {.geometry = geometry,
             .format = format,
             .first_layer = first_layer,
             .num_layers = num_layers,
             .seed = seed,
             .scale_dtype = scale_dtype == "f32" ? DType::kFloat32 : DType::kBFloat16,
             .with_input_scales = with_input_scales},
            directory);
        return Checkpoint::open(directory);
      },
      "directory"_a, "geometry"_a, nb::kw_only(), "format"_a = "w4afp8", "seed"_a = 1,
      "first_layer"_a = 3, "num_layers"_a = 1, "scale_dtype"_a = "f32",
      "with_input_scales"_a = true,
      "Writes a synthetic checkpoint, fixed by its seed, and opens it.\n\n"
      "Raises Error: invalid_argument, io; refuses a directory that already holds a checkpoint.");
}

}  // namespace sluice::python
