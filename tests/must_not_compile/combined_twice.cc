// combine() consumes the dispatched value: it can be neither copied nor handed over by accident.
#include "sluice/exchange.h"

void finish(sluice::Exchange& exchange, sluice::Dispatched& dispatched, sluice::TensorView expert_y,
            sluice::MutableTensorView y) {
#ifdef MUST_NOT_COMPILE
  exchange.combine(dispatched, expert_y, y, {});
#else
  exchange.combine(std::move(dispatched), expert_y, y, {});
#endif
}
