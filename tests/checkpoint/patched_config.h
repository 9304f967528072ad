// patched_config.h - a good checkpoint whose config.json has been changed, and what becomes of it.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "expect_error.h"
#include "model_files.h"
#include "sluice/checkpoint.h"
#include "temp_dir.h"

namespace sluice::testing {

/// ModelFiles (hidden 256, intermediate 128, two experts, top-2, layer 5 of six) with `patch`
/// merged into the config; null removes a key there.
inline ModelFiles patched(const std::string& patch) {
  ModelFiles files;
  files.config.merge_patch(nlohmann::ordered_json::parse(patch));
  return files;
}

struct PatchRow {
  const char* patch;
  std::vector<std::string> parts;  ///< Of the message, or of the warnings.
};

/// Opening it fails with `code`, naming config.json and all parts.
inline void expect_patch_refused(ErrorCode code, const PatchRow& row) {
  SCOPED_TRACE(row.patch);
  const TempDir dir;
  patched(row.patch).write(dir.path());
  std::vector<std::string> parts = row.parts;
  parts.emplace_back("config.json: ");
  expect_error(code, parts, [&] { (void)Checkpoint::open(dir.path()); });
}

}  // namespace sluice::testing
