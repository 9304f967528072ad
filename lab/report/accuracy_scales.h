// accuracy_scales.h - static scales in the accuracy report: of the layer, and expert by expert.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace sluice::report {

/// The section on static scales of one layer's certificate.
[[nodiscard]] std::string scales_section(const nlohmann::ordered_json& json);

}  // namespace sluice::report
