#include "checkpoint/findings.h"

#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

struct KindRow {
  const char* name;     // CheckpointWarning::kind
  const char* counted;  // What `count` counts.
  bool is_note = false;
};

KindRow kind_row(WarningKind kind) {
  switch (kind) {
    case WarningKind::kUnreadable:
      return {"unreadable", "layers"};
    case WarningKind::kUnexpectedLayer:
      return {"unexpected-layer", "layers"};
    case WarningKind::kPredictionLayer:
      return {"prediction-layer", "layers", true};
    case WarningKind::kInputScalesOne:
      return {"input-scales-one", "layers"};
    case WarningKind::kInputScaleOne:
      return {"input-scale-one", "input scales"};
    case WarningKind::kInputScalePair:
      return {"input-scale-pair", "experts"};
    case WarningKind::kInputScaleFar:
      return {"input-scale-far", "input scales"};
    case WarningKind::kInputScaleSize:
      return {"input-scale-size", "input scales"};
    case WarningKind::kZeroWeights:
      return {"zero-weights", "matrices"};
    case WarningKind::kOffsetCodes:
      return {"offset-codes", "matrices"};
    case WarningKind::kMinusEight:
      return {"minus-eight", "matrices", true};
    case WarningKind::kDeadScales:
      return {"dead-scales", "matrices"};
    case WarningKind::kFarScale:
      return {"far-scale", "matrices"};
    case WarningKind::kWeightSize:
      return {"weight-size", "matrices"};
    case WarningKind::kMatrixSizes:
      return {"matrix-sizes", "experts"};
    case WarningKind::kExpertSizes:
      return {"expert-sizes", "matrices"};
    case WarningKind::kLayerSizes:
      return {"layer-sizes", "layers"};
  }
  fail(ErrorCode::kInternal, "kind_row: no such kind");
}

}  // namespace

void Findings::add(WarningKind kind, double badness, std::string tensor, std::string text) {
  Worst& worst = worst_[kind];
  if (worst.count++ > 0 && badness <= worst.badness) return;
  worst.badness = badness;
  worst.tensor = std::move(tensor);
  worst.text = std::move(text);
}

std::vector<CheckpointWarning> Findings::take() {
  std::vector<CheckpointWarning> result;
  for (auto& [kind, worst] : worst_) {
    const KindRow row = kind_row(kind);
    if (worst.count > 1) {
      worst.text += fmt::format(" ({} {} like this; the worst is named)", worst.count, row.counted);
    }
    result.push_back({.tensor = std::move(worst.tensor),
                      .text = std::move(worst.text),
                      .kind = row.name,
                      .count = worst.count,
                      .is_note = row.is_note});
  }
  worst_.clear();
  return result;
}

}  // namespace sluice
