// verdict_faults.h - what the table of verdict_rows.h does to a small checkpoint, by name.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "spelled_files.h"

namespace sluice::testing {

using Faults = std::map<std::string, std::function<void(SpelledFiles&)>>;

/// By the names that rows have for them. "cut" and "stray-junk" are done to the written files.
[[nodiscard]] const Faults& faults();

/// True of a fault of codes or scales.
[[nodiscard]] bool changes_weights(const std::string& fault);

}  // namespace sluice::testing
