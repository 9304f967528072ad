// placement_report.h - what balancing does to each rank, as one HTML file: tables and pictures.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace sluice::report {

/// Drawn from the JSON that `sluice balance --json` writes, and from nothing else.
[[nodiscard]] std::string placement_report(const nlohmann::ordered_json& json);

}  // namespace sluice::report
