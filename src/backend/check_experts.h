// check_experts.h - refuses expert weights that are not what their geometry says.
#pragma once

#include "sluice/checkpoint.h"

namespace sluice {

/// That every matrix of every expert has the shape, dtypes and group size of weights.geometry: gate
/// and up [intermediate, hidden], down [hidden, intermediate].
/// Throws: kInvalidArgument naming expert, matrix, what it is and what was expected.
void check_experts(const ExpertWeights& weights);

}  // namespace sluice
