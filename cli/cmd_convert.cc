// sluice convert - from one published checkpoint layout to another.
#include <fmt/core.h>
#include <sys/resource.h>

#include <charconv>
#include <chrono>

#include "command.h"
#include "report.h"
#include "sluice/error.h"
#include "sluice/lab/convert.h"

namespace sluice::cli {
namespace {

struct Options {
  ConvertOptions convert;
  std::string from, to, format, scale, scale_dtype = "auto", experts;
  int group_size = 0;
  std::uint64_t shard_bytes = std::uint64_t{1} << 32;
  bool no_verify = false;
};

int parse_number(const std::string& text, const std::string& all) {
  int value = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc{} || end != text.data() + text.size() || value < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--experts '{}' is not A:B with two expert numbers", all));
  }
  return value;
}

/// "A:B", B excluded.
void parse_experts(const std::string& text, ConvertOptions& options) {
  if (text.empty()) return;
  const std::size_t colon = text.find(':');
  const int begin = parse_number(text.substr(0, colon), text);
  const int end = parse_number(colon == std::string::npos ? "" : text.substr(colon + 1), text);
  if (end <= begin) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--experts '{}' is empty: {} is not above {}", text, end, begin));
  }
  options.first_expert = begin;
  options.num_experts = end - begin;
}

ConvertOptions make_options(const Options& options) {
  ConvertOptions convert = options.convert;
  convert.from = options.from;
  convert.to = options.to;
  convert.format = options.format;
  if (!options.scale.empty()) convert.scale_rule = parse_scale_rule(options.scale);
  if (options.group_size != 0) convert.group_size = options.group_size;
  if (options.scale_dtype == "f32") convert.scale_dtype = DType::kFloat32;
  if (options.scale_dtype == "bf16") convert.scale_dtype = DType::kBFloat16;
  parse_experts(options.experts, convert);
  convert.verify = !options.no_verify;
  convert.max_shard_bytes = options.shard_bytes;
  return convert;
}

const char* rule_text(ScaleRule rule) {
  switch (rule) {
    case ScaleRule::kAmax7:
      return "scale = amax / 7 of each group";
    case ScaleRule::kAmax8:
      return "scale = amax / 8 of each group, 7 at most";
    case ScaleRule::kMse:
      return "the scale in [amax / 16, amax / 6] of each group with the least squared error";
  }
  return "";
}

double peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) * 1024;
}

void print_report(const Options& options, const ConvertReport& r, double seconds) {
  const ModelGeometry& g = r.geometry;
  fmt::print("source    {}: {} ({})\n", options.from, r.source_format, r.source_evidence);
  fmt::print("result    {}: {}, {} scale per {} along K, {}\n", options.to, r.format,
             to_string(r.scale_dtype), g.group_size,
             r.has_input_scales ? "static input scales" : "no static input scales");
  if (!r.is_requantized) {
    fmt::print("numbers   {} codes and scales kept, bit for bit\n",
               g.weight_format == WeightFormat::kInt4 ? "INT4" : "MXFP4");
  } else {
    fmt::print("numbers   quantized to INT4: {}\n", rule_text(parse_scale_rule(options.scale)));
    if (!r.requantized_because.empty()) {
      fmt::print("warning   a second rounding of weights that were quantized: {}\n",
                 r.requantized_because);
    }
  }
  fmt::print("experts   {} written, {} found finished, {} left for other runs; {} other tensors\n",
             r.experts_written, r.experts_kept, r.experts_left, r.other_tensors);
  fmt::print("size      {} in {} shards, {:.1f} s, peak resident {}\n",
             human_bytes(static_cast<double>(r.bytes)), r.num_shards, seconds,
             human_bytes(peak_resident_bytes()));
  if (!r.is_complete) {
    fmt::print("not complete: {} experts left; run again with their --experts\n", r.experts_left);
  } else if (r.is_made_by_another) {
    fmt::print("complete, finished by another run at the same time\n");
  } else if (!r.is_verified) {
    fmt::print("complete, not verified (--no-verify); checksums in SHA256SUMS\n");
  } else if (r.is_requantized) {
    fmt::print("verified  {} weights, each within half a step or clipped; relative L2 {:.3f} %{}\n",
               r.weights_compared, 100 * r.relative_error,
               r.worst_matrix.empty() ? ""
                                      : fmt::format(", worst {:.3f} % ({})",
                                                    100 * r.worst_relative_error, r.worst_matrix));
  } else {
    fmt::print("verified  {} weights: dequantized(source) == dequantized(result), bit for bit\n",
               r.weights_compared);
  }
}

