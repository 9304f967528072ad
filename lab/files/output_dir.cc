#include "files/output_dir.h"

#include "core/fail.h"

namespace sluice {

namespace fs = std::filesystem;

fs::path checked_target(const fs::path& dir) {
  fs::path target = fs::absolute(dir).lexically_normal();
  if (!target.has_filename()) target = target.parent_path();
  std::error_code problem;
  if (!fs::exists(target, problem)) return target;
  check_argument(fs::is_directory(target, problem), "{}: exists and is not a directory",
                 target.string());
  for (const auto& file : fs::directory_iterator(target, problem)) {
    const std::string name = file.path().filename().string();
    check_argument(name != "config.json" && file.path().extension() != ".safetensors",
                   "{}: already holds a checkpoint ({}); nothing was written", target.string(),
                   name);
    fail(ErrorCode::kInvalidArgument, "{}: not empty ({}); nothing was written", target.string(),
         name);
  }
  if (problem) fail(ErrorCode::kIo, "{}: cannot list: {}", target.string(), problem.message());
  return target;
}

void move_to_target(const fs::path& from, const fs::path& target) {
  std::error_code problem;
  fs::rename(from, target, problem);
  if (problem) {
    fail(ErrorCode::kIo, "{}: cannot rename to {}: {}", from.string(), target.string(),
         problem.message());
  }
}

}  // namespace sluice
