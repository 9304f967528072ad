// one_host_exchange.h - the exchange for host memory, on one host.
//
// A rank spreads its own tokens. Each row goes home to home[token][slot] of its source, which sums.
#pragma once

#include "exchange/host_exchange.h"

namespace sluice {

class OneHostExchange final : public HostExchange {
 public:
  OneHostExchange(const ExchangeConfig& config, Transport& transport, Backend& backend);

 private:
  void send_tokens(HostRoute& route, std::int64_t num_tokens) override;
  void send_rows_home(const HostRoute& route, TensorView expert_y) override;
  void sum_rows(const HostRoute& route, MutableTensorView y) override;
  void sum_by_parts(const HostRoute& route, MutableTensorView y);

  std::size_t home_;  ///< HostLayout::home
};

}  // namespace sluice
