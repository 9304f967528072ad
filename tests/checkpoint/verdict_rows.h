// verdict_rows.h - the table of test_verdicts.cc: what is done to a small checkpoint, and what must
// become of it.
#pragma once

#include <span>
#include <vector>

namespace sluice::testing {

/// Files are written in a spelling and a container, spoiled by a fault, and described by a patched
/// config.json.
struct VerdictRow {
  const char* files;  ///< Words of spelling_of(), "" = W4AFP8 under DeepSeek's names.
  const char* patch;  ///< Merged into config.json after the fault; null removes a key.
  const char* fault;  ///< Names in faults().
  /// "loads", "warns: KINDS", or "CODE: part of the message". What loads has plain SwiGLU unless
  /// " as ACTIVATION" follows.
  const char* verdict;
};

/// Names, containers, scales, the index, keys of config.json, activations.
[[nodiscard]] std::vector<std::span<const VerdictRow>> verdict_rows();

}  // namespace sluice::testing
