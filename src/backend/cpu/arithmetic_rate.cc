#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>

#include "backend/cpu/ceilings.h"
#include "core/threads.h"

namespace sluice::cpu {
namespace {

constexpr int kChains = 96;  // Floats in flight: enough independent registers for any vector width.
constexpr int kSteps = 4'000'000;

/// kSteps multiply-adds on kChains independent sums. Inlined into a function for each instruction
/// set.
inline __attribute__((always_inline)) float run_chains(float factor) {
  float sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = static_cast<float>(i) * factor;
  for (int step = 0; step < kSteps; ++step) {
    for (int i = 0; i < kChains; ++i) sum[i] = __builtin_fmaf(sum[i], factor, 1.0f);
  }
  float total = 0;
  for (int i = 0; i < kChains; ++i) total += sum[i];
  return total;
}

#ifdef __x86_64__
__attribute__((target("avx512f,prefer-vector-width=512"))) float run_avx512(float factor) {
  return run_chains(factor);
}
__attribute__((target("avx2,fma"))) float run_avx2(float factor) {
  return run_chains(factor);
}
#endif
float run_baseline(float factor) {
  return run_chains(factor);
}

float (*best_chains())(float) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) return run_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run_avx2;
#endif
  return run_baseline;
}

}  // namespace

double fma_flops_per_second(ThreadPool& pool) {
  float (*const run)(float) = best_chains();
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    std::atomic<float> sink{0};
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int t) { sink = run(0.5f + 0.001f * static_cast<float>(t)); });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, 2.0 * kChains * kSteps * pool.num_threads() / elapsed.count());
  }
  return best;
}

}  // namespace sluice::cpu
