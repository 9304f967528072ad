// sluice accuracy - what each rounding costs, recipe by recipe, with proof, gate and report.
#include <fmt/core.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>

#include "accuracy_json.h"
#include "accuracy_report.h"
#include "command.h"
#include "sluice/accuracy.h"
#include "sluice/config.h"
#include "sluice/error.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string checkpoint, preset, replay, budget, html, gate = "direct";
  std::vector<std::string> suites = {"all"}, recipes = {"all"};
  int layer = -1, ranks = 4, threads = 0;
  std::int64_t tokens = 32;
  std::uint64_t seed = 1;
  bool calibrate = false;
};

/// Weights, and a checkpoint on which engines can run the identity proof. A preset has no files:
/// its proof runs on a narrow stand-in, because GEMM1's input does not depend on the weights.
class Subject {
 public:
  explicit Subject(const Options& options) : seed_(options.seed) {
    if (options.preset.empty()) {
      checkpoint_.emplace(Checkpoint::open(options.checkpoint));
      layer_ = options.layer < 0 ? checkpoint_->moe_layers().front() : options.layer;
      source_ = make_checkpoint_source(*checkpoint_, layer_, options.seed);
      description_ = fmt::format("checkpoint {}, layer {} ({})", options.checkpoint, layer_,
                                 checkpoint_->format());
    } else {
      source_ = make_synthetic_source(preset_geometry(options.preset), options.seed);
      description_ = "preset " + options.preset;
    }
  }
  ~Subject() {
    std::error_code ignored;
    if (!stand_in_.empty()) std::filesystem::remove_all(stand_in_, ignored);
  }
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;

  [[nodiscard]] const LayerSource& source() const { return *source_; }
  [[nodiscard]] const std::string& description() const { return description_; }
  [[nodiscard]] int layer() const { return layer_; }
  [[nodiscard]] const Checkpoint* checkpoint() const {
    return checkpoint_ && stand_in_.empty() ? &*checkpoint_ : nullptr;
  }
  [[nodiscard]] const Checkpoint& engine_checkpoint() {
    if (!checkpoint_) {
      std::string pattern =
          (std::filesystem::temp_directory_path() / "sluice-accuracy-XXXXXX").string();
      if (!mkdtemp(pattern.data())) {
        throw Error(ErrorCode::kIo, "cannot make a directory like " + pattern);
      }
      stand_in_ = pattern;
      SyntheticCheckpoint spec;
      spec.geometry = source_->geometry();
      spec.geometry.intermediate = 128;
      spec.seed = seed_;
      spec.with_input_scales = false;
      write_synthetic_checkpoint(spec, stand_in_ / "checkpoint");
      checkpoint_.emplace(Checkpoint::open(stand_in_ / "checkpoint"));
      layer_ = checkpoint_->moe_layers().front();
    }
    return *checkpoint_;
  }

 private:
  std::uint64_t seed_;
  int layer_ = 0;
  std::optional<Checkpoint> checkpoint_;
  std::unique_ptr<LayerSource> source_;
  std::filesystem::path stand_in_;
  std::string description_;
};

/// "2%" or "2": per cent.
double parse_budget(const std::string& text) {
  char* end = nullptr;
  const double percent = std::strtod(text.c_str(), &end);
  const std::string rest = end;
  if (end == text.c_str() || (!rest.empty() && rest != "%") || !(percent >= 0 && percent <= 1e6)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--budget '{}' is not a percentage such as 2%", text));
  }
  return percent;
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
  if (options.recipes != std::vector<std::string>{"all"}) {
    for (const std::string& name : options.recipes) config.recipes.push_back(parse_recipe(name));
  }
  if (const Checkpoint* checkpoint = subject.checkpoint()) {
    config.expert_scales = checkpoint->input_scales(subject.layer());
    if (!options.calibrate) config.static_scales = checkpoint->static_scales(subject.layer());
  }
  return config;
}

