// code_table.h - what the codes of every byte are worth, for loops over many of them.
#pragma once

#include <cstdint>

#include "sluice/weight_format.h"

namespace sluice {

/// value[byte][i] = code_value(format, &byte, i), for formats of two codes in a byte.
struct CodeTable {
  explicit CodeTable(WeightFormat format) {
    for (int b = 0; b < 256; ++b) {
      const auto byte = static_cast<std::uint8_t>(b);
      for (int i = 0; i < 2; ++i) value[b][i] = code_value(format, &byte, i);
    }
  }
  float value[256][2];
};

}  // namespace sluice
