// sluice make-checkpoint - writes a synthetic checkpoint in a published layout.
#include <fmt/core.h>

#include <chrono>

#include "command.h"
#include "report.h"
#include "sluice/checkpoint.h"
#include "sluice/error.h"
#include "sluice/lab/synthetic.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string preset, out, format, scale_dtype, spelling;
  std::uint64_t seed = 1, shard_bytes = std::uint64_t{1} << 30;
  int layers = 1, experts = 0, hidden = 0, intermediate = 0, group_size = 0;
  bool no_input_scales = false, static_activations = false, pre_quant_scale = false;
};

bool is_mxfp4(const std::string& format) {
  return format == "kimi-mxfp4" || format == "deepseek-fp4" || format == "gpt-oss";
}

SyntheticCheckpoint make_spec(const Options& options) {
  SyntheticCheckpoint spec = synthetic_preset(options.preset);
  spec.num_layers = options.layers;
  spec.seed = options.seed;
  spec.max_shard_bytes = options.shard_bytes;
  spec.with_static_activations = options.static_activations;
  spec.with_pre_quant_scale = options.pre_quant_scale;
  if (options.no_input_scales) spec.with_input_scales = false;
  if (!options.format.empty()) spec.format = options.format;
  if (is_mxfp4(spec.format)) {
    spec.geometry.group_size = 32;
    spec.scale_dtype = DType::kFloat8E8M0;
  } else if (spec.scale_dtype == DType::kFloat8E8M0) {
    spec.scale_dtype = DType::kFloat32;
  }
  if (!options.spelling.empty()) spec.spelling = options.spelling;
  if (!options.scale_dtype.empty()) {
    spec.scale_dtype = options.scale_dtype == "bf16" ? DType::kBFloat16 : DType::kFloat32;
  }
  if (spec.format == "kimi-int4") spec.geometry.group_size = 32;
  if (options.group_size != 0) spec.geometry.group_size = options.group_size;
  if (options.experts != 0) spec.geometry.num_experts = options.experts;
  ModelGeometry& g = spec.geometry;
  g.set_widths(options.hidden != 0 ? options.hidden : g.token_width(),
               options.intermediate != 0 ? options.intermediate : g.inner_width());
  if (spec.format == "gpt-oss") g.has_bias = true;
  return spec;
}

/// Bytes and number of the files of `dir`.
std::pair<std::uintmax_t, int> measure(const std::filesystem::path& dir) {
  std::pair<std::uintmax_t, int> sum;
  for (const auto& file : std::filesystem::directory_iterator(dir)) {
    sum.first += file.file_size();
    ++sum.second;
  }
  return sum;
}

/// None beside a pre_quant_scale: those of an input that is multiplied first are not the layer's.
std::optional<StaticScales> scales_of(const Options& options, const Checkpoint& checkpoint,
                                      int layer) {
  if (options.pre_quant_scale) return std::nullopt;
  return checkpoint.static_scales(layer);
}

bool is_published_in_mxfp4(const std::string& preset) {
  return preset.starts_with("deepseek-v4") || preset.starts_with("kimi-k3");
}

