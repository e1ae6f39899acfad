// Four 8x8 matrices of 16-bit elements from shared memory (PTX ISA "ldmatrix").
#pragma once

#include <stdint.h>

namespace la2::ptx {

// Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, 16-byte aligned). Lane l receives in d[m] the
// elements (row l / 4, columns 2 (l % 4) and the next) of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

// The same of the transposed matrices: lane l receives (rows 2 (l % 4) and the next, column l / 4).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

}  // namespace la2::ptx
