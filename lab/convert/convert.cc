// The conversion itself: options are resolved and refused first, then every byte has its place,
// then experts are made one after the other, and the finished directory takes its name.
#include "sluice/lab/convert.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <string_view>
#include <utility>

#include "checkpoint/checkpoint_impl.h"
#include "convert/journal.h"
#include "convert/other_files.h"
#include "convert/output_plan.h"
#include "convert/quantize_weights.h"
#include "convert/resolve.h"
#include "convert/source_sample.h"
#include "convert/target_format.h"
#include "convert/verify.h"
#include "core/fail.h"
#include "core/regular_file.h"
#include "core/threads.h"
#include "core/write_text.h"
#include "files/file_write.h"
#include "files/output_dir.h"
#include "files/work_lock.h"
#include "sluice/config.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;

constexpr const char* kIndexName = "model.safetensors.index.json";
/// Read and written in pieces of this size.
constexpr std::size_t kPieceBytes = std::size_t{8} << 20;

/// float32 or bf16 scales of an exact conversion. Throws: kUnsupported for one that bf16 rounds.
TensorView exact_scales(const TensorView& scales, DType dtype, const std::string& matrix,
                        ExpertStorage& storage) {
  if (scales.dtype == dtype) return scales;
  const auto count = static_cast<std::size_t>(scales.shape.num_elements());
  storage.copies.push_back(std::unique_ptr<std::byte[]>(new std::byte[count * size_bytes(dtype)]));
  void* const data = storage.copies.back().get();
  for (std::size_t i = 0; i < count; ++i) {
    if (dtype == DType::kFloat32) {
      static_cast<float*>(data)[i] = bf16_to_float(scales.as<std::uint16_t>()[i]);
      continue;
    }
    const float value = scales.as<float>()[i];
    const std::uint16_t rounded = bf16_from_float(value);
    if (bf16_to_float(rounded) != value) {
      const auto columns = static_cast<std::size_t>(scales.dim(1));
      fail(
          ErrorCode::kUnsupported,
          "{}: scale [{}, {}] = {} is not a bfloat16 ({} is the nearest); float32 scales are exact",
          matrix, i / columns, i % columns, value, bf16_to_float(rounded));
    }
    static_cast<std::uint16_t*>(data)[i] = rounded;
  }
  return {data, dtype, scales.shape};
}

/// Codes and scales of one quantized matrix.
struct QuantizedMatrix {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
  std::vector<std::uint16_t> bf16;
};

class Converter {
 public:
  Converter(const ConvertOptions& options, const CheckpointData& source, fs::path target_dir,
            const Progress& progress)
      : options_(options),
        source_(source),
        target_(make_target_format(options.format)),
        resolved_(resolve_conversion(options, source, *target_)),
        plan_(plan_output(source, *target_, resolved_.spec, resolved_.layers, options.experts_only,
                          options.max_shard_bytes)),
        target_dir_(std::move(target_dir)),
        work_dir_(target_dir_.parent_path() /
                  fmt::format(".{}.converting", target_dir_.filename().string())),
        progress_(progress),
        pool_(static_cast<int>(available_cores().size()), available_cores()) {}

  ConvertReport run() {
    std::error_code problem;  // Then WorkLock cannot make it, and says why.
    const bool is_new = !fs::exists(work_dir_, problem);
    WorkLock lock(work_dir_);
    try {
      return run_in_work_dir(lock);
    } catch (const Error& error) {
      // What these options cannot represent, no later run can: leave nothing in the way of others.
      std::error_code ignored;
      if (is_new && error.code() == ErrorCode::kUnsupported && lock.try_alone() &&
          lock.is_in_place()) {
        fs::remove_all(work_dir_, ignored);
      }
      throw;
    }
  }

