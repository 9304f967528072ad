// modes_and_wires.h - both modes and all wire formats of an exchange, for loops over them.
#pragma once

#include "sluice/recipe.h"

namespace sluice::testing {

inline constexpr Mode kModes[] = {Mode::kLowLatency, Mode::kNormal};
inline constexpr WireFormat kWires[] = {WireFormat::kBf16, WireFormat::kE4m3Group,
                                        WireFormat::kE4m3Pow2, WireFormat::kE4m3Static,
                                        WireFormat::kE4m3Token};

}  // namespace sluice::testing
