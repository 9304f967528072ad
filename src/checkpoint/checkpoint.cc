#include "sluice/checkpoint.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <span>
#include <utility>

#include "checkpoint/checkpoint_impl.h"
#include "checkpoint/expert_storage.h"
#include "checkpoint/formats/part_readers.h"
#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

/// Refuses tensors of an expert that the format does not have: ignoring them could change results.
void check_nothing_else(const std::filesystem::path& dir, const Format& format,
                        const ModelGeometry& geometry, const LayerTensors& tensors) {
  std::vector<std::string> known;
  for (const MatrixLayout& matrix : matrix_layouts(geometry)) {
    for (PartSpec& spec : format.parts(matrix)) known.push_back(std::move(spec.name));
    known.push_back(format.input_scale_part(matrix));
  }
  for (const ExpertTensors& expert : tensors.experts) {
    for (const ExpertTensors::Part& part : expert.parts) {
      if (std::ranges::find(known, part.name) != known.end()) continue;
      fail(ErrorCode::kUnsupported, "{}: tensor {} {}", dir.string(), part.tensor.entry.name,
           format.refusal(part));
    }
  }
}

/// What follows reads the mapping.
void check_files_are_whole(const ExpertTensors& expert) {
  const MappedFile* last = nullptr;
  for (const ExpertTensors::Part& part : expert.parts) {
    if (part.tensor.file.get() != last) part.tensor.file->check_is_whole();
    last = part.tensor.file.get();
  }
}

}  // namespace

NibbleEvidence canonical_nibbles(const QuantMatrix& matrix) {
  constexpr std::size_t kBytesPerMatrix = std::size_t{1} << 15;
  return nibble_evidence(std::span(matrix.codes.as<std::byte>(), matrix.codes.bytes()),
                         kBytesPerMatrix);
}

void CheckpointData::check_nibbles(int layer, int expert, const NibbleEvidence& nibbles) const {
  if (nibbles.verdict != NibbleEvidence::Verdict::kOffset) return;
  fail(ErrorCode::kCorruptFile,
       "{}: {}: read as {}, codes near -8 and 7 occur {} times and those near 0 only {} times: its "
       "nibbles are not stored as the format says",
       dir.string(), index.spelling.name(layer, expert, "*"), format->name(), nibbles.around_8(),
       nibbles.around_0());
}

NibbleEvidence canonical_nibbles(const Expert& expert) {
  NibbleEvidence sum;
  for (const QuantMatrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
    sum.add(canonical_nibbles(*matrix));
  }
  return sum;
}

const LayerTensors& CheckpointData::layer_tensors(int layer) const {
  const auto at = index.layers.find(layer);
  if (at != index.layers.end()) return at->second;
  std::string list;
  for (const int l : moe_layers) list += (list.empty() ? "" : ", ") + std::to_string(l);
  const auto is_fused = index.fused.contains(layer);
  fail(is_fused ? ErrorCode::kUnsupported : ErrorCode::kInvalidArgument,
       "{}: layer {} has no routed experts; those that have: {}{}", dir.string(), layer, list,
       is_fused || !index.unread.empty() ? index.hint(layer) : "");
}

/// An optional part of one expert that its fellows lack would be read as if it said nothing there.
void CheckpointData::check_is_of_all(int layer, const PartSpec& spec) const {
  const LayerTensors& tensors = layer_tensors(layer);
  int with = -1, without = -1;
  for (int e = 0; e < config.geometry.num_experts; ++e) {
    (tensors.experts[static_cast<std::size_t>(e)].find(spec.name) ? with : without) = e;
  }
  if (with < 0 || without < 0) return;
  fail(ErrorCode::kUnsupported,
       "{}: tensor {} is missing, and {} is there; of a layer all experts have it, or none",
       dir.string(), index.spelling.name(layer, without, spec.name),
       index.spelling.name(layer, with, spec.name));
}

