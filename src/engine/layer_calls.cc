// How layers of a group are told apart and named, and what is said of ranks that call another one.
#include <fmt/core.h>

#include <algorithm>

#include "core/fail.h"
#include "engine/layer_impl.h"
#include "exchange/impl.h"
#include "sluice/transport.h"

namespace sluice {

int layer_number(std::size_t count) {
  return 1 + static_cast<int>(count % Routing::kMaxLayer);
}

std::string LayerGroup::Impl::name_of_layer(int number) const {
  for (std::size_t i = layer_names.size(); i-- > 0;) {
    if (layer_number(i) != number) continue;
    const bool is_unique = std::ranges::count(layer_names, layer_names[i]) == 1;
    return is_unique ? layer_names[i]
                     : fmt::format("{} (number {} of the group)", layer_names[i], number);
  }
  return fmt::format("layer number {}", number);
}

std::pair<std::string, std::string> LayerGroup::Impl::group_of(const std::string& layer) const {
  return {"the group of " + layer, fmt::format("number {} of rank 0", group_number)};
}

void LayerGroup::Impl::explain_timeout(const Error& error, const Exchange& exchange,
                                       int number) const {
  if (error.code() != ErrorCode::kPeerTimeout) throw;  // What is being handled: `error`.
  const auto call = [this](int layer, Mode mode, WireFormat wire) {
    return fmt::format("{} in {} mode with rows of {}", name_of_layer(layer), to_string(mode),
                       to_string(wire));
  };
  std::vector<std::pair<std::string, std::string>> others;
  std::vector<int> ranks;
  for (const int rank : error.ranks()) {
    for (const auto& [key, other] : exchanges) {
      const auto ahead = other.impl_->layer_ahead(rank);
      if (!ahead || &other == &exchange) continue;
      others.emplace_back(fmt::format("{}", rank), call(*ahead, key.first, key.second));
      ranks.push_back(rank);
      break;
    }
  }
  if (others.empty()) throw;  // What is being handled: `error`.
  const ExchangeConfig& own = exchange.config();
  fail_of_ranks(ErrorCode::kTransport, ranks, "{}; {}", error.what(),
                different_calls(others, fmt::format("{}", transport->rank()),
                                call(number, own.mode, own.wire)));
}

}  // namespace sluice
