// D [64, N] (+)= A [64, 16] B [16, N] by one warpgroup, asynchronously, float32 accumulators (sm_90a; PTX ISA "wgmma").
//
// Accumulator d[8 j + i] of lane 4 g + t in warp w holds row 16 w + g + 8 (i / 2 % 2), column 8 (2 j + i / 4) + 2 t + i
// % 2; A in registers, four to 16 columns: a[0] (row g, columns 2t..), a[1] (row g + 8), a[2] (row g, columns 2t
// + 8..), a[3] (row g + 8): the accumulators of 16 columns, rounded and packed in pairs, are an A operand as they are.
//
// Between wgmma_fence and wgmma_wait the registers of accumulators and A belong to the tensor core: no other access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace la2::ptx {

// Registers written by ordinary instructions, and shared memory that a barrier covers, before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last kPending committed groups are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses to accumulators across a fence or a wait; makes no instruction.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// How an operand lies in shared memory: along K, or along M (of A) or N (of B).
enum class Major { kK, kMN };

// Where operands begin in tiles of 64 columns (128 bytes) swizzled by 128 bytes. kK: a step of 16 along K is 32 bytes,
// of 64 the next tile. kMN: a step of 16 along K is 2048 bytes; `tile_bytes` leads to the next 64 of M or N.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared, uint32_t tile_bytes) {
  constexpr uint64_t kSwizzle128 = 1, kEightRows = 1024;
  return uint64_t{(shared & 0x3ffffu) >> 4} | uint64_t{tile_bytes >> 4} << 16 | (kEightRows >> 4) << 32 |
         kSwizzle128 << 62;
}

#define LA2_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LA2_D16(i) LA2_D4(i), LA2_D4(i + 4), LA2_D4(i + 8), LA2_D4(i + 12)
#define LA2_D32 LA2_D16(0), LA2_D16(16)
#define LA2_D64 LA2_D32, LA2_D16(32), LA2_D16(48)
#define LA2_D128 LA2_D64, LA2_D16(64), LA2_D16(80), LA2_D16(96), LA2_D16(112)
#define LA2_NAMES32                                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define LA2_NAMES64                                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "  \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
  "%62, %63}, "
#define LA2_NAMES128                                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "  \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "   \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "   \
  "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "   \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, " \
  "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127}, "

// Operands behind the accumulators: %a.. by position, then whether D is accumulated, then the transpositions.
#define LA2_WGMMA_SS(shape, names, accumulators, a, b, p, ta, tb)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p                                                \
               ", 0;\n"                                                                             \
               "wgmma.mma_async.sync.aligned." shape names a ", " b ", p, 1, 1, " ta ", " tb ";\n}" \
               : accumulators                                                                       \
               : "l"(a_desc), "l"(b_desc), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))
#define LA2_WGMMA_RS(shape, names, accumulators, a0, a1, a2, a3, b, p, tb)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p                                                               \
               ", 0;\n"                                                                                            \
               "wgmma.mma_async.sync.aligned." shape names "{" a0 ", " a1 ", " a2 ", " a3 "}, " b ", p, 1, 1, " tb \
               ";\n}"                                                                                              \
               : accumulators                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate), "n"(kTransposeB))
#define LA2_WGMMA_SS_ANY(type)                                                                         \
  if constexpr (kRegs == 32)                                                                           \
    LA2_WGMMA_SS("m64n64k16.f32." type " ", LA2_NAMES32, LA2_D32, "%32", "%33", "%34", "%35", "%36");  \
  else if constexpr (kRegs == 64)                                                                      \
    LA2_WGMMA_SS("m64n128k16.f32." type " ", LA2_NAMES64, LA2_D64, "%64", "%65", "%66", "%67", "%68"); \
  else                                                                                                 \
    LA2_WGMMA_SS("m64n256k16.f32." type " ", LA2_NAMES128, LA2_D128, "%128", "%129", "%130", "%131", "%132")
#define LA2_WGMMA_RS_ANY(type)                                                                                       \
  if constexpr (kRegs == 32)                                                                                         \
    LA2_WGMMA_RS("m64n64k16.f32." type " ", LA2_NAMES32, LA2_D32, "%32", "%33", "%34", "%35", "%36", "%37", "%38");  \
  else if constexpr (kRegs == 64)                                                                                    \
    LA2_WGMMA_RS("m64n128k16.f32." type " ", LA2_NAMES64, LA2_D64, "%64", "%65", "%66", "%67", "%68", "%69", "%70"); \
  else                                                                                                               \
    LA2_WGMMA_RS("m64n256k16.f32." type " ", LA2_NAMES128, LA2_D128, "%128", "%129", "%130", "%131", "%132", "%133", \
                 "%134")

// N = 2 kRegs; `accumulate` 0: D = A B. T: __nv_bfloat16 or __half, of A and B.
template <class T, Major kMajorA, Major kMajorB, int kRegs>
__device__ __forceinline__ void wgmma(float (&d)[kRegs], uint64_t a_desc, uint64_t b_desc, int accumulate) {
  static_assert(kRegs == 32 || kRegs == 64 || kRegs == 128);
  constexpr int kTransposeA = kMajorA == Major::kMN, kTransposeB = kMajorB == Major::kMN;
  if constexpr (std::is_same<T, __half>::value) {
    LA2_WGMMA_SS_ANY("f16.f16");
  } else {
    LA2_WGMMA_SS_ANY("bf16.bf16");
  }
}

// The same with A in registers.
template <class T, Major kMajorB, int kRegs>
__device__ __forceinline__ void wgmma(float (&d)[kRegs], const uint32_t (&a)[4], uint64_t b_desc, int accumulate) {
  static_assert(kRegs == 32 || kRegs == 64 || kRegs == 128);
  constexpr int kTransposeB = kMajorB == Major::kMN;
  if constexpr (std::is_same<T, __half>::value) {
    LA2_WGMMA_RS_ANY("f16.f16");
  } else {
    LA2_WGMMA_RS_ANY("bf16.bf16");
  }
}

#undef LA2_WGMMA_SS_ANY
#undef LA2_WGMMA_RS_ANY
#undef LA2_WGMMA_SS
#undef LA2_WGMMA_RS
#undef LA2_NAMES32
#undef LA2_NAMES64
#undef LA2_NAMES128
#undef LA2_D128
#undef LA2_D64
#undef LA2_D32
#undef LA2_D16
#undef LA2_D4

}  // namespace la2::ptx
