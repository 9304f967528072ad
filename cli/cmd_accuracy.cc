// sluice accuracy - what each rounding costs, recipe by recipe, with proof, gate and report.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string_view>

#include "accuracy_print.h"
#include "command.h"
#include "report.h"
#include "report/accuracy_json.h"
#include "report/accuracy_layers.h"
#include "report/accuracy_report.h"
#include "sluice/config.h"
#include "sluice/error.h"
#include "sluice/lab/accuracy.h"
#include "sluice/lab/files.h"
#include "sluice/lab/synthetic.h"

namespace sluice::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string checkpoint, preset, original, replay, budget, html, layer, gate, backend = "cpu";
  std::vector<std::string> suites = {"all"}, recipes = {"all"};
  int ranks = 4, threads = 0;
  std::int64_t tokens = 32;
  std::uint64_t seed = 1;
  bool calibrate = false;
};

/// Weights, and a checkpoint on which engines can run the identity proof. A preset has no files:
/// its proof runs on a narrow stand-in, because GEMM1's input does not depend on the weights.
class Subject {
 public:
  Subject(const Checkpoint& checkpoint, const Checkpoint* original, const std::string& path,
          int layer, std::uint64_t seed)
      : seed_(seed),
        layer_(layer),
        checkpoint_(&checkpoint),
        source_(make_checkpoint_source(checkpoint, layer, seed, original)),
        description_(
            fmt::format("checkpoint {}, layer {} ({})", path, layer, checkpoint.format())) {}
  Subject(const std::string& preset, std::uint64_t seed)
      : seed_(seed),
        preset_(preset),
        source_(make_synthetic_source(preset_geometry(preset), seed)),
        description_("preset " + preset) {}
  ~Subject() {
    std::error_code ignored;
    if (!stand_in_dir_.empty()) std::filesystem::remove_all(stand_in_dir_, ignored);
  }
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

  [[nodiscard]] const LayerSource& source() const { return *source_; }
  [[nodiscard]] const std::string& description() const { return description_; }
  [[nodiscard]] int layer() const { return layer_; }
  /// Null for a preset.
  [[nodiscard]] const Checkpoint* checkpoint() const { return checkpoint_; }

  /// Engines on the checkpoint, or on the stand-in.
  [[nodiscard]] EngineRanks engines(const Options& options, Mode mode) {
    if (!checkpoint_ && !stand_in_) make_stand_in();
    return {.checkpoint = checkpoint_ ? checkpoint_ : &*stand_in_,
            .layer = checkpoint_ ? layer_ : stand_in_->moe_layers().front(),
            .num_ranks = options.ranks,
            .mode = mode,
            .make_backend =
                backends_on(options.backend == "cuda" ? Device::Kind::kCuda : Device::Kind::kHost)};
  }

 private:
  void make_stand_in() {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "sluice-accuracy-XXXXXX").string();
    if (!mkdtemp(pattern.data())) {
      throw Error(ErrorCode::kIo, "cannot make a directory like " + pattern);
    }
    stand_in_dir_ = pattern;
    SyntheticCheckpoint spec = synthetic_preset(preset_);
    spec.geometry.set_widths(spec.geometry.hidden, 128);
    spec.seed = seed_;
    spec.with_input_scales = false;
    write_synthetic_checkpoint(spec, stand_in_dir_ / "checkpoint");
    stand_in_.emplace(Checkpoint::open(stand_in_dir_ / "checkpoint"));
  }

  std::uint64_t seed_;
  int layer_ = 0;
  const Checkpoint* checkpoint_ = nullptr;
  std::string preset_;
  std::optional<Checkpoint> stand_in_;
  std::unique_ptr<LayerSource> source_;
  std::filesystem::path stand_in_dir_;
  std::string description_;
};

/// "2%" or "2": per cent.
double parse_budget(const std::string& text) {
  double percent = 0;
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, percent);
  const std::string_view rest(end, last);
  if (error != std::errc() || (!rest.empty() && rest != "%") || !(percent >= 0 && percent <= 1e6)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--budget '{}' is not a percentage such as 2%", text));
  }
  return percent;
}

bool has_all_recipes(const Options& options) {
  return options.recipes == std::vector<std::string>{"all"};
}

/// The recipe that the budget judges, and of which --layer all shows the errors.
std::string gate_of(const Options& options) {
  return options.gate.empty() ? "direct" : options.gate;
}

/// Throws: kInvalidArgument for a gate that nothing asks for, or that is not evaluated.
void check_gate(const Options& options) {
  const Recipe gate = parse_recipe(gate_of(options));
  if (!options.gate.empty() && options.budget.empty() && options.layer != "all") {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--gate {}: it is what a budget judges; give --budget", options.gate));
  }
  if (has_all_recipes(options) || (options.gate.empty() && options.budget.empty())) return;
  const auto is_gate = [&](const std::string& name) { return parse_recipe(name) == gate; };
  if (std::ranges::none_of(options.recipes, is_gate)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--gate {}: it is none of --recipe {}", gate_of(options),
                            fmt::join(options.recipes, ",")));
  }
}

