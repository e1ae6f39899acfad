// The copy engine: boxes of a tensor between global and shared memory (sm_90; PTX ISA "cp.async.bulk.tensor").
#pragma once

#include <cuda.h>
#include <stdint.h>

namespace la2::ptx {

struct TmaBox {
  int32_t col, row, head, batch;  // of the box's first element
};

// One thread copies a box to shared memory; its bytes, counted whole also where it leaves the tensor (those elements
// become zero), arrive at `barrier`. Shared memory: a multiple of 1024 from a tile's base where the map swizzles.
__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, TmaBox box) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(box.col), "r"(box.row), "r"(box.head), "r"(box.batch)
      : "memory");
}

// One thread copies `bytes` that lie together in global memory, a multiple of 16 at a multiple of 16.
__device__ __forceinline__ void tma_load_bytes(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

// One thread stores a box; elements outside of the tensor are left out. Whoever wrote the shared memory has passed
// fence_proxy_async before the barrier that precedes this.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t shared, TmaBox box) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared), "r"(box.col), "r"(box.row), "r"(box.head), "r"(box.batch)
               : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// The stores this thread has committed no longer read shared memory.
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// They are complete.
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// One thread asks for a box to be in L2 soon.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map, TmaBox box) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(box.col),
               "r"(box.row), "r"(box.head), "r"(box.batch)
               : "memory");
}

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace la2::ptx
