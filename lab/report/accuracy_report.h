// accuracy_report.h - the certificate as one HTML file: tables and SVG plots, no network, no
// script.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace sluice::report {

/// Drawn from the JSON that `sluice accuracy --json` writes, and from nothing else.
[[nodiscard]] std::string accuracy_report(const nlohmann::ordered_json& json);

}  // namespace sluice::report