void convert(const Options& options, Output& output) {
  const ConvertOptions request = make_options(options);
  const auto begin = std::chrono::steady_clock::now();
  ConvertReport report;
  {
    ProgressLine line("converting " + options.from);
    report = convert_checkpoint(request, [&](double done) { line.update(done); });
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  print_report(options, report, seconds.count());
  output.json = {{"command", "convert"},
                 {"from", options.from},
                 {"to", options.to},
                 {"source_format", report.source_format},
                 {"source_evidence", report.source_evidence},
                 {"format", report.format},
                 {"requantized", report.is_requantized},
                 {"requantized_because", report.requantized_because},
                 {"scale_rule", options.scale.empty() ? nlohmann::ordered_json(nullptr)
                                                      : nlohmann::ordered_json(options.scale)},
                 {"scale_dtype", to_string(report.scale_dtype)},
                 {"group_size", report.geometry.group_size},
                 {"input_scales", report.has_input_scales},
                 {"layers", report.layers},
                 {"experts_written", report.experts_written},
                 {"experts_kept", report.experts_kept},
                 {"experts_left", report.experts_left},
                 {"other_tensors", report.other_tensors},
                 {"bytes", report.bytes},
                 {"num_shards", report.num_shards},
                 {"complete", report.is_complete},
                 {"made_by_another", report.is_made_by_another},
                 {"verified", report.is_verified},
                 {"weights_compared", report.weights_compared},
                 {"relative_error", report.relative_error},
                 {"worst_relative_error", report.worst_relative_error},
                 {"worst_matrix", report.worst_matrix},
                 {"peak_resident_bytes", peak_resident_bytes()},
                 {"seconds", seconds.count()}};
}

}  // namespace

void add_convert(Command& program, Output& output) {
  auto options = std::make_shared<Options>();
  Command command =
      program.add_subcommand("convert",
                             "Rewrite a checkpoint in another layout, expert by expert, verified. "
                             "Interrupted? Run it again: it goes on, to the same bytes");
  command.add_option("--from", options->from, "Checkpoint in any layout that inspect names")
      .required()
      .not_empty();
  command.add_option("--to", options->to, "Directory to make; must not hold anything yet")
      .required()
      .not_empty();
  command.add_option("--format", options->format, "Layout of the result")
      .required()
      .one_of({"w4afp8", "compressed-tensors", "deepseek-fp4", "gpt-oss"});
  command
      .add_option("--scale", options->scale,
                  "How BF16 and FP8 weights get their INT4 scales; required for them, refused for "
                  "INT4 sources that can keep theirs. MXFP4 becomes INT4 by it, and stays MXFP4 "
                  "without")
      .one_of({"amax7", "amax8", "mse"});
  command
      .add_option("--group-size", options->group_size,
                  "Weights per scale, when weights are quantized (128, and as an INT4 source in "
                  "compressed-tensors, unless given)")
      .one_of({32, 128});
  command
      .add_option("--scale-dtype", options->scale_dtype,
                  "auto: as the source, or f32 (w4afp8) and bf16 (compressed-tensors) when weights "
                  "are quantized. bf16 is refused where it would round")
      .one_of({"auto", "f32", "bf16"})
      .shows_default();
  command.add_option("--layer", options->convert.layers,
                     "Convert this layer only; may be given several times");
  command.add_option("--experts", options->experts,
                     "A:B converts experts A to B - 1 of each layer now; the result is complete "
                     "when all have been, by this or other runs, in any order or side by side");
  command.add_flag("--experts-only", options->convert.experts_only,
                   "Leave out all other tensors and files of the model");
  command.add_flag("--drop-input-scales", options->convert.drop_input_scales,
                   "Leave out static activation scales");
  command.add_flag("--no-verify,!--verify", options->no_verify,
                   "Do not read the result back and compare it with the source");
  command.add_option("--shard-bytes", options->shard_bytes, "Largest shard").shows_default();
  command.on_parsed([options, &output] { convert(*options, output); });
}

}  // namespace sluice::cli