/// Headers only, of all experts: a checkpoint that lacks an expert of another rank is no good here.
void CheckpointData::check_layer(int layer) const {
  const LayerTensors& tensors = layer_tensors(layer);
  const ModelGeometry& g = config.geometry;
  if (const auto at = index.fused.find(layer); at != index.fused.end()) {
    fail(ErrorCode::kUnsupported, "{}: tensor {} is of all experts beside tensors of each{}",
         dir.string(), at->second, index.hint(layer));
  }
  if (const auto at = index.strays.find(layer); at != index.strays.end()) {
    fail(
        ErrorCode::kUnsupported,
        "{}: tensor {} lies among the routed experts and is not known; leaving it out could change "
        "results",
        dir.string(), at->second);
  }
  check_nothing_else(dir, *format, g, tensors);
  std::vector<std::pair<MatrixLayout, PartSpec>> specs;
  for (const MatrixLayout& matrix : matrix_layouts(g)) {
    for (PartSpec& spec : format->parts(matrix)) specs.emplace_back(matrix, std::move(spec));
  }
  for (int e = 0; e < g.num_experts; ++e) {
    const ExpertTensors& expert = tensors.experts[static_cast<std::size_t>(e)];
    for (const auto& [matrix, spec] : specs) {
      const TensorRef* const tensor = expert.find(spec.name);
      if (!tensor && !spec.is_optional) {
        const std::string name = index.spelling.name(layer, e, spec.name);
        const auto left_out = index.left_out.find(name);
        fail(ErrorCode::kUnsupported,
             "{}: tensor {} is missing; the config has {} experts per layer, and {} needs it{}",
             dir.string(), name, g.num_experts, format->name(),
             left_out == index.left_out.end()
                 ? "; complete the files, or correct config.json"
                 : fmt::format("; {} has it, but the index does not name it", left_out->second));
      }
      if (tensor) check_part(*tensor, spec, &matrix);
    }
  }
  for (const auto& [matrix, spec] : specs) {
    if (spec.changes_weights) check_is_of_all(layer, spec);
  }
}

CheckpointData CheckpointData::open(const std::filesystem::path& dir) {
  CheckpointData data;
  data.dir = dir;
  data.config = read_model_config(dir / "config.json");
  data.index = read_tensor_index(dir, data.config.geometry.num_experts);
  for (const auto& [layer, tensors] : data.index.layers) data.moe_layers.push_back(layer);
  if (data.moe_layers.empty()) {
    fail(ErrorCode::kUnsupported, "{}: no tensor named model.layers.L.mlp.experts.E.*{}",
         dir.string(), data.index.hint(-1));
  }
  Recognised recognised = recognise(
      {.config = data.config.quantization, .index = data.index, .geometry = data.config.geometry});
  data.format = std::move(recognised.format);
  data.unknown_quantization_keys = std::move(recognised.unknown_keys);
  check_widths(data.config, data.format->name(), data.format->group_size());
  data.config.geometry.group_size = data.format->group_size();
  data.config.geometry.has_bias = data.format->has_bias();
  if (const auto own = data.format->weight_format()) data.config.geometry.weight_format = *own;
  data.config.geometry.activation = data.config.activations.of(data.moe_layers.front());
  // One layer's tensors must bear out the config; every other is checked when it is loaded.
  const int first = data.moe_layers.front();
  data.check_layer(first);
  const std::string part = data.format->parts(matrix_layouts(data.config.geometry)[0])[0].name;
  const TensorRef& gate = part_of(data.index.layers.at(first).experts.front(), part);
  data.evidence = fmt::format("{}; {} is {} {}", recognised.evidence, gate.entry.name,
                              gate.entry.dtype, to_string(gate.entry.shape));
  data.identity = digest_bytes(std::as_bytes(std::span(data.config.text)), data.index.digest);
  data.warnings = data.index.warnings;
  std::ranges::move(config_warnings(data), std::back_inserter(data.warnings));
  return data;
}

void CheckpointData::check_range(int first, int count) const {
  check_argument(first >= 0 && count >= 1 && first <= config.geometry.num_experts - count,
                 "experts [{}, {}) are not all in [0, {})", first, std::int64_t{first} + count,
                 config.geometry.num_experts);
}

