// source_sample.h - tells the sources of a conversion apart that have the same headers, such as two
// trainings of one model.
#pragma once

#include <cstdint>

#include "checkpoint/checkpoint_impl.h"
#include "convert/journal.h"
#include "convert/output_plan.h"

namespace sluice {

/// Of the source's tensors that `job` is made of: of each one its first, middle and last bytes, a
/// page of each. Cost: as many pages.
[[nodiscard]] std::uint64_t sample_source(const CheckpointData& source, const OutputJob& job);

/// Throws: kInvalidArgument naming `journal` and a job of `finished`, a job that was made of
/// something else than `source` has for it now.
void check_same_source(const CheckpointData& source, const OutputPlan& plan,
                       const Journal& journal);

}  // namespace sluice
