#include "files/output_dir.h"

#include <fcntl.h>
#include <sys/stat.h>

#include "core/fail.h"

namespace sluice {

namespace fs = std::filesystem;

namespace {

bool is_mount_point(const fs::path& dir) {
  struct statx own {};
  if (::statx(AT_FDCWD, dir.c_str(), 0, STATX_BASIC_STATS, &own) != 0) return false;
  if ((own.stx_attributes_mask & STATX_ATTR_MOUNT_ROOT) != 0) {
    return (own.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0;
  }
  // A kernel before 5.8, which does not tell of a file system that is mounted in itself.
  struct stat inner {
  }, outer{};
  return ::stat(dir.c_str(), &inner) == 0 && ::stat((dir / "..").c_str(), &outer) == 0 &&
         inner.st_dev != outer.st_dev;
}

}  // namespace

fs::path checked_target(const fs::path& dir) {
  std::error_code problem;
  fs::path target = fs::absolute(dir, problem).lexically_normal();
  if (problem) fail(ErrorCode::kIo, "{}: cannot find: {}", dir.string(), problem.message());
  if (!target.has_filename()) target = target.parent_path();
  if (fs::is_symlink(fs::symlink_status(target, problem))) {
    check_argument(fs::exists(target, problem),
                   "{}: is a link to {}, which is not there; make that directory, or name another",
                   target.string(), fs::read_symlink(target, problem).string());
    target = fs::canonical(target, problem);
    if (problem) fail(ErrorCode::kIo, "{}: cannot follow: {}", dir.string(), problem.message());
  }
  const bool is_there = fs::exists(target, problem);
  // A name that is too long, a directory that may not be entered.
  if (problem) fail(ErrorCode::kIo, "{}: cannot look at: {}", target.string(), problem.message());
  if (!is_there) return target;
  check_argument(fs::is_directory(target, problem), "{}: exists and is not a directory",
                 target.string());
  check_argument(!is_mount_point(target),
                 "{}: is a mount point, whose place a finished directory cannot take; name a "
                 "directory in it, such as {}",
                 target.string(), (target / "checkpoint").string());
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
