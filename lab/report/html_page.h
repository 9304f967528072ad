// html_page.h - the frame of every report: one HTML file with its style, no network, no script.
#pragma once

#include <string>

namespace sluice::report {

/// All four are HTML. `version` is Sluice's.
[[nodiscard]] std::string html_page(const std::string& title, const std::string& heading,
                                    const std::string& body, const std::string& version);

}  // namespace sluice::report
