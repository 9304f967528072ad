// ceilings.h - what this machine can do at best, measured: the lines that reports compare with.
#pragma once

namespace sluice {
class ThreadPool;
}

namespace sluice::cpu {

/// All threads stream through a buffer far larger than the last cache; median over passes.
[[nodiscard]] double read_bytes_per_second(ThreadPool& pool);

/// What the byte dot products of gemm_tile.h allow, all threads together: operations per second,
/// two for each multiply-add of an e4m3 value, whose two digits are a product of bytes each. Best
/// of ten intervals of 15 ms, through which all threads work. Seconds are those that threads had a
/// core for, times the cores there are: other programs' share counts as if it were free.
[[nodiscard]] double dot_flops_per_second(ThreadPool& pool);

}  // namespace sluice::cpu
