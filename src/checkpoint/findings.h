// findings.h - what a review of a checkpoint found, one line for each kind.
//
//   add(kind, badness, tensor, text)    for every place
//   take()                              per kind: the worst place, and how many there are
#pragma once

#include <map>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"

namespace sluice {

/// In the order of the report.
enum class WarningKind {
  kUnreadable,       ///< A layer's experts cannot be loaded.
  kUnexpectedLayer,  ///< The config has no experts there.
  kPredictionLayer,  ///< Behind the model's layers. A note.
  kInputScalesOne,   ///< All input scales of a layer are 1.
  kInputScaleOne,    ///< Some are, others are not.
  kInputScalePair,   ///< w1 and w3 of an expert differ, though they have the same input.
  kInputScaleFar,    ///< Far from the layer's median.
  kInputScaleSize,   ///< No activation is of such a size.
  kZeroWeights,      ///< Every code looked at is 0.
  kOffsetCodes,      ///< More -8 than 0.
  kMinusEight,       ///< -8 where amax / 7 rounding makes none. A note: amax / 8 makes some.
  kDeadScales,       ///< All scales of a matrix next to 0.
  kFarScale,         ///< Within one matrix.
  kWeightSize,       ///< Of one matrix, against 1 / sqrt(K).
  kMatrixSizes,      ///< Gate, up and down of one expert.
  kExpertSizes,      ///< Experts of one layer.
  kLayerSizes,       ///< Layers.
};

class Findings {
 public:
  /// The place with the largest `badness` is reported; among equals, the first.
  void add(WarningKind kind, double badness, std::string tensor, std::string text);
  /// Leaves nothing behind.
  [[nodiscard]] std::vector<CheckpointWarning> take();

 private:
  struct Worst {
    double badness = 0;
    int count = 0;
    std::string tensor, text;
  };
  std::map<WarningKind, Worst> worst_;
};

}  // namespace sluice
