// Asynchronous 16-byte copies from global to shared memory (sm_80 and later; PTX ISA "cp.async").
#pragma once

#include <stdint.h>

namespace la2::ptx {

// Copies 16 bytes, or writes 16 zero bytes when `valid` is false (then `source` is not read, yet must be a
// legal address). Both addresses are multiples of 16. .cg: past the L1, since every byte is read once.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

// Waits for every copy this thread has issued; a barrier must follow before other threads read them.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// What this thread has issued since the last commit is a group, which may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the last kPending; then a barrier, as above.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace la2::ptx
