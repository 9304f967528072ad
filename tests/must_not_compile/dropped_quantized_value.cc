// A conversion whose result is dropped does nothing.
#include "sluice/quant.h"

std::uint8_t convert(float x) {
#ifdef MUST_NOT_COMPILE
  sluice::e4m3_from_float(x);
#endif
  return sluice::e4m3_from_float(x);
}
