// Dropping the value that dispatch returns would drop the way home of every row.
#include "sluice/exchange.h"

void send(sluice::Exchange& exchange, sluice::TensorView x, const sluice::Routing& routing) {
#ifdef MUST_NOT_COMPILE
  exchange.dispatch(x, routing, {});
#else
  [[maybe_unused]] const auto dispatched = exchange.dispatch(x, routing, {});
#endif
}
