// team.cuh - the threads that take a step of a kernel together, and the words that they share.
//
// The steps of the exchange over hosts are written for a *team*: the threads of a CTA on a device,
// and a single thread in host code. So what they compute is tested without a GPU, on the ranks'
// threads, with the same flags and waits (tests/exchange/test_rail_exchange.cc).
#pragma once

#include <cstddef>
#include <cstdint>

#include "exchange/cuda/exchange_kernels.h"

#ifdef __CUDACC__
#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/ptx/system.cuh"
#define SLUICE_STEP __host__ __device__ inline
#else
#define SLUICE_STEP inline
#endif
#ifdef __CUDA_ARCH__
#define SLUICE_UNROLL _Pragma("unroll")
#else
#define SLUICE_UNROLL
#endif
#ifndef __CUDA_ARCH__
#include <chrono>
#include <thread>

#include "sluice/quant.h"
#endif

namespace sluice::cuda {

struct Team {
  int index, size;
  bool is_first = true;  // Of those that take the step: it reports.

  /// What the others wrote before is seen after.
  SLUICE_STEP void sync() const {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }
  /// sync(), and whether any of them says so.
  [[nodiscard]] SLUICE_STEP bool any(bool mine) const {
#ifdef __CUDA_ARCH__
    return __syncthreads_or(mine) != 0;
#else
    return mine;
#endif
  }
};

/// A vector that is loaded and stored whole.
struct alignas(16) Vector {
  std::uint32_t word[4];
};

SLUICE_STEP int add_to(std::int32_t* sum, int value) {
#ifdef __CUDA_ARCH__
  return atomicAdd(sum, value);
#else
  return __atomic_fetch_add(sum, value, __ATOMIC_RELAXED);
#endif
}
SLUICE_STEP void add_to(unsigned long long* sum, unsigned long long value) {
#ifdef __CUDA_ARCH__
  atomicAdd(sum, value);
#else
  __atomic_fetch_add(sum, value, __ATOMIC_RELAXED);
#endif
}

// Words that other ranks, or the host, write or read.
SLUICE_STEP std::uint64_t load_relaxed(const std::uint64_t* p) {
#ifdef __CUDA_ARCH__
  return ptx::load_relaxed_sys(p);
#else
  return __atomic_load_n(p, __ATOMIC_RELAXED);
#endif
}
SLUICE_STEP std::uint64_t load_acquire(const std::uint64_t* p) {
#ifdef __CUDA_ARCH__
  return ptx::load_acquire_sys(p);
#else
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#endif
}
SLUICE_STEP void store_relaxed(std::uint64_t* p, std::uint64_t value) {
#ifdef __CUDA_ARCH__
  ptx::store_relaxed_sys(p, value);
#else
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
#endif
}
SLUICE_STEP void store_release(std::uint64_t* p, std::uint64_t value) {
#ifdef __CUDA_ARCH__
  ptx::store_release_sys(p, value);
#else
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
#endif
}

/// Flags that the ranks of a device share, not atomically read and written by the same kernel.
SLUICE_STEP int look(const int* p) {
#ifdef __CUDA_ARCH__
  return *static_cast<const volatile int*>(p);
#else
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
#endif
}
SLUICE_STEP void set(int* p, int value) {
#ifdef __CUDA_ARCH__
  *static_cast<volatile int*>(p) = value;
#else
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
#endif
}

SLUICE_STEP std::uint64_t now_ns() {
#ifdef __CUDA_ARCH__
  return ptx::global_timer();
#else
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                        std::chrono::steady_clock::now().time_since_epoch())
                                        .count());
#endif
}

/// Between two looks at a word of another rank.
SLUICE_STEP void rest() {
#ifndef __CUDA_ARCH__
  std::this_thread::sleep_for(std::chrono::microseconds(20));
#endif
}

// Every product and sum is rounded by itself.
SLUICE_STEP float add_rounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
SLUICE_STEP float multiply_rounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
SLUICE_STEP float float_of_bits(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}
/// Two channels of bf16 in a word, the first one in its lower half.
SLUICE_STEP std::uint32_t bf16_pair(float first, float second) {
#ifdef __CUDA_ARCH__
  return ptx::bf16x2_from_float(second, first);
#else
  return static_cast<std::uint32_t>(bf16_from_float(second)) << 16 | bf16_from_float(first);
#endif
}

/// The first fault of its record wins; the host clears a refusal's `claimed` when it has read it.
SLUICE_STEP void note_fault(ExchangeState* state, DeviceFault* faults, FaultRecord record,
                            const DeviceFault& fault) {
#ifdef __CUDA_ARCH__
  if (atomicCAS(&state->claimed[record], 0, 1) != 0) return;
  volatile DeviceFault* to = faults + record;
  to->operation = fault.operation, to->epoch = fault.epoch, to->missing = fault.missing;
  to->expected = fault.expected, to->seen = fault.seen, to->where = fault.where;
  to->count = fault.count, to->value = fault.value;
  __threadfence_system();
  to->kind = fault.kind;
#else
  if (__atomic_exchange_n(&state->claimed[record], 1, __ATOMIC_ACQ_REL) != 0) return;
  DeviceFault* const to = faults + record;
  to->operation = fault.operation, to->epoch = fault.epoch, to->missing = fault.missing;
  to->expected = fault.expected, to->seen = fault.seen, to->where = fault.where;
  to->count = fault.count, to->value = fault.value;
  __atomic_store_n(&to->kind, fault.kind, __ATOMIC_RELEASE);
#endif
}

}  // namespace sluice::cuda