std::vector<TokenSuite> make_suites(const Options& options, const ModelGeometry& geometry) {
  std::vector<TokenSuite> suites;
  if (!options.replay.empty()) suites.push_back(read_dump(options.replay, geometry));
  std::vector<std::string> names = options.suites;
  if (names == std::vector<std::string>{"all"}) {
    names = options.replay.empty() ? suite_names() : std::vector<std::string>{};
  }
  for (const std::string& name : names) {
    suites.push_back(make_suite(name, geometry, options.tokens, options.seed));
  }
  return suites;
}

AccuracyConfig make_config(const Options& options, const Subject& subject) {
  AccuracyConfig config;
  config.num_threads = options.threads;
  if (!has_all_recipes(options)) {
    for (const std::string& name : options.recipes) config.recipes.push_back(parse_recipe(name));
  }
  if (const Checkpoint* checkpoint = subject.checkpoint()) {
    config.expert_scales = checkpoint->input_scales(subject.layer());
    if (!options.calibrate) config.static_scales = checkpoint->static_scales(subject.layer());
  }
  return config;
}

/// In both modes; json["identity"] has the digests.
bool prove(const Options& options, Subject& subject, const std::vector<TokenSuite>& suites,
           Json& json) {
  bool passed = true;
  json["identity"] = Json::array();
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    const IdentityProof proof = prove_identity(subject.engines(options, mode), suites);
    if (options.layer != "all") print_identity(proof, options.backend);
    json["identity"].push_back(report::to_json(proof));
    passed = passed && proof.passed();
  }
  return passed;
}

bool judge(const Options& options, const std::vector<SuiteCertificate>& certificates, Json& json) {
  if (options.budget.empty()) return true;
  const BudgetVerdict verdict =
      judge_budget(certificates, parse_recipe(gate_of(options)), parse_budget(options.budget));
  if (options.layer != "all") print_budget(verdict);
  json["budget"] = report::to_json(verdict);
  return verdict.passed;
}

/// True if every engine that ran agrees with its certificate; json["engines"] says how many did.
bool engines_agree(const Options& options, const std::vector<SuiteCertificate>& certificates,
                   Json& json) {
  int num_runs = 0, num_passed = 0;
  double farthest = 0, limit = 0;
  for (const SuiteCertificate& suite : certificates) {
    for (const RecipeCertificate& r : suite.recipes) {
      if (!r.engine) continue;
      ++num_runs;
      num_passed += r.engine->passed() ? 1 : 0;
      farthest = std::max(farthest, r.engine->distance);
      limit = r.engine->limit;
    }
  }
  if (num_runs > 0) {
    json["engines"] = {
        {"backend", options.backend}, {"ranks", options.ranks}, {"runs", num_runs},
        {"farthest", farthest},       {"limit", limit},         {"passed", num_passed == num_runs}};
  }
  return num_passed == num_runs;
}

/// One layer, whole, as JSON; printed unless it is one of many. docs/accuracy.md has the schema.
Json certify_layer(const Options& options, Subject& subject) {
  const ModelGeometry& g = subject.source().geometry();
  const std::vector<TokenSuite> suites = make_suites(options, g);
  AccuracyConfig config = make_config(options, subject);
  const EngineRanks engines = subject.engines(options, Mode::kLowLatency);
  if (subject.checkpoint()) config.engine = &engines;
  fmt::print("layer     {}: {} experts, top-{}, hidden {}, intermediate {}, group {}\n",
             subject.description(), g.num_experts, g.num_topk, g.token_width(), g.inner_width(),
             g.group_size);
  if (options.layer != "all") fmt::print("original  {}\n", subject.source().original_kind());

  Json json = {{"source", subject.description()},
               {"layer", subject.layer()},
               {"original_weights", subject.source().original_kind()},
               {"geometry",
                {{"num_experts", g.num_experts},
                 {"num_topk", g.num_topk},
                 {"hidden", g.token_width()},
                 {"intermediate", g.inner_width()},
                 {"activation", to_string(g.activation)},
                 {"group_size", g.group_size}}},
               {"tokens", options.tokens},
               {"seed", options.seed},
               {"gate", gate_of(options)},
               {"suites", Json::array()}};
  std::vector<SuiteCertificate> certificates;
  for (const TokenSuite& suite : suites) {
    ProgressLine progress("evaluating " + suite.name);
    config.progress = [&](double fraction) { progress.update(fraction); };
    certificates.push_back(certify(subject.source(), suite, config));
    json["suites"].push_back(report::to_json(certificates.back()));
  }
  if (options.layer != "all") {
    for (const SuiteCertificate& certificate : certificates) print_suite(certificate);
    fmt::print("\n");
  }
  const bool identical = prove(options, subject, suites, json);
  const bool agree = engines_agree(options, certificates, json);
  const bool within_budget = judge(options, certificates, json);
  json["passed"] = identical && agree && within_budget;
  return json;
}

