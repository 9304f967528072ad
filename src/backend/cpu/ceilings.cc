#include "backend/cpu/ceilings.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "backend/cpu/page_buffer.h"
#include "core/threads.h"

namespace sluice::cpu {
namespace {

using Clock = std::chrono::steady_clock;

/// Far larger than the last cache, but never so large that measuring dominates a run's memory.
std::size_t buffer_bytes() {
  constexpr long kMin = 128l << 20, kMax = 512l << 20;
  return static_cast<std::size_t>(std::clamp(4 * sysconf(_SC_LEVEL3_CACHE_SIZE), kMin, kMax));
}

/// Sum of 64-bit words, read as eight streams with prefetching: one stream alone does not keep
/// enough lines in flight to fill the memory's rate.
std::uint64_t sum_words(const std::byte* data, std::size_t bytes) {
  constexpr std::size_t kStreams = 8, kLine = 64, kAhead = 16 * kLine;
  const std::size_t stream_bytes = bytes / kStreams / kLine * kLine;
  std::uint64_t sum[kStreams]{};
  for (std::size_t i = 0; i < stream_bytes; i += kLine) {
    for (std::size_t s = 0; s < kStreams; ++s) {
      const std::byte* line = data + s * stream_bytes + i;
      __builtin_prefetch(line + kAhead);
      std::uint64_t word[kLine / 8];
      std::memcpy(word, line, kLine);
      for (const std::uint64_t w : word) sum[s] += w;
    }
  }
  std::uint64_t total = 0;
  for (const std::uint64_t s : sum) total += s;
  return total;
}

}  // namespace

double read_bytes_per_second(ThreadPool& pool) {
  const PageBuffer buffer(buffer_bytes(), PageBuffer::Pages::kHuge);
  const auto threads = static_cast<std::size_t>(pool.num_threads());
  const std::size_t share = buffer.bytes() / threads / kPageBytes * kPageBytes;
  pool.run([&](int t) {
    std::memset(buffer.data() + static_cast<std::size_t>(t) * share, t + 1, share);
  });
  std::vector<double> rates;
  volatile std::uint64_t sink = 0;  // Keeps the sums from being optimized away.
  const auto start = Clock::now();
  std::vector<std::uint64_t> sums(threads * 8);
  while (rates.size() < 5 || Clock::now() - start < std::chrono::milliseconds(200)) {
    const auto pass = Clock::now();
    pool.run([&](int t) {
      const auto i = static_cast<std::size_t>(t);
      sums[i * 8] = sum_words(buffer.data() + i * share, share);
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - pass).count();
    rates.push_back(static_cast<double>(share * threads) / seconds);
    sink = sink + sums[0];
  }
  std::nth_element(rates.begin(), rates.begin() + static_cast<std::ptrdiff_t>(rates.size() / 2),
                   rates.end());
  return rates[rates.size() / 2];
}

}  // namespace sluice::cpu
