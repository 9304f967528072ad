// Files of a checkpoint that are something else: refused by what they are.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <string_view>
#include <utility>

#include "expect_error.h"
#include "model_files.h"
#include "sluice/checkpoint.h"
#include "temp_dir.h"

namespace sluice::testing {
namespace {

/// As a download that failed leaves them, or a clone without Git LFS.
TEST(OtherFiles, OfAnotherKindAreNamed) {
  constexpr const char* kMarked = "\xef\xbb\xbf{}";
  constexpr const char* kPointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n";
  constexpr const char* kPage = "<!DOCTYPE html><html><body>401</body></html>";
  for (const char* const name : {"config.json", "model.safetensors.index.json",
                                 "hf_quant_config.json", "model-00001-of-00002.safetensors"}) {
    for (const auto& [text, part] : {std::pair{kPointer, "a Git LFS pointer"},
                                     {kPage, "HTML"},
                                     {kMarked, "byte order mark (BOM)"}}) {
      if (text == kMarked && !std::string_view(name).ends_with(".json")) continue;
      const TempDir dir;
      ModelFiles().write(dir.path());
      write_file(dir / name, text);
      expect_error(ErrorCode::kUnsupported, {name, "is no ", part},
                   [&] { (void)Checkpoint::open(dir.path()); });
    }
  }
}

/// Opening a FIFO waits for its writer, so it must not be opened like a file.
TEST(OtherFiles, FifosAreNotWaitedFor) {
  for (const char* const name : {"config.json", "model-00001-of-00002.safetensors"}) {
    const TempDir dir;
    ModelFiles().write(dir.path());
    std::filesystem::remove(dir / name);
    ASSERT_EQ(mkfifo((dir / name).c_str(), 0600), 0);
    expect_error(ErrorCode::kIo, {name, "not a regular file"},
                 [&] { (void)Checkpoint::open(dir.path()); });
  }
}

}  // namespace
}  // namespace sluice::testing