void CheckpointData::require_codes() const {
  if (format->weight_format()) return;
  fail(ErrorCode::kUnsupported,
       "{}: the experts are {}; runs need INT4, which `sluice convert --scale ...` makes of them",
       dir.string(), format->name());
}

Expert CheckpointData::load_expert(int layer, int expert, ExpertStorage& storage) const {
  const ExpertTensors& tensors = layer_tensors(layer).experts[static_cast<std::size_t>(expert)];
  check_files_are_whole(tensors);
  std::array<QuantMatrix, 3> matrices;
  std::size_t i = 0;
  for (const MatrixLayout& matrix : matrix_layouts(config.geometry)) {
    format->check_values(tensors, matrix);
    matrices[i] = format->load(tensors, matrix, storage);
    if (format->has_bias()) {
      const std::vector<float> bias = format->bias(tensors, matrix);
      const auto copy = allocate(storage, bias.size() * sizeof(float));
      std::memcpy(copy.data(), bias.data(), copy.size());
      matrices[i].bias = {copy.data(), DType::kFloat32, {matrix.n}};
    }
    ++i;
  }
  const Expert result = {.gate = matrices[0], .up = matrices[1], .down = matrices[2]};
  if (format->weight_format() == WeightFormat::kInt4) {
    check_nibbles(layer, expert, canonical_nibbles(result));
  }
  return result;
}

void CheckpointData::load_floats(int layer, int expert, const MatrixLayout& matrix,
                                 std::span<float> out) const {
  const ExpertTensors& tensors = layer_tensors(layer).experts[static_cast<std::size_t>(expert)];
  check_files_are_whole(tensors);
  format->check_values(tensors, matrix);
  if (!format->weight_format()) return format->load_floats(tensors, matrix, out);
  ExpertStorage storage;
  const QuantMatrix m = format->load_unscaled(tensors, matrix, storage);
  if (m.format == WeightFormat::kInt4) check_nibbles(layer, expert, canonical_nibbles(m));
  const std::vector<float> factors = format->input_factors(tensors, matrix);
  const auto* const codes = m.codes.as<std::uint8_t>();
  for (std::int64_t i = 0; i < matrix.n * matrix.k; ++i) {
    const std::int64_t g = i / m.group_size;
    float& w = out[static_cast<std::size_t>(i)];
    w = code_value(m.format, codes, i) * scale_value(m.scales, g);
    if (!factors.empty()) w *= factors[static_cast<std::size_t>(i % matrix.k)];
    if (std::isfinite(w)) continue;
    fail(ErrorCode::kCorruptFile, "{}: {} [{}, {}] = {} is not finite", dir.string(),
         index.spelling.name(layer, expert, matrix.stem()), i / matrix.k, i % matrix.k, w);
  }
}

std::vector<InputScales> CheckpointData::input_scales(int layer) const {
  const LayerTensors& tensors = layer_tensors(layer);
  const auto layouts = matrix_layouts(config.geometry);
  std::size_t num_present = 0;
  std::string missing;
  for (std::size_t e = 0; e < tensors.experts.size(); ++e) {
    for (const MatrixLayout& matrix : layouts) {
      const std::string part = format->input_scale_part(matrix);
      if (const TensorRef* const tensor = tensors.experts[e].find(part)) {
        check_part(*tensor, {.name = part, .dtypes = {"F32", "BF16", "F16"}, .shape = {}});
        ++num_present;
      } else if (missing.empty()) {
        missing = index.spelling.name(layer, static_cast<int>(e), part);
      }
    }
  }
  if (num_present == 0) return {};
  if (!missing.empty()) {
    fail(ErrorCode::kUnsupported,
         "{}: tensor {} is missing, though {} of the layer's {} input scales are there",
         dir.string(), missing, num_present, tensors.experts.size() * layouts.size());
  }
  std::vector<InputScales> scales;
  scales.reserve(tensors.experts.size());
  for (const ExpertTensors& expert : tensors.experts) {
    scales.push_back({.w1 = format->input_scale(expert, layouts[0]),
                      .w2 = format->input_scale(expert, layouts[2]),
                      .w3 = format->input_scale(expert, layouts[1])});
  }
  return scales;
}

