// What may be read may not be written.
#include "sluice/tensor.h"

void first(const sluice::TensorView& in, const sluice::MutableTensorView& out) {
#ifdef MUST_NOT_COMPILE
  *in.as<float>() = *out.as<float>();
#else
  *out.as<float>() = *in.as<float>();
#endif
}