 private:
  ConvertReport run_in_work_dir(WorkLock& lock) {
    ConvertReport report = describe();
    if (is_made_by_another(report)) return report;
    check_space();
    {
      const Journal journal(work_dir_, conversion_digest());
      run_jobs(journal, report);
      const auto finished = journal.finished();
      for (std::size_t i = 0; i < plan_.jobs.size(); ++i) {
        if (!finished.contains(i) && plan_.jobs[i].expert >= 0) ++report.experts_left;
      }
      if (finished.size() != plan_.jobs.size()) return report;
    }
    lock.change_to(WorkLock::Kind::kAlone);
    if (lock.is_in_place()) {
      check_same_source(source_, plan_, Journal(work_dir_, conversion_digest()));
      finish(report);
    } else if (!is_made_by_another(report)) {
      fail(ErrorCode::kIo, "{}: was moved or removed while it was worked on", work_dir_.string());
    }
    return report;
  }

  /// Says so in `report`. Throws: kInvalidArgument if there is something else in its place.
  [[nodiscard]] bool is_made_by_another(ConvertReport& report) const;
  [[nodiscard]] ConvertReport describe() const;
  [[nodiscard]] std::uint64_t conversion_digest() const;
  void check_space() const;
  void run_jobs(const Journal& journal, ConvertReport& report);
  [[nodiscard]] bool is_mine(const OutputJob& job) const;
  [[nodiscard]] std::uint64_t digest_on_disk(const OutputJob& job) const;
  [[nodiscard]] std::uint64_t run_job(const OutputJob& job);
  [[nodiscard]] std::uint64_t copy_tensor(const OutputJob& job) const;
  [[nodiscard]] std::uint64_t make_expert(const OutputJob& job);
  [[nodiscard]] Expert exact_expert(const OutputJob& job, ExpertStorage& storage) const;
  [[nodiscard]] Expert quantized_expert(const OutputJob& job);
  void verify(ConvertReport& report);
  void finish(ConvertReport& report);
  [[nodiscard]] std::string config_text() const {
    return converted_config(source_.dir, target_->quantization_config(resolved_.spec),
                            target_->expert_type());
  }
  [[nodiscard]] fs::path shard_path(const OutputPlace& place) const {
    return work_dir_ / plan_.shards[place.shard].name;
  }
  void report_progress(double done) const {
    if (progress_) progress_(done);
  }

  const ConvertOptions& options_;
  const CheckpointData& source_;
  std::unique_ptr<const TargetFormat> target_;
  ResolvedConversion resolved_;
  OutputPlan plan_;
  fs::path target_dir_, work_dir_;
  const Progress& progress_;
  ThreadPool pool_;
  std::vector<float> weights_;                // One matrix that is quantized.
  std::array<QuantizedMatrix, 3> quantized_;  // One expert.
  std::vector<InputScales> input_scales_;     // Of layer input_scales_layer_.
  int input_scales_layer_ = -1;
};

ConvertReport Converter::describe() const {
  ConvertReport report;
  report.source_format = source_.format->name();
  report.source_evidence = source_.evidence;
  report.format = target_->name();
  report.is_requantized = resolved_.rule.has_value();
  report.requantized_because = resolved_.requantized_because;
  report.geometry = resolved_.spec.geometry;
  report.scale_dtype = resolved_.spec.scale_dtype;
  report.layers = resolved_.layers;
  report.other_tensors =
      std::ranges::count_if(plan_.jobs, [](const OutputJob& job) { return job.expert < 0; });
  report.bytes = plan_.bytes;
  report.num_shards = static_cast<int>(plan_.shards.size());
  report.has_input_scales = resolved_.spec.has_input_scales;
  return report;
}

/// Of everything that the result's bytes depend on, but the weights: check_same_source().
std::uint64_t Converter::conversion_digest() const {
  const std::string text =
      fmt::format("{} {:016x} {:016x} {} {}", version(), source_.identity, plan_.digest(),
                  config_text(), resolved_.rule ? to_string(resolved_.rule->rule) : "exact");
  return digest_bytes(std::as_bytes(std::span(text)));
}

bool Converter::is_made_by_another(ConvertReport& report) const {
  const auto holds = [&](const char* name, const std::string& text) {
    std::error_code problem;
    if (!fs::is_regular_file(target_dir_ / name, problem)) return false;
    return read_text(target_dir_ / name) == text;
  };
  const bool is_made = holds("config.json", config_text()) && holds(kIndexName, plan_.index_text());
  if (!is_made) {
    (void)checked_target(target_dir_);
    return false;
  }
  std::error_code ignored;
  fs::remove(work_dir_, ignored);  // Empty: made after the other had moved its own.
  report.is_complete = report.is_made_by_another = true;
  report_progress(1.0);
  return true;
}

