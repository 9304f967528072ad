// wgmma.cuh - warpgroup matrix multiply: A e4m3 or e5m2 in registers, B e4m3 in shared memory, f32
// sums.
//
// One function per shape and type of A, one instruction per function. A is [64, 32], B is [32, N]
// stored as N rows of K-major bytes (128 B swizzle), D is [64, N].
// Thread t of the warpgroup holds, with w = t / 32 and l = t % 32:
//   a[0] rows 16w + l/4      k 4(l%4)..+3        a[1] the same k, row + 8
//   a[2] as a[0], k + 16                         a[3] as a[1], k + 16
//   d[4j + i] row 16w + l/4 + 8(i/2), column 8j + 2(l%4) + i%2
// `accumulate` false starts from zero.
// See the PTX manual, "Register Fragments for wgmma.mma_async".
#pragma once

#include <cstdint>

namespace sluice::cuda::ptx {

/// Orders register accesses before the first wgmma that follows.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

/// Low word of the descriptor of a K-major e4m3 tile with 128-byte rows and 128 B swizzle, rows in
/// groups of 8 that are 1024 B apart. `address` is a shared address, 1024 B aligned; k step i of 32
/// adds 2 i. The high word is the same for all such tiles: 0x40000040 (swizzle, stride) below.
__device__ __forceinline__ std::uint32_t smem_descriptor(std::uint32_t address) {
  constexpr std::uint32_t kLeading = 1u << 16;  // ignored for swizzled K-major
  return kLeading | ((address & 0x3ffff) >> 4);
}

// clang-format off
// The first N sums: as operands of the text, and as what they stand for.
#define SLUICE_WGMMA_TEXT_4 "%0, %1, %2, %3"
#define SLUICE_WGMMA_TEXT_8 SLUICE_WGMMA_TEXT_4 ", %4, %5, %6, %7"
#define SLUICE_WGMMA_TEXT_16 SLUICE_WGMMA_TEXT_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SLUICE_WGMMA_TEXT_24 SLUICE_WGMMA_TEXT_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SLUICE_WGMMA_TEXT_32 SLUICE_WGMMA_TEXT_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SLUICE_WGMMA_TEXT_48 SLUICE_WGMMA_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39" \
                                               ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SLUICE_WGMMA_TEXT_64 SLUICE_WGMMA_TEXT_48 ", %48, %49, %50, %51, %52, %53, %54, %55" \
                                               ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SLUICE_WGMMA_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SLUICE_WGMMA_SUMS_8(i) SLUICE_WGMMA_SUMS_4(i), SLUICE_WGMMA_SUMS_4(i + 4)
#define SLUICE_WGMMA_SUMS_16(i) SLUICE_WGMMA_SUMS_8(i), SLUICE_WGMMA_SUMS_8(i + 8)
#define SLUICE_WGMMA_SUMS_24(i) SLUICE_WGMMA_SUMS_16(i), SLUICE_WGMMA_SUMS_8(i + 16)
#define SLUICE_WGMMA_SUMS_32(i) SLUICE_WGMMA_SUMS_16(i), SLUICE_WGMMA_SUMS_16(i + 16)
#define SLUICE_WGMMA_SUMS_48(i) SLUICE_WGMMA_SUMS_32(i), SLUICE_WGMMA_SUMS_16(i + 32)
#define SLUICE_WGMMA_SUMS_64(i) SLUICE_WGMMA_SUMS_32(i), SLUICE_WGMMA_SUMS_32(i + 32)

// One shape: N columns, R = N / 2 sums of a thread, and the numbers of the operands behind those:
// a[0] to a[3], b, accumulate.
#define SLUICE_WGMMA(name, type, N, R, A0, A1, A2, A3, B, P)                                      \
  __device__ __forceinline__ void name(float (&d)[R], const std::uint32_t (&a)[4],                \
                                       std::uint32_t b, bool accumulate) {                        \
    asm volatile(                                                                                 \
        "{\n.reg .pred p;\n.reg .b64 b;\n"                                                        \
        "setp.ne.b32 p, %" #P ", 0;\nmov.b64 b, {%" #B ", 0x40000040};\n"                         \
        "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32." type ".e4m3 "                           \
        "{" SLUICE_WGMMA_TEXT_##R "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, b, p, 1, 1;\n}\n" \
        : SLUICE_WGMMA_SUMS_##R(0)                                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(static_cast<int>(accumulate))); \
  }

#define SLUICE_WGMMA_SHAPES(name, type)                      \
  SLUICE_WGMMA(name, type, 8, 4, 4, 5, 6, 7, 8, 9)           \
  SLUICE_WGMMA(name, type, 16, 8, 8, 9, 10, 11, 12, 13)      \
  SLUICE_WGMMA(name, type, 32, 16, 16, 17, 18, 19, 20, 21)   \
  SLUICE_WGMMA(name, type, 48, 24, 24, 25, 26, 27, 28, 29)   \
  SLUICE_WGMMA(name, type, 64, 32, 32, 33, 34, 35, 36, 37)   \
  SLUICE_WGMMA(name, type, 96, 48, 48, 49, 50, 51, 52, 53)   \
  SLUICE_WGMMA(name, type, 128, 64, 64, 65, 66, 67, 68, 69)
// clang-format on

SLUICE_WGMMA_SHAPES(wgmma_m64k32, "e4m3")
SLUICE_WGMMA_SHAPES(wgmma_m64k32_e5m2, "e5m2")

#undef SLUICE_WGMMA_TEXT_4
#undef SLUICE_WGMMA_TEXT_8
#undef SLUICE_WGMMA_TEXT_16
#undef SLUICE_WGMMA_TEXT_24
#undef SLUICE_WGMMA_TEXT_32
#undef SLUICE_WGMMA_TEXT_48
#undef SLUICE_WGMMA_TEXT_64
#undef SLUICE_WGMMA_SUMS_4
#undef SLUICE_WGMMA_SUMS_8
#undef SLUICE_WGMMA_SUMS_16
#undef SLUICE_WGMMA_SUMS_24
#undef SLUICE_WGMMA_SUMS_32
#undef SLUICE_WGMMA_SUMS_48
#undef SLUICE_WGMMA_SUMS_64
#undef SLUICE_WGMMA
#undef SLUICE_WGMMA_SHAPES

}  // namespace sluice::cuda::ptx