Checkpoint Checkpoint::open(const std::filesystem::path& dir) {
  return Checkpoint(std::make_unique<Impl>(Impl{CheckpointData::open(dir)}));
}

Checkpoint::Checkpoint(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

const std::filesystem::path& Checkpoint::path() const noexcept {
  return impl_->dir;
}
std::string Checkpoint::format() const {
  return std::string(impl_->format->name());
}
const std::string& Checkpoint::format_evidence() const noexcept {
  return impl_->evidence;
}
std::optional<WeightFormat> Checkpoint::weight_format() const noexcept {
  return impl_->format->weight_format();
}
const ModelGeometry& Checkpoint::geometry() const noexcept {
  return impl_->config.geometry;
}
ActivationFn Checkpoint::activation(int layer) const {
  (void)impl_->layer_tensors(layer);
  return impl_->config.activations.of(layer);
}
const std::vector<int>& Checkpoint::moe_layers() const noexcept {
  return impl_->moe_layers;
}
std::uint64_t Checkpoint::identity() const noexcept {
  return impl_->identity;
}

const std::vector<CheckpointWarning>& Checkpoint::warnings() const noexcept {
  return impl_->warnings;
}

std::vector<InputScales> Checkpoint::input_scales(int layer) const {
  return impl_->input_scales(layer);
}

std::optional<StaticScales> Checkpoint::static_scales(int layer) const {
  const std::vector<InputScales> all = input_scales(layer);
  if (all.empty()) return std::nullopt;
  StaticScales result;
  for (const InputScales& s : all) {
    result.s1 = std::max({result.s1, s.w1, s.w3});
    result.s2 = std::max(result.s2, s.w2);
  }
  return result;
}

void Checkpoint::check(int layer) const {
  impl_->check_layer(layer);
  (void)activation(layer);
  (void)input_scales(layer);
}

void Checkpoint::load_floats(int layer, int expert, MatrixRole role, std::span<float> out) const {
  const LayerTensors& tensors = impl_->layer_tensors(layer);
  impl_->check_range(expert, 1);
  impl_->check_layer(layer);
  const MatrixLayout matrix = matrix_layouts(impl_->geometry())[static_cast<std::size_t>(role)];
  check_argument(out.size() == static_cast<std::size_t>(matrix.n * matrix.k),
                 "{} floats for {} [{}, {}]", out.size(), matrix.stem(), matrix.n, matrix.k);
  impl_->load_floats(layer, expert, matrix, out);
  for (const auto& part : tensors.experts[static_cast<std::size_t>(expert)].parts) {
    part.tensor.release();
  }
}

ExpertWeights Checkpoint::load_experts(int layer, int first_expert, int num_experts) const {
  (void)impl_->layer_tensors(layer);
  impl_->check_range(first_expert, num_experts);
  impl_->require_codes();
  impl_->check_layer(layer);

  auto storage = std::make_unique<ExpertStorage>();
  ExpertWeights weights;
  weights.layer = layer;
  weights.first_expert = first_expert;
  weights.geometry = impl_->config.geometry;
  weights.geometry.activation = impl_->config.activations.of(layer);
  weights.static_scales = static_scales(layer);
  const auto layouts = matrix_layouts(impl_->geometry());
  for (int e = first_expert; e < first_expert + num_experts; ++e) {
    const Expert own = impl_->load_expert(layer, e, *storage);
    weights.experts.push_back({.gate = padded(own.gate, layouts[0], *storage),
                               .up = padded(own.up, layouts[1], *storage),
                               .down = padded(own.down, layouts[2], *storage)});
  }
  const ExpertStorage* const raw = storage.release();
  weights.storage = std::shared_ptr<const void>(raw, ExpertStorageDeleter{raw});
  return weights;
}

}  // namespace sluice
