// A [kRows, kCols] tile of 16-bit elements in shared memory, swizzled in units of 16 bytes so that eight rows at
// one column unit fall into eight different bank groups (ldmatrix, 16-byte stores), and its coordinates.
#pragma once

#include <stdint.h>

#include "../ptx/cp_async.cuh"

namespace la2::tile {

template <class T, int kRows_, int kCols_>
struct SharedTile {
  static_assert(sizeof(T) == 2 && (kCols_ == 32 || kCols_ % 64 == 0));
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kUnits = kCols / 8;  // of 16 bytes in a row

  alignas(128) T data[kRows * kCols];

  // Byte offset of element (row, 8 unit).
  __device__ static int offset(int row, int unit) {
    const int swizzled = kUnits >= 8 ? unit ^ (row & 7) : unit ^ ((row >> 1) & 3);
    return (row * kUnits + swizzled) * 16;
  }
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Where this lane points in a tile, to be moved by whole blocks. One register a tile: moving by 8 rows keeps the
// swizzle's row term, so the new address is one exclusive or with a constant and a constant offset.
template <class Tile>
struct BlockAddress {
  uint32_t address;

  // `row` a multiple of 8, both constants after unrolling, and no carry out of the starting unit's zero bits.
  __device__ __forceinline__ uint32_t at(int row, int unit) const {
    constexpr int kMask = Tile::kUnits >= 8 ? 7 : 3;
    return (address ^ ((unit & kMask) * 16)) + (unit & ~kMask) * 16 + row * Tile::kUnits * 16;
  }
};

// For ldmatrix.x4 of 16x16 blocks. The four matrices in the order of the A operand: (rows 0-7, unit 0), (rows 8-15,
// unit 0), (rows 0-7, unit 1), (rows 8-15, unit 1). Blocks are counted from (row, unit), a multiple of 16 and an even
// number.
template <class Tile>
__device__ __forceinline__ BlockAddress<Tile> blocks_rows_first(const Tile& tile, int row, int unit, int lane) {
  return {shared_address(tile.data) + Tile::offset(row + (lane & 15), unit + (lane >> 4))};
}
// The units first: (rows 0-7, unit 0), (rows 0-7, unit 1), (rows 8-15, unit 0), (rows 8-15, unit 1).
template <class Tile>
__device__ __forceinline__ BlockAddress<Tile> blocks_units_first(const Tile& tile, int row, int unit, int lane) {
  return {shared_address(tile.data) + Tile::offset(row + (lane & 7) + ((lane >> 4) << 3), unit + ((lane >> 3) & 1))};
}
// Eight rows, four units.
template <class Tile>
__device__ __forceinline__ BlockAddress<Tile> rows_of_units(const Tile& tile, int row, int lane) {
  return {shared_address(tile.data) + Tile::offset(row + (lane & 7), lane >> 3)};
}

// Starts the copy of rows [0, rows) and columns [0, cols) of a row-strided matrix; the rest of the tile becomes
// zero. 16-byte aligned rows, cols a multiple of 8.
template <class Tile, int kThreads, class T>
__device__ __forceinline__ void copy_rows_async(uint32_t base, const T* source, int64_t stride, int rows, int cols,
                                                int thread) {
  static_assert(kThreads % Tile::kUnits == 0);
  constexpr int kRowStep = kThreads / Tile::kUnits;
  const int unit = thread % Tile::kUnits;
  const int first_row = thread / Tile::kUnits;
  const bool in_cols = unit * 8 < cols;
  const T* from = source + first_row * stride + unit * 8;
#pragma unroll 4
  for (int row = first_row; row < Tile::kRows; row += kRowStep, from += kRowStep * stride) {
    const bool valid = in_cols && row < rows;
    ptx::cp_async_16(base + Tile::offset(row, unit), valid ? from : source, valid);
  }
}

// How kThreads threads share out a tile by 16 bytes: `kCount` rounds, kRows further on each.
template <class Tile, int kThreads>
struct CopyRounds {
  static constexpr int kRows = kThreads / Tile::kUnits, kCount = Tile::kRows / kRows;
  static_assert(kThreads % Tile::kUnits == 0 && Tile::kRows % kRows == 0 && kRows % 8 == 0);
  int row, unit;
  __device__ __forceinline__ explicit CopyRounds(int thread)
      : row(thread / Tile::kUnits), unit(thread % Tile::kUnits) {}
  // Byte offset; the swizzle is the same eight rows on.
  __device__ __forceinline__ int offset(int round) const {
    return Tile::offset(row, unit) + round * kRows * Tile::kUnits * 16;
  }
  // Rounds that this thread has within rows [0, rows) and columns [0, cols).
  __device__ __forceinline__ int count_within(int rows, int cols) const {
    return unit * 8 < cols ? (rows - row + kRows - 1) / kRows : 0;
  }
};

// copy_rows_async, with nothing to choose for a thread where the tile is whole.
template <int kThreads, class Tile, class T>
__device__ __forceinline__ void copy_in_rounds_async(Tile& tile, const T* source, int64_t stride, int rows, int cols,
                                                     int thread) {
  using Rounds = CopyRounds<Tile, kThreads>;
  const Rounds rounds(thread);
  const uint32_t to = shared_address(tile.data);
  const T* from = source + rounds.row * stride + rounds.unit * 8;
  if (rows == Tile::kRows && cols == Tile::kCols) {
#pragma unroll
    for (int i = 0; i < Rounds::kCount; ++i, from += Rounds::kRows * stride)
      ptx::cp_async_16(to + rounds.offset(i), from, true);
    return;
  }
  const int count = rounds.count_within(rows, cols);
#pragma unroll 1
  for (int i = 0; i < Rounds::kCount; ++i, from += Rounds::kRows * stride)
    ptx::cp_async_16(to + rounds.offset(i), i < count ? from : source, i < count);
}

}  // namespace la2::tile
