// SLUICE_TEST_HIDE="amx bf16 vnni avx512 avx": the tests of this program run as on a machine
// without these. masked_features.py makes such a machine, by replacing their instructions.
#include <gtest/gtest.h>
#include <hwy/highway.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <sstream>
#include <string>

#include "backend/cpu/cpu_features.h"
#include "backend/cpu/gemm_tile.h"

namespace sluice::testing {
namespace {

class HiddenFeatures : public ::testing::Environment {
 public:
  void SetUp() override {
    const char* const list = std::getenv("SLUICE_TEST_HIDE");
    if (list == nullptr) return;
    std::set<std::string> hidden;
    std::istringstream in(list);
    for (std::string name; in >> name;) hidden.insert(name);
    const auto hides = [&](const char* name) { return hidden.erase(name) > 0; };
    cpu::CpuFeatures features = cpu::cpu_features();
    if (hides("amx")) features.tiles = cpu::TileUnit::kNone;
    if (hides("bf16")) features.bf16 = false;
    if (hides("vnni")) features.vnni = false;
    const bool no_avx512 = hides("avx512"), no_avx = hides("avx"), no_sse4 = hides("sse4");
    ASSERT_TRUE(hidden.empty()) << "SLUICE_TEST_HIDE: " << *hidden.begin() << " is unknown";
    std::int64_t targets = 0;
    for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
      if (no_avx512 && target == HWY_AVX3) continue;
      if (no_avx && target == HWY_AVX2) continue;
      if (no_sse4 && target == HWY_SSE4) continue;
      targets |= target;
    }
    cpu::set_cpu_features_for_test(features);
    hwy::SetSupportedTargetsForTest(targets);
    hwy::GetChosenTarget().Update(targets);
    std::printf("kernels: %s\n", cpu::instruction_set());
  }
};

[[maybe_unused]] const ::testing::Environment* const kHiddenFeatures =
    ::testing::AddGlobalTestEnvironment(new HiddenFeatures);

}  // namespace
}  // namespace sluice::testing
