// An Exchange owns its buffers and peers know it by them: there is never a second one.
#include "sluice/exchange.h"

sluice::Exchange take(sluice::Exchange& exchange) {
#ifdef MUST_NOT_COMPILE
  return exchange;
#else
  return std::move(exchange);
#endif
}
