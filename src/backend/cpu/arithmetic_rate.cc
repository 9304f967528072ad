// The dot products of gemm_tile.cc by themselves: in registers, without scales.
#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <thread>
#include <vector>

#include "backend/cpu/ceilings.h"
#include "backend/cpu/cpu_features.h"
#include "backend/cpu/gemm_tile.h"
#include "backend/cpu/tile_unit.h"
#include "core/threads.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/arithmetic_rate.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "backend/cpu/byte_dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

// Every sum is a named variable, so that no optimizer has to find out that it may stay in a
// register. The barrier makes each step load its weights again: a product of two operands that
// never change could be taken out of the loop.
inline constexpr int kSteps = 1024;  // Of one call: microseconds, the resolution of an interval.

#if HWY_TARGET == HWY_SCALAR

/// Operations: two for each multiply-add of a value, as in gemm_tile.cc. `sink` gets their sum.
std::int64_t dot_steps_impl(DigitLayout, const std::uint8_t* bytes, std::uint32_t* sink) {
  std::uint32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
  const std::uint32_t a0 = bytes[2], a1 = bytes[3], a2 = bytes[4], a3 = bytes[5];
  for (int step = 0; step < kSteps; ++step) {
    asm volatile("" ::: "memory");
    const std::uint32_t w0 = bytes[0], w1 = bytes[1];
    s0 += w0 * a0, s1 += w0 * a1, s2 += w0 * a2, s3 += w0 * a3;
    s4 += w1 * a0, s5 += w1 * a1, s6 += w1 * a2, s7 += w1 * a3;
  }
  *sink += s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7;
  return std::int64_t{kSteps} * 8 * 2;
}

#else

/// As PairDot::add(): an addition follows each product, so few sums are enough.
struct PairSum {
  VI16 v;
  HWY_INLINE PairSum() : v(hn::Zero(kI16)) {}
  HWY_INLINE void add(VU8 w, VI8 a) { v = hn::Add(v, dot_pairs(w, a)); }
  HWY_INLINE VI32 total() const { return hn::BitCast(kI32, v); }
};

/// As WordDot::add().
struct WordSum {
  VI32 v;
  HWY_INLINE WordSum() : v(hn::Zero(kI32)) {}
  HWY_INLINE void add(VU8 w, VI8 a) { WordDot::add(hn::BitCast(kI16, w), hn::BitCast(kI16, a), v); }
  HWY_INLINE VI32 total() const { return v; }
};

#if SLUICE_BYTE_DOT_HAS_VNNI
/// As VnniDot::add(), but for the operand, which lies in a register.
struct VnniSum {
  VI32 v;
  HWY_INLINE VnniSum() : v(hn::Zero(kI32)) {}
  HWY_INLINE void add(VU8 w, VI8 a) {
    asm("vpdpbusd %2, %1, %0" : "+v"(v.raw) : "v"(w.raw), "v"(a.raw));
  }
  HWY_INLINE VI32 total() const { return v; }
};
#endif

/// kSteps * 12 dot products. Twelve sums, because a processor that begins two products in a cycle
/// and takes five cycles for each has ten under way.
template <class Sum>
HWY_INLINE VI32 dot_steps(const std::uint8_t* bytes) {
  Sum s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11;
  const VI8 a0 = repeat_quad(bytes), a1 = repeat_quad(bytes + 4);
  const auto load = [&](int i) HWY_ATTR { return hn::LoadU(kU8, bytes + i * kRegBytes); };
  for (int step = 0; step < kSteps; ++step) {
    asm volatile("" ::: "memory");
    VU8 w = load(0);
    s0.add(w, a0), s1.add(w, a1), w = load(1);
    s2.add(w, a0), s3.add(w, a1), w = load(2);
    s4.add(w, a0), s5.add(w, a1), w = load(3);
    s6.add(w, a0), s7.add(w, a1), w = load(4);
    s8.add(w, a0), s9.add(w, a1), w = load(5);
    s10.add(w, a0), s11.add(w, a1);
  }
  const VI32 low = hn::Add(hn::Add(s0.total(), s1.total()), hn::Add(s2.total(), s3.total()));
  const VI32 mid = hn::Add(hn::Add(s4.total(), s5.total()), hn::Add(s6.total(), s7.total()));
  const VI32 high = hn::Add(hn::Add(s8.total(), s9.total()), hn::Add(s10.total(), s11.total()));
  return hn::Add(hn::Add(low, mid), high);
}

