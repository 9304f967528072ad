// cpu_features.h - what the kernels use beyond the instruction sets that Highway tells apart.
#pragma once

#include <cstdint>
#include <optional>

namespace sluice::cpu {

/// Who computes products of tiles (tile_unit.h).
enum class TileUnit : std::uint8_t {
  kNone,    ///< No kernel with tiles is chosen.
  kAmx,     ///< The processor's, with AMX bf16.
  kScalar,  ///< A loop with the same operands and results: slow, for tests of the layouts.
};

struct CpuFeatures {
  bool vnni = false;  ///< AVX-512 VNNI. Only looked at where AVX-512 is used.
  bool bf16 = false;  ///< AVX-512 bf16, which kAmx needs, too. Likewise.
  TileUnit tiles = TileUnit::kNone;
};

/// Of this machine. The first call asks the system to let this process use AMX, where there is any:
/// Linux refuses the tiles' registers, 8 KB a thread, to a process that has not asked, and may
/// refuse them to one that does (a signal stack too small to save them, an older kernel, a
/// hypervisor). Tiles are kNone then.
[[nodiscard]] const CpuFeatures& cpu_features();

/// What cpu_features() returns from now on, or this machine's again. For tests: of a machine
/// without something that this one has. Not while kernels run.
void set_cpu_features_for_test(const std::optional<CpuFeatures>& features);

}  // namespace sluice::cpu
