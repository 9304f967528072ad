// bench_runs.h - how the sub-commands of `sluice bench` run what they time, and say its times.
#pragma once

#include <fmt/core.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "launch.h"
#include "report.h"
#include "sluice/backend.h"
#include "sluice/lab/exchange_bench.h"

namespace sluice::cli {

/// One device of `name`, which is cpu or cuda.   num_threads: on the CPU; 0: one for each core.
[[nodiscard]] inline std::unique_ptr<Backend> bench_backend(const std::string& name,
                                                            int num_threads) {
  if (name == "cuda") return make_backend({.device = {Device::Kind::kCuda, 0}});
  const auto num_cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return make_backend({.num_threads = num_threads > 0 ? num_threads : num_cores});
}

/// Runs `bench` over the launch's ranks, with a progress line that starts with `label`; the launch
/// is then finished. What it reports, where this process is the one that reports.
template <class Config, class Report>
[[nodiscard]] std::optional<Report> bench_on_ranks(
    const char* label, Launch& launch, const Config& config,
    Report (*bench)(const Config&, const std::function<void(double)>&, const RunRanks&)) {
  std::optional<ProgressLine> progress;
  if (launch.is_reporter()) progress.emplace(label);
  Report report = bench(
      config,
      [&](double fraction) {
        if (progress) progress->update(fraction);
      },
      [&](const auto& body) { return launch.run_ranks(body); });
  launch.finish();
  if (!launch.is_reporter()) return std::nullopt;
  return report;
}

/// One digit after the point.
[[nodiscard]] inline std::string us(double value) {
  return fmt::format("{:.1f}", value);
}

/// Elements that the cases of a report compared.
template <class Case>
[[nodiscard]] std::int64_t checked_elements(const std::vector<Case>& cases) {
  std::int64_t checked = 0;
  for (const Case& c : cases) checked += c.checked_elements;
  return checked;
}

}  // namespace sluice::cli