/// As tile_pipeline-inl.h has them: four sums, two operands of either side.
template <class Tiles>
std::int64_t tile_steps(const std::uint8_t* bytes, std::uint32_t* sink) {
  constexpr int kTileSteps = kSteps / 16;
  Tiles tiles;
  tiles.template load<4>(bytes, 0), tiles.template load<5>(bytes + 64, 0);
  tiles.template load<6>(bytes + 128, 0), tiles.template load<7>(bytes + 192, 0);
  tiles.template zero<0>(), tiles.template zero<1>();
  tiles.template zero<2>(), tiles.template zero<3>();
  for (int step = 0; step < kTileSteps; ++step) {
    tiles.template dot<0, 4, 6>(), tiles.template dot<1, 4, 7>();
    tiles.template dot<2, 5, 6>(), tiles.template dot<3, 5, 7>();
  }
  alignas(64) float sums[4][kTileRows * kTileN];
  tiles.template store<0>(sums[0]), tiles.template store<1>(sums[1]);
  tiles.template store<2>(sums[2]), tiles.template store<3>(sums[3]);
  for (const auto& sum : sums) *sink += std::bit_cast<std::uint32_t>(sum[0]);
  return std::int64_t{kTileSteps} * 4 * 2 * kTileRows * kTileN * kTileK;
}

/// Operations: two for each multiply-add of a value, which is two products of bytes or one of
/// int16 or bf16. `sink` gets a sum of all lanes.
std::int64_t dot_steps_impl(DigitLayout layout, const std::uint8_t* bytes, std::uint32_t* sink) {
  const auto add = [&](VI32 sum) HWY_ATTR {
    *sink += static_cast<std::uint32_t>(hn::GetLane(hn::SumOfLanes(kI32, sum)));
    return std::int64_t{kSteps} * 12 * kRegBytes;
  };
  if (layout == DigitLayout::kTiles) {
#if HWY_TARGET == HWY_AVX3
    if (cpu_features().tiles == TileUnit::kAmx) return tile_steps<AmxTiles>(bytes, sink);
#endif
    return tile_steps<ScalarTiles>(bytes, sink);
  }
  if (layout == DigitLayout::kWords) return add(dot_steps<WordSum>(bytes));
#if SLUICE_BYTE_DOT_HAS_VNNI
  if (cpu_features().vnni) return add(dot_steps<VnniSum>(bytes));
#endif
  return add(dot_steps<PairSum>(bytes));
}

#endif

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::cpu {
namespace {

HWY_EXPORT(dot_steps_impl);

using Clock = std::chrono::steady_clock;

const char* name_of(DigitLayout layout) {
  if (layout == DigitLayout::kTiles) return "bf16 tile products";
  return layout == DigitLayout::kWords ? "int16 dot products" : "byte dot products";
}

/// Of this thread so far.
double cpu_seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

struct alignas(64) DotShare {
  double operations = 0, seconds = 0;
};

/// All threads work from one time to another, so that they share what cores share. What counts is
/// the time they had a core for: another program takes from that, but not from what a core can do.
double flops_per_second(DigitLayout layout, ThreadPool& pool, std::chrono::milliseconds interval) {
  alignas(64) std::uint8_t bytes[6 * 64];
  for (int i = 0; i < 6 * 64; ++i) bytes[i] = static_cast<std::uint8_t>(i % 16);
  std::vector<DotShare> shares(static_cast<std::size_t>(pool.num_threads()));
  std::atomic<int> missing{pool.num_threads()};
  std::atomic<Clock::rep> begin{0};
  std::atomic<std::uint32_t> sums{0};
  pool.run([&](int t) {
    std::uint32_t sum = 0;
    (void)HWY_DYNAMIC_DISPATCH(dot_steps_impl)(layout, bytes,
                                               &sum);  // Wide vectors take time to wake.
    if (missing.fetch_sub(1) == 1) begin = Clock::now().time_since_epoch().count();
    while (begin == 0) std::this_thread::yield();
    const Clock::time_point end = Clock::time_point(Clock::duration(begin.load())) + interval;
    const double start = cpu_seconds();
    std::int64_t done = 0;
    while (Clock::now() < end) done += HWY_DYNAMIC_DISPATCH(dot_steps_impl)(layout, bytes, &sum);
    shares[static_cast<std::size_t>(t)] = {static_cast<double>(done), cpu_seconds() - start};
    sums += sum;
  });
  volatile std::uint32_t sink = sums;  // Keeps the sums from being optimized away.
  (void)sink;
  DotShare all;
  for (const DotShare& s : shares) all.operations += s.operations, all.seconds += s.seconds;
  const std::size_t cores = std::min(shares.size(), available_cores().size());
  return all.seconds > 0 ? all.operations / all.seconds * static_cast<double>(cores) : 0;
}

}  // namespace

std::vector<ArithmeticRate> dot_rates(ThreadPool& pool) {
  constexpr int kIntervals = 10;
  std::vector<ArithmeticRate> rates;
  for (const DigitLayout layout : {DigitLayout::kBytes, DigitLayout::kWords, DigitLayout::kTiles}) {
    if (digit_layout(1) != layout && digit_layout(kMaxTileRows) != layout) continue;
    double best = 0;
    for (int i = 0; i < kIntervals; ++i) {
      best = std::max(best, flops_per_second(layout, pool, std::chrono::milliseconds(15)));
    }
    rates.push_back({name_of(layout), best});
  }
  return rates;
}

}  // namespace sluice::cpu
#endif
