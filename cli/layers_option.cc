#include "layers_option.h"

#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <string_view>

#include "report/text_table.h"
#include "sluice/error.h"

namespace sluice::cli {
namespace {

/// The number at the front of `text`, which it takes off.
int take_number(const std::string& option, std::string_view& text) {
  int number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || number < 0) {
    refuse_layers(option, "neither 'all' nor a list such as 3,5 or 3-10");
  }
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return number;
}

}  // namespace

void refuse_layers(const std::string& text, const std::string& why) {
  throw Error(ErrorCode::kInvalidArgument, fmt::format("--layers '{}': {}", text, why));
}

std::vector<int> parse_layers(const std::string& text, const std::vector<int>& there) {
  if (text == "all") return there;
  std::vector<int> layers;
  std::string_view rest = text;
  for (bool more = true; more;) {
    const int first = take_number(text, rest);
    int last = first;
    if (rest.starts_with('-')) {
      rest.remove_prefix(1);
      last = take_number(text, rest);
    }
    if (last < first) refuse_layers(text, fmt::format("{} is before {}", last, first));
    if (first != last && last > there.back() && first <= there.back()) {
      refuse_layers(text, fmt::format("{} to {} ends behind layer {}, the last with experts", first,
                                      last, there.back()));
    }
    for (const int layer : there) {
      if (layer >= first && layer <= last) layers.push_back(layer);
    }
    const bool found = !layers.empty() && layers.back() >= first && layers.back() <= last;
    if (!found || (first == last && layers.back() != first)) {
      refuse_layers(
          text, fmt::format(
                    "no experts in layer {}; they are in {}, {} to {}",
                    first == last ? fmt::format("{}", first) : fmt::format("{} to {}", first, last),
                    report::counted(there.size(), "layer"), there.front(), there.back()));
    }
    more = rest.starts_with(',');
    if (more) rest.remove_prefix(1);
  }
  if (!rest.empty()) refuse_layers(text, fmt::format("nothing is known of '{}'", rest));
  std::vector<int> sorted = layers;
  std::ranges::sort(sorted);
  if (const auto twice = std::ranges::adjacent_find(sorted); twice != sorted.end()) {
    refuse_layers(text, fmt::format("layer {} is there twice", *twice));
  }
  return layers;
}

}  // namespace sluice::cli
