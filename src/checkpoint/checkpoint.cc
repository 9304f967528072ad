#include "sluice/checkpoint.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <span>
#include <utility>

#include "checkpoint/checkpoint_impl.h"
#include "checkpoint/expert_storage.h"
#include "checkpoint/model_config.h"
#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

/// Says where a tensor is, for messages: "DIR/model-00001-of-00002.safetensors: tensor NAME".
std::string place(const TensorRef& tensor) {
  return fmt::format("{}: tensor {}", tensor.file->path().string(), tensor.entry.name);
}

void check_shape(const TensorRef& tensor, std::initializer_list<std::uint64_t> expected) {
  if (std::ranges::equal(tensor.entry.shape, expected)) return;
  const std::vector<std::uint64_t> limit = expected;
  fail(ErrorCode::kCorruptFile, "{}: shape {}, but the config's sizes need {}", place(tensor),
       to_string(tensor.entry.shape), to_string(limit));
}

void check_dtype(const TensorRef& tensor, std::initializer_list<std::string_view> allowed) {
  if (std::ranges::find(allowed, tensor.entry.dtype) != allowed.end()) return;
  std::string list;
  for (const std::string_view name : allowed)
    list += (list.empty() ? "" : " or ") + std::string(name);
  fail(ErrorCode::kCorruptFile, "{}: dtype {}, not {}", place(tensor), tensor.entry.dtype, list);
}

/// One matrix of an expert: which tensors, and how large.
struct MatrixLayout {
  ExpertPart weight, scale;
  int n, k;
};

std::array<MatrixLayout, 3> matrix_layouts(const ModelGeometry& g) {
  return {MatrixLayout{ExpertPart::kGateWeight, ExpertPart::kGateScale, g.intermediate, g.hidden},
          MatrixLayout{ExpertPart::kUpWeight, ExpertPart::kUpScale, g.intermediate, g.hidden},
          MatrixLayout{ExpertPart::kDownWeight, ExpertPart::kDownScale, g.hidden, g.intermediate}};
}

const TensorRef& part_of(const ExpertTensors& expert, ExpertPart part) {
  return expert[static_cast<std::size_t>(part)];
}

float read_scalar(const TensorRef& tensor) {
  if (tensor.entry.dtype == "F32") {
    float value;
    std::memcpy(&value, tensor.bytes().data(), sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, tensor.bytes().data(), sizeof bits);
  return bf16_to_float(bits);
}

float read_input_scale(const TensorRef& tensor) {
  check_dtype(tensor, {"F32", "BF16"});
  if (!tensor.entry.shape.empty()) check_shape(tensor, {1});
  const float value = read_scalar(tensor);
  if (!std::isfinite(value) || value <= 0) {
    fail(ErrorCode::kCorruptFile, "{}: input scale {} is not a positive finite number",
         place(tensor), value);
  }
  return value;
}

/// Index of the first element that is not finite and positive; -1 if there is none. Bits of such
/// numbers are 1 .. (infinity - 1), whatever their width.
template <class Bits, Bits kInfinity>
std::int64_t find_bad_scale(const Bits* bits, std::int64_t count) noexcept {
  const auto is_bad = [](Bits b) {
    return static_cast<Bits>(b - 1) >= static_cast<Bits>(kInfinity - 1);
  };
  constexpr std::int64_t kBlock = 4096;
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, count);
    unsigned any = 0;
    for (std::int64_t i = begin; i < end; ++i) any |= static_cast<unsigned>(is_bad(bits[i]));
    if (!any) continue;
    for (std::int64_t i = begin; i < end; ++i) {
      if (is_bad(bits[i])) return i;
    }
  }
  return -1;
}

void check_scales(const TensorRef& tensor, const TensorView& view) {
  const std::int64_t count = view.shape.num_elements();
  const bool is_f32 = view.dtype == DType::kFloat32;
  const std::int64_t bad =
      is_f32 ? find_bad_scale<std::uint32_t, 0x7f800000>(view.as<std::uint32_t>(), count)
             : find_bad_scale<std::uint16_t, 0x7f80>(view.as<std::uint16_t>(), count);
  if (bad < 0) return;
  const float value = is_f32 ? view.as<float>()[bad] : bf16_to_float(view.as<std::uint16_t>()[bad]);
  fail(ErrorCode::kCorruptFile, "{}: scale [{}, {}] = {} is not a positive finite number",
       place(tensor), bad / view.dim(1), bad % view.dim(1), value);
}

