#include "convert/output_plan.h"

#include <utility>

#include "checkpoint/json_reader.h"
#include "core/fail.h"

namespace sluice {
namespace {

/// Fills shards in order; offsets are known only when all names are.
class PlanBuilder {
 public:
  PlanBuilder(const ExpertSpelling& spelling, std::size_t max_shard_bytes)
      : spelling_(spelling), max_shard_bytes_(max_shard_bytes) {}

  void add_expert(int layer, int expert, const std::vector<SafetensorsEntry>& tensors) {
    OutputJob& job = plan_.jobs.emplace_back();
    job.layer = layer, job.expert = expert;
    for (const SafetensorsEntry& t : tensors) {
      add_tensor(
          job, {.name = spelling_.name(layer, expert, t.name), .dtype = t.dtype, .shape = t.shape});
    }
  }

  /// Experts of a layer whose tensors lie one after the other in tensors [num_experts, ..].
  void add_layer(int layer, int num_experts, const std::vector<SafetensorsEntry>& tensors) {
    const std::size_t first = plan_.jobs.size();
    for (int e = 0; e < num_experts; ++e) {
      OutputJob& job = plan_.jobs.emplace_back();
      job.layer = layer, job.expert = e;
    }
    for (const SafetensorsEntry& t : tensors) {
      SafetensorsEntry all{
          .name = spelling_.name(layer, 0, t.name), .dtype = t.dtype, .shape = t.shape};
      all.shape.insert(all.shape.begin(), static_cast<std::uint64_t>(num_experts));
      const OutputPlace whole = add_entry(std::move(all));
      const std::uint64_t bytes = whole.bytes / static_cast<std::uint64_t>(num_experts);
      for (std::uint64_t e = 0; e < static_cast<std::uint64_t>(num_experts); ++e) {
        OutputJob& job = plan_.jobs[first + e];
        job.places.push_back({whole.shard, whole.tensor, e * bytes, bytes});
        job.bytes += bytes;
      }
    }
  }

  void add_copy(const TensorRef& tensor) {
    OutputJob& job = plan_.jobs.emplace_back();
    job.tensor = &tensor;
    add_tensor(
        job, {.name = tensor.entry.name, .dtype = tensor.entry.dtype, .shape = tensor.entry.shape});
  }

  [[nodiscard]] OutputPlan finish() && {
    const std::size_t count = files_.size();
    check_argument(count <= 99'999, "shards of {} bytes: {} are needed; at most 99999",
                   max_shard_bytes_, count);
    for (std::size_t i = 0; i < count; ++i) {
      OutputShard& shard = plan_.shards.emplace_back();
      shard.name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, count);
      shard.tensors = std::move(files_[i]);
      shard.header = make_safetensors_header(shard.tensors);
      shard.file_bytes = shard.header.size() + shard.tensors.back().end;
    }
    for (OutputJob& job : plan_.jobs) {
      for (OutputPlace& place : job.places) {
        const OutputShard& shard = plan_.shards[place.shard];
        place.offset += shard.header.size() + shard.tensors[place.tensor].begin;
      }
    }
    return std::move(plan_);
  }

 private:
  void add_tensor(OutputJob& job, SafetensorsEntry entry) {
    job.places.push_back(add_entry(std::move(entry)));
    job.bytes += job.places.back().bytes;
  }

  /// The whole tensor, at offset 0 until the files are laid out.
  OutputPlace add_entry(SafetensorsEntry entry) {
    std::uint64_t bytes = 1;
    for (const std::uint64_t dim : entry.shape) bytes *= dim;
    const auto bits = safetensors_dtype_bits(entry.dtype);
    if (!bits) {
      fail(ErrorCode::kUnsupported, "tensor {}: dtype '{}' cannot be copied", entry.name,
           entry.dtype);
    }
    bytes = bytes * static_cast<std::uint64_t>(*bits) / 8;
    if (files_.empty() || (used_ > 0 && used_ + bytes > max_shard_bytes_)) {
      files_.emplace_back(), used_ = 0;
    }
    used_ += bytes;
    plan_.bytes += bytes;
    files_.back().push_back(std::move(entry));
    return {.shard = files_.size() - 1,
            .tensor = files_.back().size() - 1,
            .offset = 0,
            .bytes = bytes};
  }

  ExpertSpelling spelling_;
  std::size_t max_shard_bytes_;
  OutputPlan plan_;
  std::vector<std::vector<SafetensorsEntry>> files_;
  std::uint64_t used_ = 0;
};

}  // namespace

std::string OutputPlan::index_text() const {
  std::string text = fmt::format("{{\n  \"metadata\": {{\"total_size\": {}}},\n", bytes);
  text += "  \"weight_map\": {";
  const char* separator = "\n";
  for (const OutputShard& shard : shards) {
    for (const SafetensorsEntry& t : shard.tensors) {
      text += fmt::format("{}    {}: \"{}\"", separator, json_string(t.name), shard.name);
      separator = ",\n";
    }
  }
  return text + "\n  }\n}\n";
}

std::uint64_t OutputPlan::digest() const {
  std::uint64_t digest = kDigestSeed;
  for (const OutputShard& shard : shards) {
    digest = digest_bytes(std::as_bytes(std::span(shard.name)), digest);
    digest = digest_bytes(std::as_bytes(std::span(shard.header)), digest);
  }
  return digest;
}

OutputPlan plan_output(const CheckpointData& source, const TargetFormat& target,
                       const TargetSpec& spec, const std::vector<int>& layers, bool experts_only,
                       std::size_t max_shard_bytes) {
  PlanBuilder builder(source.index.spelling, max_shard_bytes);
  const std::vector<SafetensorsEntry> tensors = target.tensors(spec);
  for (const int layer : layers) {
    if (target.is_fused()) {
      builder.add_layer(layer, spec.geometry.num_experts, tensors);
      continue;
    }
    for (int e = 0; e < spec.geometry.num_experts; ++e) builder.add_expert(layer, e, tensors);
  }
  if (!experts_only) {
    for (const TensorRef& tensor : source.index.others) builder.add_copy(tensor);
  }
  return std::move(builder).finish();
}

}  // namespace sluice
