// Writes a synthetic checkpoint: all sizes are known before the first byte, so files are laid out
// first and experts are then made in any order, by several threads, and written where they belong.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <nlohmann/json.hpp>
#include <span>
#include <thread>
#include <utility>

#include "checkpoint/safetensors.h"
#include "core/fail.h"
#include "core/write_text.h"
#include "files/file_write.h"
#include "files/output_dir.h"
#include "sluice/lab/synthetic.h"
#include "sluice/quant.h"
#include "synthetic/random_weights.h"
#include "synthetic/synthetic_formats.h"
#include "synthetic/synthetic_spelling.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;

/// One file to be written: its tensors, and where their bytes begin.
struct Shard {
  std::string name;
  std::string header;
  std::vector<SafetensorsEntry> tensors;
};

/// Where one tensor goes.
struct Place {
  std::size_t shard = 0, tensor = 0;
  std::uint64_t offset = 0;  // In the tensor, until the files are laid out.
};

void check_spec(const SyntheticCheckpoint& spec) {
  const ModelGeometry& g = spec.geometry;
  check_synthetic_format(spec);
  check_synthetic_spelling(spec);
  check_argument(g.num_experts >= 1 && g.num_experts <= 4096, "num_experts {} is outside [1, 4096]",
                 g.num_experts);
  check_argument(g.num_topk >= 1 && g.num_topk <= g.num_experts,
                 "num_topk {} is outside [1, {} experts]", g.num_topk, g.num_experts);
  for (const auto& [field, value] :
       {std::pair{"hidden", g.token_width()}, {"intermediate", g.inner_width()}}) {
    const int unit = g.group_size;  // Readers pad the rest of 128.
    check_argument(value >= unit && value % unit == 0 && value <= 1 << 17,
                   "{} {} is not a multiple of {} in [{}, {}]", field, value, unit, unit, 1 << 17);
  }
  check_argument(g.routed_scaling_factor > 0 && g.routed_scaling_factor < 1e6f,
                 "routed_scaling_factor {} is outside (0, 1e6)", g.routed_scaling_factor);
  check_argument(spec.first_layer >= 0 && spec.first_layer <= 10'000,
                 "first_layer {} is outside [0, 10000]", spec.first_layer);
  check_argument(spec.num_layers >= 1 && spec.num_layers <= 1000,
                 "num_layers {} is outside [1, 1000]", spec.num_layers);
  check_argument(spec.max_shard_bytes >= 1, "max_shard_bytes is 0");
}

std::uint64_t tensor_bytes(const SyntheticTensor& tensor) {
  std::uint64_t bits = static_cast<std::uint64_t>(*safetensors_dtype_bits(tensor.dtype));
  for (const std::uint64_t dim : tensor.shape) bits *= dim;
  return bits / 8;
}

class SyntheticWriter {
 public:
  SyntheticWriter(const SyntheticCheckpoint& spec, fs::path dir, const Progress& progress)
      : spec_(spec),
        dir_(std::move(dir)),
        progress_(progress),
        tensors_(synthetic_tensors(spec)),
        has_input_scales_(has_input_scales(spec)),
        input_scales_(num_jobs()) {
    plan_shards();
  }

  void write() {
    for (const Shard& shard : shards_) create_file(shard);
    for (int i = 0; i < spec_.num_layers && is_calibrated(); ++i) {
      calibrations_.emplace_back(spec_, spec_.first_layer + i);
    }
    run_workers();
    if (has_input_scales_ && spec_.format == "w4afp8") write_input_scales();
    write_json();
  }

 private:
  [[nodiscard]] std::size_t num_jobs() const {
    return static_cast<std::size_t>(spec_.num_layers) *
           static_cast<std::size_t>(spec_.geometry.num_experts);
  }

  [[nodiscard]] bool is_calibrated() const {
    return has_input_scales_ && !spec_.with_unit_input_scales;
  }
  void plan_shards();
  void create_file(const Shard& shard) const;
  void run_workers();
  void work(bool reports);
  void write_expert(std::size_t job, const SyntheticExpert& expert) const;
  void write_tensor(const Place& place, std::span<const std::byte> bytes) const;
  void write_input_scales() const;
  void write_json() const;