void Converter::check_space() const {
  std::uint64_t needed = 0;
  for (const OutputShard& shard : plan_.shards) {
    if (!fs::exists(work_dir_ / shard.name)) needed += shard.file_bytes;
  }
  check_free_space(work_dir_, needed);
}

void Converter::run_jobs(const Journal& journal, ConvertReport& report) {
  // Headers and sizes are the same every time, so several processes may do this.
  check_same_source(source_, plan_, journal);
  for (const OutputShard& shard : plan_.shards) {
    set_file_size(work_dir_ / shard.name, shard.file_bytes);
    write_at(work_dir_ / shard.name, 0, std::as_bytes(std::span(shard.header)));
  }
  const auto finished = journal.finished();
  // Verification reads everything once more.
  const double share = options_.verify ? 0.6 : 1.0;
  std::uint64_t total = 0, done = 0;
  for (const OutputJob& job : plan_.jobs) total += is_mine(job) ? job.bytes : 0;
  for (std::size_t i = 0; i < plan_.jobs.size(); ++i) {
    const OutputJob& job = plan_.jobs[i];
    if (!is_mine(job)) continue;
    const auto at = finished.find(i);
    const bool is_intact = at != finished.end() && digest_on_disk(job) == at->second.bytes;
    if (!is_intact) journal.add(i, {run_job(job), sample_source(source_, job)});
    if (job.expert >= 0) ++(is_intact ? report.experts_kept : report.experts_written);
    done += job.bytes;
    report_progress(share * static_cast<double>(done) / static_cast<double>(total));
  }
}

/// Other tensors go with the first expert.
bool Converter::is_mine(const OutputJob& job) const {
  if (job.expert < 0) return resolved_.first_expert == 0;
  return job.expert >= resolved_.first_expert &&
         job.expert < resolved_.first_expert + resolved_.num_experts;
}

std::uint64_t Converter::digest_on_disk(const OutputJob& job) const {
  std::uint64_t digest = kDigestSeed;
  std::vector<std::byte> buffer(kPieceBytes);
  for (const OutputPlace& place : job.places) {
    const RegularFile file = RegularFile::open(shard_path(place));
    for (std::uint64_t at = 0; at < place.bytes; at += buffer.size()) {
      const std::size_t count = file.read(
          place.offset + at, std::span(buffer).first(std::min(buffer.size(), place.bytes - at)),
          shard_path(place));
      digest = digest_bytes(std::span(buffer).first(count), digest);
    }
  }
  return digest;
}

std::uint64_t Converter::run_job(const OutputJob& job) {
  return job.tensor ? copy_tensor(job) : make_expert(job);
}

std::uint64_t Converter::copy_tensor(const OutputJob& job) const {
  const OutputPlace& place = job.places.front();
  std::uint64_t digest = kDigestSeed;
  std::vector<std::byte> buffer(std::min<std::uint64_t>(kPieceBytes, job.tensor->size()));
  for (std::uint64_t at = 0; at < job.tensor->size(); at += kPieceBytes) {
    const auto piece =
        std::span(buffer).first(std::min<std::uint64_t>(kPieceBytes, job.tensor->size() - at));
    read_tensor(*job.tensor, at, piece);
    write_at(shard_path(place), place.offset + at, piece);
    digest = digest_bytes(piece, digest);
  }
  return digest;
}

Expert Converter::exact_expert(const OutputJob& job, ExpertStorage& storage) const {
  Expert expert = source_.load_expert(job.layer, job.expert, storage);
  const auto layouts = matrix_layouts(source_.geometry());
  std::size_t i = 0;
  for (QuantMatrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
    const std::string name =
        fmt::format("{}: {}", source_.dir.string(),
                    source_.index.spelling.name(job.layer, job.expert, layouts[i++].stem()));
    matrix->scales = exact_scales(matrix->scales, resolved_.spec.scale_dtype, name, storage);
  }
  return expert;
}

