// Barriers in shared memory that also count the bytes of asynchronous copies (sm_90; PTX ISA "mbarrier").
#pragma once

#include <stdint.h>
#if defined(LA2_DEBUG_BARRIERS)
#include <stdio.h>
#endif

namespace la2::ptx {

// A phase completes when `count` arrivals and all announced bytes are in. One thread initialises; the others, and the
// copy engine, may use the barrier after mbarrier_init_fence and a barrier of the block.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Its memory may serve something else.
__device__ __forceinline__ void mbarrier_invalidate(uint32_t barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives and announces bytes that copies will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the phase of this parity to complete: 0 for the first, then 1, 0, ... On a fresh barrier parity 1 has
// completed already. A debug build gives up after some seconds and says where.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if defined(LA2_DEBUG_BARRIERS)
  for (int tries = 0; tries < (1 << 22); ++tries) {
#else
  while (true) {
#endif
    uint32_t done;
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done != 0) return;
  }
#if defined(LA2_DEBUG_BARRIERS)
  printf("la2: block (%d, %d) thread %d waits in vain at barrier 0x%x for parity %u\n", blockIdx.x, blockIdx.y,
         threadIdx.x, barrier, parity);
  __trap();
#endif
}

}  // namespace la2::ptx