  const SyntheticCheckpoint& spec_;
  fs::path dir_;
  const Progress& progress_;
  std::vector<SyntheticTensor> tensors_;  // of one expert
  bool has_input_scales_;
  std::vector<Shard> shards_;
  std::vector<std::vector<Place>> places_;  // [job][tensors_]
  std::vector<Calibration> calibrations_;   // [layer]
  std::vector<InputScales> input_scales_;   // [job]
  std::atomic<std::size_t> next_job_{0}, done_jobs_{0};
  std::mutex mutex_;
  std::exception_ptr problem_;  // guarded by mutex_
};

void SyntheticWriter::plan_shards() {
  const ModelGeometry& g = spec_.geometry;
  std::vector<std::vector<SafetensorsEntry>> files(1);
  std::uint64_t used = 0;
  places_.resize(num_jobs());
  // Experts that share a tensor lie in it one after the other.
  const auto num_together = is_fused(spec_) ? static_cast<std::size_t>(g.num_experts) : 1;
  for (std::size_t job = 0; job < num_jobs(); job += num_together) {
    const auto per_layer = static_cast<std::size_t>(g.num_experts);
    const int layer = spec_.first_layer + static_cast<int>(job / per_layer);
    const int expert = is_fused(spec_) ? -1 : static_cast<int>(job % per_layer);
    for (const SyntheticTensor& tensor : tensors_) {
      const std::uint64_t one = tensor_bytes(tensor), size = num_together * one;
      if (used > 0 && used + size > spec_.max_shard_bytes) files.emplace_back(), used = 0;
      used += size;
      for (std::size_t i = 0; i < num_together; ++i) {
        places_[job + i].push_back(
            {.shard = files.size() - 1, .tensor = files.back().size(), .offset = i * one});
      }
      std::vector<std::uint64_t> shape = tensor.shape;
      if (is_fused(spec_)) shape.insert(shape.begin(), num_together);
      files.back().push_back({.name = synthetic_tensor_name(spec_, layer, expert, tensor.part),
                              .dtype = tensor.dtype,
                              .shape = std::move(shape)});
    }
  }
  check_argument(files.size() <= 99'999, "max_shard_bytes {} needs {} shards; at most 99999",
                 spec_.max_shard_bytes, files.size());
  for (std::size_t i = 0; i < files.size(); ++i) {
    Shard& shard = shards_.emplace_back();
    shard.name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, files.size());
    shard.tensors = std::move(files[i]);
    shard.header = make_safetensors_header(shard.tensors);
  }
  for (auto& parts : places_) {
    for (Place& place : parts) {
      const Shard& shard = shards_[place.shard];
      place.offset += shard.header.size() + shard.tensors[place.tensor].begin;
    }
  }
}

void SyntheticWriter::create_file(const Shard& shard) const {
  write_at(dir_ / shard.name, 0, std::as_bytes(std::span(shard.header)));
}

void SyntheticWriter::run_workers() {
  const unsigned num_cores = std::max(1U, std::thread::hardware_concurrency());
  const std::size_t num_threads = std::min<std::size_t>({num_cores, 8, num_jobs()});
  {
    std::vector<std::jthread> threads;
    for (std::size_t i = 1; i < num_threads; ++i) threads.emplace_back([this] { work(false); });
    work(true);
  }
  if (problem_) std::rethrow_exception(problem_);
  // The other threads may have taken every expert.
  if (progress_) progress_(1.0);
}

/// Takes experts until there are none. Only the calling thread `reports`.
void SyntheticWriter::work(bool reports) {
  try {
    SyntheticExpert expert;
    for (std::size_t job; (job = next_job_.fetch_add(1)) < num_jobs();) {
      const auto per_layer = static_cast<std::size_t>(spec_.geometry.num_experts);
      const std::size_t layer = job / per_layer;
      const int index = static_cast<int>(job % per_layer);
      fill_expert(spec_, spec_.first_layer + static_cast<int>(layer), index, expert);
      if (has_input_scales_) {
        input_scales_[job] = spec_.with_unit_input_scales
                                 ? InputScales{.w1 = 1, .w2 = 1, .w3 = 1}
                                 : calibrations_[layer].input_scales(index, expert);
      }
      write_expert(job, expert);
      const std::size_t done = done_jobs_.fetch_add(1) + 1;
      if (reports && progress_) {
        progress_(static_cast<double>(done) / static_cast<double>(num_jobs()));
      }
    }
  } catch (...) {
    const std::scoped_lock lock(mutex_);
    if (!problem_) problem_ = std::current_exception();
    next_job_ = num_jobs();
  }
}