void write_html(const std::string& path, const Json& json) {
  write_file(path, report::accuracy_report(json));
  fmt::print("report    {}\n", path);
}

/// The layers that --layer names; several only for `all`.
std::vector<int> layers_of(const Options& options, const Checkpoint& checkpoint) {
  if (options.layer.empty()) return {checkpoint.moe_layers().front()};
  if (options.layer == "all") return checkpoint.moe_layers();
  int layer = -1;
  const char* const end = options.layer.data() + options.layer.size();
  const auto [rest, error] = std::from_chars(options.layer.data(), end, layer);
  if (error != std::errc() || rest != end || layer < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--layer '{}' is neither a layer's index nor all", options.layer));
  }
  return {layer};
}

void check(const Options& options) {
  if (options.checkpoint.empty() == options.preset.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "give either --checkpoint or --preset");
  }
  if (!options.preset.empty() && !options.layer.empty()) {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("--layer {}: a preset has one layer; give --checkpoint", options.layer));
  }
  if (!options.preset.empty() && !options.original.empty()) {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("--original {}: a preset's original weights are known; give --checkpoint",
                    options.original));
  }
  if (options.layer == "all" && !options.replay.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "--replay holds the inputs of one layer; give its index as --layer, not all");
  }
  if (!options.budget.empty()) (void)parse_budget(options.budget);
  check_gate(options);
}

void accuracy(const Options& options, Output& output) {
  check(options);
  Json json = {{"command", "accuracy"}, {"version", version()}, {"backend", options.backend}};
  if (!options.preset.empty()) {
    Subject subject(options.preset, options.seed);
    json.update(certify_layer(options, subject));
  } else {
    const Checkpoint checkpoint = Checkpoint::open(options.checkpoint);
    std::optional<Checkpoint> original;
    if (!options.original.empty()) original.emplace(Checkpoint::open(options.original));
    std::vector<Json> layers;
    for (const int layer : layers_of(options, checkpoint)) {
      Subject subject(checkpoint, original ? &*original : nullptr, options.checkpoint, layer,
                      options.seed);
      layers.push_back(certify_layer(options, subject));
    }
    if (options.layer == "all") {
      json.update(report::join_layers(std::move(layers)));
      fmt::print("{}", report::layers_text(json));
    } else {
      json.update(layers.front());
    }
  }
  output.json = json;
  if (!options.html.empty()) write_html(options.html, json);
  output.exit_status = json.at("passed").get<bool>() ? 0 : 1;
}

}  // namespace

void add_accuracy(Command& program, Output& output) {
  Command command =
      program.add_subcommand("accuracy", "Measure what each rounding costs, recipe by recipe");
  const auto options = std::make_shared<Options>();
  command.add_option("--checkpoint", options->checkpoint, "Checkpoint directory")
      .existing_directory();
  command.add_option("--preset", options->preset, "Synthetic weights of this geometry instead");
  command
      .add_option("--original", options->original,
                  "Checkpoint that this one was quantized from, in any layout: total errors are "
                  "against its weights. Default: weights that round to these")
      .existing_directory();
  command.add_option("--layer", options->layer,
                     "Layer index, or all; default: the first with experts");
  command.add_option("--tokens", options->tokens, "Tokens per suite")
      .range(1, 1 << 20)
      .shows_default();
  command.add_option("--suite", options->suites, "all, or suites by name").comma_separated();
  command.add_option("--replay", options->replay, "Dump with x, topk_idx, topk_weights")
      .existing_file();
  command.add_option("--recipe", options->recipes, "all, or recipes by name").comma_separated();
  command.add_option("--backend", options->backend, "Where engines run: cpu | cuda")
      .one_of({"cpu", "cuda"})
      .shows_default();
  command.add_option("--ranks", options->ranks, "Ranks of the engines")
      .range(1, 1024)
      .shows_default();
  command.add_option("--budget", options->budget, "Fail if FP8 dispatch adds more, e.g. 2%");
  command.add_option("--gate", options->gate, "Recipe that --budget judges; default: direct");
  command.add_flag("--calibrate", options->calibrate,
                   "Static scales from each suite's calibration tokens, not the checkpoint");
  command.add_option("--html", options->html, "Write the report to FILE")
      .type_name("FILE")
      .writable_file();
  command.add_option("--seed", options->seed, "Seed of tokens and weights").shows_default();
  command.add_option("--threads", options->threads, "Worker threads; default: every core")
      .range(0, 1024);
  command.on_parsed([options, &output] { accuracy(*options, output); });
}

}  // namespace sluice::cli
