#include "report.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>

namespace sluice::cli {

void print_error(const Error& error) {
  std::fflush(stdout);  // What was printed comes first, also where both go to one file.
  // On a terminal, instead of a progress line, which may be another process's.
  const char* const erase = isatty(STDERR_FILENO) != 0 ? "\r\033[K" : "";
  fmt::print(stderr, "{}sluice: {}: {}\n", erase, to_string(error.code()), error.what());
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
  fmt::print(stderr, "\r\033[K{} {}%", label_, percent);
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