/// Points into the file, or to a copy if the scales lie misaligned there.
TensorView view_scales(const TensorRef& tensor, int n, int groups, ExpertStorage& storage) {
  const DType dtype = tensor.entry.dtype == "F32" ? DType::kFloat32 : DType::kBFloat16;
  const auto bytes = tensor.bytes();
  const void* data = bytes.data();
  if (reinterpret_cast<std::uintptr_t>(data) % size_bytes(dtype) != 0) {
    auto copy = std::make_unique<std::byte[]>(bytes.size());
    std::memcpy(copy.get(), bytes.data(), bytes.size());
    data = copy.get();
    storage.copies.push_back(std::move(copy));
  }
  return {data, dtype, {n, groups}};
}

void keep_file(ExpertStorage& storage, const TensorRef& tensor) {
  if (std::ranges::find(storage.files, tensor.file) == storage.files.end()) {
    storage.files.push_back(tensor.file);
  }
}

Int4Matrix load_matrix(const ExpertTensors& expert, const MatrixLayout& layout, int group_size,
                       ExpertStorage& storage) {
  const TensorRef& weight = part_of(expert, layout.weight);
  const TensorRef& scale = part_of(expert, layout.scale);
  MappedFile::will_need(scale.bytes());
  MappedFile::will_need(weight.bytes());
  keep_file(storage, weight);
  keep_file(storage, scale);
  Int4Matrix matrix;
  matrix.group_size = group_size;
  matrix.codes = {weight.bytes().data(), DType::kPackedInt4, {layout.n, layout.k / 2}};
  matrix.scales = view_scales(scale, layout.n, layout.k / group_size, storage);
  check_scales(scale, matrix.scales);
  return matrix;
}

}  // namespace

const LayerTensors& Checkpoint::Impl::layer_tensors(int layer) const {
  const auto at = index.layers.find(layer);
  if (at != index.layers.end()) return at->second;
  std::string list;
  for (const int l : moe_layers) list += (list.empty() ? "" : ", ") + std::to_string(l);
  fail(ErrorCode::kInvalidArgument, "{}: layer {} has no routed experts; those that have: {}",
       dir.string(), layer, list);
}

/// Headers only, of all experts: a checkpoint that lacks an expert of another rank is no good here.
void Checkpoint::Impl::check_layer(int layer) const {
  const LayerTensors& tensors = layer_tensors(layer);
  const ModelGeometry& g = config.geometry;
  if (!tensors.unknown_parts.empty()) {
    fail(ErrorCode::kUnsupported,
         "{}: tensor {} is not part of {}; ignoring it could change results", dir.string(),
         tensors.unknown_parts.front(), config.format);
  }
  const auto layouts = matrix_layouts(g);
  for (int e = 0; e < g.num_experts; ++e) {
    const ExpertTensors& expert = tensors.experts[static_cast<std::size_t>(e)];
    for (const MatrixLayout& layout : layouts) {
      for (const ExpertPart part : {layout.weight, layout.scale}) {
        if (part_of(expert, part).exists()) continue;
        fail(ErrorCode::kCorruptFile,
             "{}: tensor {} is missing; the config has {} experts per layer", dir.string(),
             tensor_name(layer, e, part), g.num_experts);
      }
      const auto n = static_cast<std::uint64_t>(layout.n), k = static_cast<std::uint64_t>(layout.k);
      const auto group = static_cast<std::uint64_t>(g.group_size);
      check_dtype(part_of(expert, layout.weight), {"I8", "U8"});
      check_shape(part_of(expert, layout.weight), {n, k / 2});
      check_dtype(part_of(expert, layout.scale), {"F32", "BF16"});
      check_shape(part_of(expert, layout.scale), {n, k / group});
    }
  }
}