Expert Converter::quantized_expert(const OutputJob& job) {
  const int group = resolved_.rule->group_size;
  std::array<QuantMatrix, 3> views;
  std::size_t i = 0;
  for (const MatrixLayout& layout : matrix_layouts(source_.geometry())) {
    const auto count = static_cast<std::size_t>(layout.n * layout.k);
    weights_.resize(count);
    source_.load_floats(job.layer, job.expert, layout, weights_);
    QuantizedMatrix& out = quantized_[i];
    out.codes.resize(count / 2);
    out.scales.resize(count / static_cast<std::size_t>(group));
    quantize_weights(weights_, layout.n, layout.k, *resolved_.rule, pool_, out.codes, out.scales);
    const void* scales = out.scales.data();
    if (resolved_.rule->scale_dtype == DType::kBFloat16) {
      out.bf16.resize(out.scales.size());
      std::ranges::transform(out.scales, out.bf16.begin(), bf16_from_float);
      scales = out.bf16.data();
    }
    views[i++] = {.codes = {out.codes.data(), DType::kPackedInt4, {layout.n, layout.k / 2}},
                  .scales = {scales, resolved_.rule->scale_dtype, {layout.n, layout.k / group}},
                  .group_size = group};
  }
  return {.gate = views[0], .up = views[1], .down = views[2]};
}

std::uint64_t Converter::make_expert(const OutputJob& job) {
  ExpertStorage storage;
  const Expert expert = resolved_.rule ? quantized_expert(job) : exact_expert(job, storage);
  InputScales inputs;
  if (resolved_.spec.has_input_scales) {
    if (input_scales_layer_ != job.layer) input_scales_ = source_.input_scales(job.layer);
    input_scales_layer_ = job.layer;
    inputs = input_scales_[static_cast<std::size_t>(job.expert)];
  }
  std::uint64_t digest = kDigestSeed;
  for (std::size_t i = 0; i < job.places.size(); ++i) {
    const auto bytes = target_->bytes(i, resolved_.spec, expert, inputs);
    SLUICE_ASSERT(bytes.size() == job.places[i].bytes);
    write_at(shard_path(job.places[i]), job.places[i].offset, bytes);
    digest = digest_bytes(bytes, digest);
  }
  for (const auto& part :
       source_.layer_tensors(job.layer).experts[static_cast<std::size_t>(job.expert)].parts) {
    MappedFile::release(part.tensor.bytes());
  }
  return digest;
}

void Converter::verify(ConvertReport& report) {
  Verification seen;
  try {
    seen = verify_result(source_, CheckpointData::open(work_dir_),
                         {.layers = resolved_.layers,
                          .is_requantized = report.is_requantized,
                          .expects_input_scales = report.has_input_scales},
                         pool_, [&](double done) { report_progress(0.6 + 0.35 * done); });
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kCorruptFile) throw;
    fail(error.code(), "{}; what was made stays in {}: remove that directory to make it anew",
         error.what(), work_dir_.string());
  }
  report.is_verified = true;
  report.weights_compared = seen.weights_compared;
  report.relative_error = seen.relative_error;
  report.worst_relative_error = seen.worst_relative_error;
  report.worst_matrix = seen.worst_matrix;
}

void Converter::finish(ConvertReport& report) {
  write_text(work_dir_ / kIndexName, plan_.index_text());
  write_text(work_dir_ / "config.json", config_text());
  if (!options_.experts_only) copy_small_files(source_.dir, work_dir_);
  // Verification holds an expert of its own.
  std::vector<float>().swap(weights_);
  quantized_ = {};
  if (options_.verify) verify(report);
  write_checksums(work_dir_);
  std::error_code problem;
  fs::remove(work_dir_ / Journal::kFileName, problem);
  move_to_target(work_dir_, target_dir_);
  report.is_complete = true;
  report_progress(1.0);
}

}  // namespace

ConvertReport convert_checkpoint(const ConvertOptions& options, const Progress& progress) {
  const fs::path target = checked_target(options.to);
  const CheckpointData source = CheckpointData::open(options.from);
  return Converter(options, source, target, progress).run();
}

}  // namespace sluice
