// ceilings.h - what this machine can do at best, measured: the lines that reports compare with.
#pragma once

#include <vector>

#include "backend/ops.h"

namespace sluice {
class ThreadPool;
}

namespace sluice::cpu {

/// All threads stream through a buffer far larger than the last cache; median over passes.
[[nodiscard]] double read_bytes_per_second(ThreadPool& pool);

/// What each kind of dot product that gemm_tile() uses here allows, all threads together:
/// operations per second, two for each multiply-add of an e4m3 value, which is two products of
/// bytes or one of int16. Best of ten intervals of 15 ms, through which all threads work. Seconds
/// are those that threads had a core for, times the cores there are: other programs' share counts
/// as if it were free.
[[nodiscard]] std::vector<ArithmeticRate> dot_rates(ThreadPool& pool);

}  // namespace sluice::cpu