Checkpoint Checkpoint::open(const std::filesystem::path& dir) {
  auto impl = std::make_unique<Impl>();
  impl->dir = dir;
  impl->config = read_model_config(dir);
  impl->index = read_tensor_index(dir, impl->config.geometry.num_experts);
  for (const auto& [layer, tensors] : impl->index.layers) impl->moe_layers.push_back(layer);
  if (impl->moe_layers.empty()) {
    fail(ErrorCode::kCorruptFile, "{}: no tensor named model.layers.L.mlp.experts.E.*; {}",
         dir.string(), impl->config.evidence);
  }
  // One layer's tensors must bear out the config; every other is checked when it is loaded.
  impl->check_layer(impl->moe_layers.front());
  const int first = impl->moe_layers.front();
  const TensorRef& gate =
      part_of(impl->index.layers.at(first).experts.front(), ExpertPart::kGateWeight);
  impl->evidence = fmt::format("{}; {} is {} {}", impl->config.evidence, gate.entry.name,
                               gate.entry.dtype, to_string(gate.entry.shape));
  impl->identity = digest_bytes(std::as_bytes(std::span(impl->config.text)), impl->index.digest);
  return Checkpoint(std::move(impl));
}

Checkpoint::Checkpoint(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

const std::filesystem::path& Checkpoint::path() const noexcept {
  return impl_->dir;
}
const std::string& Checkpoint::format() const noexcept {
  return impl_->config.format;
}
const std::string& Checkpoint::format_evidence() const noexcept {
  return impl_->evidence;
}
const ModelGeometry& Checkpoint::geometry() const noexcept {
  return impl_->config.geometry;
}
const std::vector<int>& Checkpoint::moe_layers() const noexcept {
  return impl_->moe_layers;
}
std::uint64_t Checkpoint::identity() const noexcept {
  return impl_->identity;
}

std::vector<InputScales> Checkpoint::input_scales(int layer) const {
  const LayerTensors& tensors = impl_->layer_tensors(layer);
  constexpr std::array kParts = {ExpertPart::kW1InputScale, ExpertPart::kW2InputScale,
                                 ExpertPart::kW3InputScale};
  std::size_t num_present = 0;
  std::string missing;
  for (std::size_t e = 0; e < tensors.experts.size(); ++e) {
    for (const ExpertPart part : kParts) {
      if (part_of(tensors.experts[e], part).exists()) {
        ++num_present;
      } else if (missing.empty()) {
        missing = tensor_name(layer, static_cast<int>(e), part);
      }
    }
  }
  if (num_present == 0) return {};
  if (!missing.empty()) {
    fail(ErrorCode::kCorruptFile,
         "{}: tensor {} is missing, though {} of the layer's {} input scales are there",
         impl_->dir.string(), missing, num_present, tensors.experts.size() * kParts.size());
  }
  std::vector<InputScales> scales;
  scales.reserve(tensors.experts.size());
  for (const ExpertTensors& expert : tensors.experts) {
    scales.push_back({.w1 = read_input_scale(part_of(expert, ExpertPart::kW1InputScale)),
                      .w2 = read_input_scale(part_of(expert, ExpertPart::kW2InputScale)),
                      .w3 = read_input_scale(part_of(expert, ExpertPart::kW3InputScale))});
  }
  return scales;
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
  (void)input_scales(layer);
}

ExpertWeights Checkpoint::load_experts(int layer, int first_expert, int num_experts) const {
  const LayerTensors& tensors = impl_->layer_tensors(layer);
  const ModelGeometry& g = impl_->config.geometry;
  check_argument(
      first_expert >= 0 && num_experts >= 1 && first_expert <= g.num_experts - num_experts,
      "experts [{}, {} + {}) are not all in [0, {})", first_expert, first_expert, num_experts,
      g.num_experts);
  impl_->check_layer(layer);

  auto storage = std::make_unique<ExpertStorage>();
  ExpertWeights weights;
  weights.layer = layer;
  weights.first_expert = first_expert;
  weights.geometry = g;
  weights.static_scales = static_scales(layer);
  const auto layouts = matrix_layouts(g);
  for (int e = first_expert; e < first_expert + num_experts; ++e) {
    const ExpertTensors& expert = tensors.experts[static_cast<std::size_t>(e)];
    weights.experts.push_back({.gate = load_matrix(expert, layouts[0], g.group_size, *storage),
                               .up = load_matrix(expert, layouts[1], g.group_size, *storage),
                               .down = load_matrix(expert, layouts[2], g.group_size, *storage)});
  }
  const ExpertStorage* const raw = storage.release();
  weights.storage = std::shared_ptr<const void>(raw, ExpertStorageDeleter{raw});
  return weights;
}

}  // namespace sluice
