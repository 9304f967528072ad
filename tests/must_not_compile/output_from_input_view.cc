// An input view is not accepted where an output is written: swapped arguments do not compile.
#include "sluice/exchange.h"

void finish(sluice::Exchange& exchange, sluice::Dispatched dispatched, sluice::TensorView expert_y,
            sluice::MutableTensorView y) {
#ifdef MUST_NOT_COMPILE
  exchange.combine(std::move(dispatched), y, expert_y, {});
#else
  exchange.combine(std::move(dispatched), expert_y, y, {});
#endif
}