void SyntheticWriter::write_tensor(const Place& place, std::span<const std::byte> bytes) const {
  write_at(dir_ / shards_[place.shard].name, place.offset, bytes);
}

void SyntheticWriter::write_expert(std::size_t job, const SyntheticExpert& expert) const {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const auto bytes = synthetic_bytes(tensors_[i], spec_, expert, input_scales_[job]);
    write_tensor(places_[job][i], bytes);
  }
}

void SyntheticWriter::write_input_scales() const {
  Shard shard{.name = "act_scales.safetensors", .header = {}, .tensors = {}};
  std::vector<float> values;
  for (std::size_t job = 0; job < num_jobs(); ++job) {
    const auto per_layer = static_cast<std::size_t>(spec_.geometry.num_experts);
    const int layer = spec_.first_layer + static_cast<int>(job / per_layer);
    const InputScales& s = input_scales_[job];
    for (const auto& [part, value] :
         {std::pair{"w1.input_scale", s.w1}, {"w2.input_scale", s.w2}, {"w3.input_scale", s.w3}}) {
      shard.tensors.push_back(
          {.name = synthetic_tensor_name(spec_, layer, static_cast<int>(job % per_layer), part),
           .dtype = "F32",
           .shape = {1}});
      values.push_back(value);
    }
  }
  shard.header = make_safetensors_header(shard.tensors);
  create_file(shard);
  write_at(dir_ / shard.name, shard.header.size(), std::as_bytes(std::span(values)));
}

void SyntheticWriter::write_json() const {
  const nlohmann::ordered_json config = synthetic_model_config(spec_);
  if (const auto algo = synthetic_algo_config(spec_); !algo.is_null()) {
    write_text(dir_ / "hf_quant_config.json", algo.dump(2) + "\n");
  }
  std::uint64_t total = 0;
  std::string text = "{\n  \"metadata\": {\"total_size\": ";
  for (const Shard& shard : shards_) total += shard.tensors.back().end;
  text += std::to_string(total) + "},\n  \"weight_map\": {";
  const char* separator = "\n";
  for (const Shard& shard : shards_) {
    for (const SafetensorsEntry& t : shard.tensors) {
      text += fmt::format("{}    \"{}\": \"{}\"", separator, t.name, shard.name);
      separator = ",\n";
    }
  }
  write_text(dir_ / "model.safetensors.index.json", text + "\n  }\n}\n");
  write_text(dir_ / "config.json", config.dump(2) + "\n");
}

/// A directory under construction beside its final place; removed unless it is moved there.
class PartialDirectory {
 public:
  explicit PartialDirectory(const fs::path& target)
      : path_(target.parent_path() /
              fmt::format(".{}.partial-{}", target.filename().string(), ::getpid())) {
    std::error_code problem;
    fs::create_directories(target.parent_path(), problem);
    if (!problem && !fs::create_directory(path_, problem) && !problem) {
      problem = std::make_error_code(std::errc::file_exists);
    }
    if (problem) {
      fail(ErrorCode::kIo, "{}: cannot create: {}", path_.string(), problem.message());
    }
  }
  ~PartialDirectory() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  PartialDirectory(const PartialDirectory&) = delete;
  PartialDirectory& operator=(const PartialDirectory&) = delete;

  [[nodiscard]] const fs::path& path() const noexcept { return path_; }

 private:
  fs::path path_;
};

/// Tensors of all experts, and a hundredth for headers, index and input scales.
std::uint64_t weight_bytes(const SyntheticCheckpoint& spec) {
  std::uint64_t bytes = 0;
  for (const SyntheticTensor& tensor : synthetic_tensors(spec)) bytes += tensor_bytes(tensor);
  bytes *= static_cast<std::uint64_t>(spec.geometry.num_experts) *
           static_cast<std::uint64_t>(spec.num_layers);
  return bytes + bytes / 100;
}

}  // namespace

void write_synthetic_checkpoint(const SyntheticCheckpoint& spec, const fs::path& dir,
                                const Progress& progress) {
  check_spec(spec);
  const fs::path target = checked_target(dir);
  const PartialDirectory partial(target);
  check_free_space(partial.path(), weight_bytes(spec));
  SyntheticWriter(spec, partial.path(), progress).write();
  move_to_target(partial.path(), target);
}

}  // namespace sluice