std::string percent(double ratio) {
  return ratio != 0 && ratio < 1e-4 ? fmt::format("{:.1e}", ratio * 100)
                                    : fmt::format("{:.3f}", ratio * 100);
}

void print_suite(const SuiteCertificate& suite) {
  fmt::print("\n{}: {} tokens, {} rows; all numbers in per cent unless they say otherwise\n",
             suite.name, suite.num_tokens, suite.num_rows);
  Table errors({"recipe", "activation", "output", "worst token", "p99 channel", "SQNR dB", "total",
                "adds", "saturated", "underflowed"});
  Table alone({"each rounding", "weights", "activation 1", "activation 2", "accumulation",
               "combine", "together", "root sum sq"});
  for (const RecipeCertificate& r : suite.recipes) {
    const std::string name = to_string(r.name);
    if (!r.refused.empty()) {
      errors.add({name, "refused"});
      continue;
    }
    errors.add({name, percent(r.activation1.relative_l2), percent(r.output.relative_l2),
                fmt::format("{} (#{})", percent(r.output.worst_token_error), r.output.worst_token),
                percent(r.output.p99_channel_error), fmt::format("{:.2f}", r.output.sqnr_db),
                r.total ? percent(r.total->relative_l2) : "-",
                r.added_percent ? fmt::format("{:+.2f}", *r.added_percent) : "-",
                fmt::format("{} + {}", r.cast1.saturated, r.cast2.saturated),
                fmt::format("{} + {}", r.cast1.underflowed, r.cast2.underflowed)});
    const RoundingErrors& e = r.roundings;
    alone.add({name, e.weights ? percent(*e.weights) : "-", percent(e.activation1),
               percent(e.activation2), percent(e.accumulation), percent(e.combine),
               percent(e.together), percent(e.quadrature)});
  }
  fmt::print("{}\n{}", errors.to_string(), alone.to_string());
  const ScaleSafety& s = suite.safety;
  fmt::print("scales    {}: s1 {:.4g} headroom {:.2f}x, s2 {:.4g} headroom {:.2f}x: {}\n", s.origin,
             s.scales.s1, s.headroom1, s.scales.s2, s.headroom2, s.recommendation);
}

bool prove(const Options& options, Subject& subject, const std::vector<TokenSuite>& suites,
           Output& output) {
  bool passed = true;
  output.json["identity"] = nlohmann::ordered_json::array();
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    const Checkpoint& checkpoint = subject.engine_checkpoint();
    const IdentityProof proof =
        prove_identity(checkpoint, subject.layer(), suites, options.ranks, mode);
    fmt::print(
        "identity  {}, {} ranks, {} tokens: GEMM1 input of direct {:016x}, direct-bf16 {:016x}, "
        "definition {:016x}: {}\n",
        to_string(mode), proof.num_ranks, proof.num_tokens, proof.direct, proof.direct_bf16,
        proof.definition, proof.passed() ? "the same bytes: PASS" : "DIFFERENT: FAIL");
    output.json["identity"].push_back(to_json(proof));
    passed = passed && proof.passed();
  }
  return passed;
}

bool judge(const Options& options, const std::vector<SuiteCertificate>& certificates,
           Output& output) {
  if (options.budget.empty()) return true;
  const BudgetVerdict verdict =
      judge_budget(certificates, parse_recipe(options.gate), parse_budget(options.budget));
  fmt::print(
      "budget    FP8 dispatch ({}) adds {:.2f} % to the layer's total error (worst suite {}), "
      "budget {:g} %: {}\n",
      to_string(verdict.recipe), verdict.worst_percent, verdict.worst_suite, verdict.budget_percent,
      verdict.passed ? "PASS" : "FAIL");
  output.json["budget"] = to_json(verdict);
  return verdict.passed;
}

