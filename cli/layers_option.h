// layers_option.h - the value of --layers: which layers of a checkpoint a command is about.
#pragma once

#include <string>
#include <vector>

namespace sluice::cli {

/// `text`: "all", or layers and ranges of layers such as "3,5-10", each with experts. `there`: the
/// layers that have experts, ascending.
/// Throws: kInvalidArgument naming option and value.
[[nodiscard]] std::vector<int> parse_layers(const std::string& text, const std::vector<int>& there);

/// Throws: kInvalidArgument naming option, value and `why`.
[[noreturn]] void refuse_layers(const std::string& text, const std::string& why);

}  // namespace sluice::cli