void make_checkpoint(const Options& options, Output& output) {
  const SyntheticCheckpoint spec = make_spec(options);
  const auto begin = std::chrono::steady_clock::now();
  {
    ProgressLine line("writing " + options.out);
    write_synthetic_checkpoint(spec, options.out, [&](double done) { line.update(done); });
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;

  // Done is what can be read back.
  const Checkpoint checkpoint = Checkpoint::open(options.out);
  const int layer = checkpoint.moe_layers().front();
  const auto scales = scales_of(options, checkpoint, layer);
  const auto [bytes, num_files] = measure(options.out);
  const ModelGeometry& g = checkpoint.geometry();
  fmt::print("{}: {} in {} files, {:.1f} s\n", options.out, human_bytes(static_cast<double>(bytes)),
             num_files, seconds.count());
  fmt::print("{} {}: layers {}..{}, {} experts, top-{}, hidden {}, intermediate {}, seed {}\n",
             checkpoint.format(), g.name, layer, checkpoint.moe_layers().back(), g.num_experts,
             g.num_topk, g.token_width(), g.inner_width(), spec.seed);
  if (scales) fmt::print("layer {}: s1 = {:.6g}, s2 = {:.6g}\n", layer, scales->s1, scales->s2);
  if (!checkpoint.weight_format()) {
    fmt::print("note: {} cannot be run; `sluice convert --scale ...` makes INT4 of it\n",
               checkpoint.format());
  } else if (options.pre_quant_scale) {
    fmt::print("note: a pre_quant_scale cannot be run; `sluice convert --scale ...` folds it in\n");
  } else if (options.preset == "kimi-k2" && g.group_size != 32) {
    fmt::print("note: Kimi-K2's own INT4 has groups of 32 (--format kimi-int4); this has {}\n",
               g.group_size);
  }
  if (is_published_in_mxfp4(options.preset) && checkpoint.weight_format() != WeightFormat::kMxfp4) {
    fmt::print("note: {} is published in MXFP4; this is INT4\n", options.preset);
  }
  output.json = {{"command", "make-checkpoint"},
                 {"directory", options.out},
                 {"preset", options.preset},
                 {"format", checkpoint.format()},
                 {"spelling", spec.spelling},
                 {"seed", spec.seed},
                 {"layers", checkpoint.moe_layers()},
                 {"num_experts", g.num_experts},
                 {"num_topk", g.num_topk},
                 {"hidden", g.token_width()},
                 {"intermediate", g.inner_width()},
                 {"group_size", g.group_size},
                 {"routed_scaling_factor", g.routed_scaling_factor},
                 {"scale_dtype", to_string(spec.scale_dtype)},
                 {"bytes", bytes},
                 {"num_files", num_files},
                 {"seconds", seconds.count()}};
  if (scales) output.json["static_scales"] = {{"s1", scales->s1}, {"s2", scales->s2}};
}

}  // namespace

void add_make_checkpoint(Command& program, Output& output) {
  auto options = std::make_shared<Options>();
  Command command = program.add_subcommand(
      "make-checkpoint", "Write a synthetic checkpoint in a published layout, fixed by its seed");
  command.add_option("--preset", options->preset, "Geometry to write")
      .required()
      .one_of(preset_names());
  command.add_option("--out", options->out, "Directory to make; must not hold anything yet")
      .required()
      .not_empty();
  command.add_option("--format", options->format, "Layout instead of the preset's own")
      .one_of(synthetic_format_names());
  command
      .add_option("--spelling", options->spelling,
                  "Whose tensor names and config keys, instead of the preset's own")
      .one_of(synthetic_spelling_names());
  command
      .add_option("--group-size", options->group_size,
                  "Weights per scale: 128, or 32 in compressed-tensors, kimi-int4 (always) and "
                  "modelopt-w4a8-awq")
      .one_of({32, 128});
  command.add_option("--seed", options->seed, "Same seed, same bytes").shows_default();
  command
      .add_option("--num-layers,--layers", options->layers,
                  "How many MoE layers, numbered from 3; --layers is the older name")
      .range(1, 1024)
      .shows_default();
  command.add_option("--experts", options->experts, "Experts instead of the preset's")
      .range(1, 1 << 16);
  command.add_option("--hidden", options->hidden, "Hidden size instead of the preset's")
      .range(1, 1 << 20);
  command
      .add_option("--intermediate", options->intermediate,
                  "Intermediate size instead of the preset's")
      .range(1, 1 << 20);
  command
      .add_option("--scale-dtype", options->scale_dtype,
                  "Of weight scales, instead of the preset's own")
      .one_of({"f32", "bf16"});
  command.add_flag("--no-input-scales", options->no_input_scales,
                   "Leave out static activation scales");
  command.add_flag("--static-activations", options->static_activations,
                   "compressed-tensors: static e4m3 input scales instead of dynamic ones");
  command.add_flag("--pre-quant-scale", options->pre_quant_scale,
                   "modelopt-w4a8-awq: AWQ's factors of the input's channels, which only "
                   "`sluice convert --scale` can take");
  command.add_option("--shard-bytes", options->shard_bytes, "Largest shard").shows_default();
  command.on_parsed([options, &output] { make_checkpoint(*options, output); });
}

}  // namespace sluice::cli