void write_html(const std::string& path, const nlohmann::ordered_json& json) {
  std::ofstream file(path);
  file << accuracy_report(json);
  if (!file.flush()) throw Error(ErrorCode::kIo, "cannot write --html " + path);
  fmt::print("report    {}\n", path);
}

void check(const Options& options) {
  if (options.checkpoint.empty() == options.preset.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "give either --checkpoint or --preset");
  }
  if (!options.budget.empty()) (void)parse_budget(options.budget);
  (void)parse_recipe(options.gate);
}

void accuracy(const Options& options, Output& output) {
  check(options);
  Subject subject(options);
  const ModelGeometry& g = subject.source().geometry();
  const std::vector<TokenSuite> suites = make_suites(options, g);
  AccuracyConfig config = make_config(options, subject);
  fmt::print("layer     {}: {} experts, top-{}, hidden {}, intermediate {}, group {}\n",
             subject.description(), g.num_experts, g.num_topk, g.hidden, g.intermediate,
             g.group_size);
  fmt::print("original  {}\n", subject.source().original_kind());

  auto& json = output.json;
  json = {{"command", "accuracy"},
          {"version", version()},
          {"source", subject.description()},
          {"original_weights", subject.source().original_kind()},
          {"geometry",
           {{"num_experts", g.num_experts},
            {"num_topk", g.num_topk},
            {"hidden", g.hidden},
            {"intermediate", g.intermediate},
            {"group_size", g.group_size}}},
          {"tokens", options.tokens},
          {"seed", options.seed},
          {"suites", nlohmann::ordered_json::array()}};
  std::vector<SuiteCertificate> certificates;
  for (const TokenSuite& suite : suites) {
    ProgressLine progress("evaluating " + suite.name);
    config.progress = [&](double fraction) { progress.update(fraction); };
    certificates.push_back(certify(subject.source(), suite, config));
    json["suites"].push_back(to_json(certificates.back()));
  }
  for (const SuiteCertificate& certificate : certificates) print_suite(certificate);
  fmt::print("\n");
  const bool identical = prove(options, subject, suites, output);
  const bool within_budget = judge(options, certificates, output);
  json["passed"] = identical && within_budget;
  if (!options.html.empty()) write_html(options.html, json);
  output.exit_status = identical && within_budget ? 0 : 1;
}

}  // namespace

void add_accuracy(CLI::App& app, Output& output) {
  CLI::App* command =
      app.add_subcommand("accuracy", "Measure what each rounding costs, recipe by recipe");
  const auto options = std::make_shared<Options>();
  command->add_option("--checkpoint", options->checkpoint, "Checkpoint directory")
      ->check(CLI::ExistingDirectory);
  command->add_option("--preset", options->preset, "Synthetic weights of this geometry instead");
  command->add_option("--layer", options->layer, "Layer index; default: the first with experts")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--tokens", options->tokens, "Tokens per suite")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--suite", options->suites, "all, or suites by name")->delimiter(',');
  command->add_option("--replay", options->replay, "Dump with x, topk_idx, topk_weights")
      ->check(CLI::ExistingFile);
  command->add_option("--recipe", options->recipes, "all, or recipes by name")->delimiter(',');
  command->add_option("--ranks", options->ranks, "Ranks of the identity proof")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--budget", options->budget, "Fail if FP8 dispatch adds more, e.g. 2%");
  command->add_option("--gate", options->gate, "Recipe the budget judges")->capture_default_str();
  command->add_flag("--calibrate", options->calibrate,
                    "Static scales from each suite's calibration tokens, not the checkpoint");
  command->add_option("--html", options->html, "Write the report to FILE")->type_name("FILE");
  command->add_option("--seed", options->seed, "Seed of tokens and weights")->capture_default_str();
  command->add_option("--threads", options->threads, "Worker threads; default: every core")
      ->check(CLI::Range(0, 1024));
  command->callback([options, &output] { accuracy(*options, output); });
}

}  // namespace sluice::cli
