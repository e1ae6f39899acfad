// A [kRows, kCols] tile of 16-bit elements in shared memory as wgmma and the copy engine want it: side by side,
// blocks of 64 columns, whose rows of 128 bytes are swizzled in units of 16 bytes.
#pragma once

#include <stdint.h>

#include "../ptx/wgmma.cuh"
#include "shared_tile.cuh"

namespace la2::tile {

template <class T, int kRows_, int kCols_>
struct SwizzledTile {
  static_assert(sizeof(T) == 2 && kCols_ % 64 == 0 && kRows_ % 8 == 0);
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kBlocks = kCols / 64;
  static constexpr int kBlockBytes = kRows * 128;
  static constexpr int kBytes = kBlocks * kBlockBytes;

  alignas(1024) T data[kRows * kCols];

  // Byte offset of element (row, 8 unit).
  __device__ static int offset(int row, int unit) {
    return (unit >> 3) * kBlockBytes + row * 128 + (((unit & 7) ^ (row & 7)) << 4);
  }
};

// A tile as operand of a warpgroup's product; step(k) is its part for the k-th 16 of the contracted dim.
// RowsAlong: the rows run along M or N, the columns are contracted. Contracted: the rows are.
template <class Tile>
struct RowsOperand {
  static constexpr ptx::Major kMajor = ptx::Major::kK;
  static constexpr int kSteps = Tile::kCols / 16;
  uint64_t descriptor;
  // From `row` on, a multiple of 8.
  __device__ __forceinline__ explicit RowsOperand(uint32_t tile, int row = 0)
      : descriptor(ptx::wgmma_descriptor(tile + row * 128, 16)) {}
  __device__ __forceinline__ uint64_t step(int k) const {
    return descriptor + static_cast<uint64_t>(((k >> 2) * Tile::kBlockBytes + (k & 3) * 32) >> 4);
  }
};
template <class Tile>
struct ColumnsOperand {
  static constexpr ptx::Major kMajor = ptx::Major::kMN;
  uint64_t descriptor;
  __device__ __forceinline__ explicit ColumnsOperand(uint32_t tile)
      : descriptor(ptx::wgmma_descriptor(tile, Tile::kBlockBytes)) {}
  __device__ __forceinline__ uint64_t step(int k) const { return descriptor + static_cast<uint64_t>((k * 2048) >> 4); }
};

// Where this lane points in a tile for ldmatrix and stmatrix, to be moved by whole blocks of 8 rows and pairs of units,
// constants after unrolling. `row` a multiple of 8, `unit` an even number, as the lane's own unit bit is the lowest.
template <class Tile>
struct SwizzledAddress {
  uint32_t address;
  __device__ __forceinline__ uint32_t at(int row, int unit) const {
    return (address ^ ((unit & 7) << 4)) + (unit >> 3) * Tile::kBlockBytes + row * 128;
  }
};

// The four 8x8 matrices of a 16x16 block in the order of an A operand: (rows 0-7, unit 0), (rows 8-15, unit 0),
// (rows 0-7, unit 1), (rows 8-15, unit 1), from (row, unit) on.
template <class Tile>
__device__ __forceinline__ SwizzledAddress<Tile> swizzled_rows_first(uint32_t tile, int row, int unit, int lane) {
  return {tile + Tile::offset(row + (lane & 15), unit + (lane >> 4))};
}
// The units first: (rows 0-7, unit 0), (rows 0-7, unit 1), (rows 8-15, unit 0), (rows 8-15, unit 1).
template <class Tile>
__device__ __forceinline__ SwizzledAddress<Tile> swizzled_units_first(uint32_t tile, int row, int unit, int lane) {
  return {tile + Tile::offset(row + (lane & 7) + ((lane >> 4) << 3), unit + ((lane >> 3) & 1))};
}

}  // namespace la2::tile
