// Four 8x8 matrices of 16-bit elements to shared memory (sm_90; PTX ISA "stmatrix").
#pragma once

#include <stdint.h>

namespace la2::ptx {

// Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, 16-byte aligned) and, in d[m], the elements
// (row l / 4, columns 2 (l % 4) and the next) of matrix m.
__device__ __forceinline__ void stmatrix_x4(uint32_t shared, const uint32_t (&d)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(d[0]), "r"(d[1]),
               "r"(d[2]), "r"(d[3])
               : "memory");
}

}  // namespace la2::ptx
