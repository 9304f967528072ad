#include "convert/source_sample.h"

#include <fmt/core.h>

#include <span>
#include <string>

#include "core/fail.h"

namespace sluice {
namespace {

constexpr std::size_t kPieceBytes = 4096;

std::uint64_t sample_tensor(const TensorRef& tensor, std::uint64_t seed) {
  const std::uint64_t size = tensor.size();
  std::byte piece[3 * kPieceBytes];
  const auto add = [&](std::uint64_t at, std::size_t bytes) {
    const auto part = std::span(piece).first(bytes);
    read_tensor(tensor, at, part);
    seed = digest_bytes(part, seed);
  };
  if (size <= sizeof piece) {
    add(0, size);
  } else {
    for (const std::uint64_t at : {std::uint64_t{0}, size / 2, size - kPieceBytes}) {
      add(at, kPieceBytes);
    }
  }
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
