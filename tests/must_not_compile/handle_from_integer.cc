// A stream is a stream, not any pointer or number that happens to be at hand.
#include "sluice/engine.h"

void run(sluice::Engine& engine, sluice::TensorView x, const sluice::Routing& routing,
         sluice::MutableTensorView y) {
#ifdef MUST_NOT_COMPILE
  engine.forward(sluice::Mode::kNormal, x, routing, y, 7);
#else
  engine.forward(sluice::Mode::kNormal, x, routing, y, sluice::Stream{});
#endif
}
