#include "backend/cpu/cpu_features.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sluice::cpu {
namespace {

#if defined(__x86_64__) && defined(__linux__)

/// AMX-TILE and AMX-BF16, and a system that saves both states of the tiles.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kOsxsave = 1u << 27, kTileAndBf16 = 5u << 22, kTileStates = 3u << 17;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsxsave) == 0) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTileAndBf16) != kTileAndBf16) {
    return false;
  }
  unsigned low = 0, high = 0;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileStates) == kTileStates;
}

/// For the whole process, threads that run already included.
bool allow_tile_data() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

CpuFeatures detect() {
  __builtin_cpu_init();
  const bool bf16 = __builtin_cpu_supports("avx512bf16") != 0;
  const bool tiles = bf16 && has_amx() && allow_tile_data();
  return {.vnni = __builtin_cpu_supports("avx512vnni") != 0,
          .bf16 = bf16,
          .tiles = tiles ? TileUnit::kAmx : TileUnit::kNone};
}

#elif defined(__x86_64__)

CpuFeatures detect() {
  __builtin_cpu_init();
  return {.vnni = __builtin_cpu_supports("avx512vnni") != 0,
          .bf16 = __builtin_cpu_supports("avx512bf16") != 0};
}

#else

CpuFeatures detect() {
  return {};
}

#endif

CpuFeatures& current() {
  static CpuFeatures features = detect();
  return features;
}

}  // namespace

const CpuFeatures& cpu_features() {
  return current();
}

void set_cpu_features_for_test(const std::optional<CpuFeatures>& features) {
  current() = features ? *features : detect();
}

}  // namespace sluice::cpu
