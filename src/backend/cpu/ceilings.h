// ceilings.h - what this machine can do at best, measured: the lines that reports compare with.
#pragma once

namespace sluice {
class ThreadPool;
}

namespace sluice::cpu {

/// All threads stream through a buffer far larger than the last cache; median over passes.
[[nodiscard]] double read_bytes_per_second(ThreadPool& pool);

/// float32 multiply-adds of all threads, times two; best of five passes.
[[nodiscard]] double fma_flops_per_second(ThreadPool& pool);

}  // namespace sluice::cpu
