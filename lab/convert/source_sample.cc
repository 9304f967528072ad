#include "convert/source_sample.h"

#include <fmt/core.h>

#include <span>
#include <string>

#include "core/fail.h"
#include "core/mmap.h"

namespace sluice {
namespace {

constexpr std::size_t kPieceBytes = 4096;

std::uint64_t sample_tensor(const TensorRef& tensor, std::uint64_t seed) {
  const auto bytes = tensor.bytes();
  if (bytes.size() <= 3 * kPieceBytes) {
    seed = digest_bytes(bytes, seed);
  } else {
    seed = digest_bytes(bytes.first(kPieceBytes), seed);
    seed = digest_bytes(bytes.subspan(bytes.size() / 2, kPieceBytes), seed);
    seed = digest_bytes(bytes.last(kPieceBytes), seed);
  }
  tensor.release();
  return seed;
}

}  // namespace

std::uint64_t sample_source(const CheckpointData& source, const OutputJob& job) {
  if (job.tensor) return sample_tensor(*job.tensor, kDigestSeed);
  std::uint64_t digest = kDigestSeed;
  const LayerTensors& layer = source.layer_tensors(job.layer);
  for (const auto& part : layer.experts[static_cast<std::size_t>(job.expert)].parts) {
    digest = sample_tensor(part.tensor, digest);
  }
  return digest;
}

void check_same_source(const CheckpointData& source, const OutputPlan& plan,
                       const Journal& journal) {
  for (const auto& [number, done] : journal.finished()) {
    if (number >= plan.jobs.size()) continue;
    const OutputJob& job = plan.jobs[number];
    if (sample_source(source, job) == done.source) continue;
    const std::string what = job.tensor
                                 ? job.tensor->entry.name
                                 : fmt::format("expert {} of layer {}", job.expert, job.layer);
    fail(ErrorCode::kInvalidArgument,
         "{}: holds an unfinished conversion of another source: {} was made of other bytes than {} "
         "has; finish it from the source it was begun with, or remove the directory",
         journal.dir().string(), what, source.dir.string());
  }
}

}  // namespace sluice
