#include "report.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

namespace sluice::cli {

void print_error(const Error& error) {
  std::fflush(stdout);  // What was printed comes first, also where both go to one file.
  // On a terminal, instead of a progress line, which may be another process's.
  const char* const erase = isatty(STDERR_FILENO) != 0 ? "\r\033[K" : "";
  const std::string line =
      fmt::format("{}sluice: {}: {}\n", erase, to_string(error.code()), error.what());
  std::fputs(line.c_str(), stderr);  // Where even that fails, the exit status is left.
}

Error error_of(const std::exception& error) {
  if (dynamic_cast<const std::filesystem::filesystem_error*>(&error) != nullptr) {
    return {ErrorCode::kIo, error.what()};
  }
  if (std::ferror(stdout) == 0) return {ErrorCode::kInternal, error.what()};
  return {ErrorCode::kIo, fmt::format("standard output: {}", error.what())};
}

void hold_standard_files() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(fd, F_GETFD) != -1 || errno != EBADF) continue;
    // The lowest number that is free is this one. It cannot be read, or written, as before.
    (void)open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY);
  }
}

void flush_output() {
  const int problem = std::fflush(stdout) != 0 ? errno : 0;
  if (problem == 0 && std::ferror(stdout) == 0) return;
  throw Error(ErrorCode::kIo,
              fmt::format("standard output: cannot write: {}",
                          problem != 0 ? std::strerror(problem) : "a part of it is lost"));
}

ProgressLine::ProgressLine(std::string label)
    : label_(std::move(label)), is_terminal_(isatty(STDERR_FILENO) != 0) {}

ProgressLine::~ProgressLine() {
  if (is_terminal_ && last_percent_ >= 0) std::fputs("\r\033[K", stderr);
}

void ProgressLine::update(double fraction) {
  const int percent = static_cast<int>(std::clamp(fraction, 0.0, 1.0) * 100);
  const auto now = std::chrono::steady_clock::now();
  if (!is_terminal_ || percent == last_percent_ || now < next_update_) return;
  last_percent_ = percent;
  next_update_ = now + std::chrono::seconds(1);
  std::fputs(fmt::format("\r\033[K{} {}%", label_, percent).c_str(), stderr);
  std::fflush(stderr);
}

void require_memory(double bytes, const std::string& what) {
  const double there =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  if (bytes <= there) return;
  throw Error(ErrorCode::kOutOfMemory, fmt::format("{} take {}; this machine has {}", what,
                                                   human_bytes(bytes), human_bytes(there)));
}

std::string human_bytes(double bytes) {
  const char* const units[] = {"B", "kB", "MB", "GB", "TB"};
  int unit = 0;
  while (bytes >= 1000 && unit < 4) bytes /= 1000, ++unit;
  if (unit == 0) return fmt::format("{:.0f} B", bytes);
  return fmt::format("{:.2f} {}", bytes, units[unit]);
}

}  // namespace sluice::cli
