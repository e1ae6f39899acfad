// What a block of the sm_90 kernels works on: items, chunks, and the copies of their tiles. Shared by all roles, so
// that producer and consumers walk the same stages in the same order.
#pragma once

#include <cuda.h>

#include "../ptx/fence.cuh"
#include "../ptx/launch_order.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/warpgroup.cuh"
#include "../simt/units.cuh"
#include "../tile/swizzled_tile.cuh"
#include "../trilinear.h"
#include "launch.h"

namespace la2::sm90 {

using tile::shared_address;

constexpr int kChunk = 64;  // tokens: the M of one warpgroup's product

// One segment of one sequence, one head, one slice of Dc. What a chunk needs of a unit, in 32 bits (the launch has seen
// to it that they do): consumers have few registers to keep it in.
struct Item {
  int unit;                   // where its state between segments lies
  int segment, num_segments;  // which one, and how many, of its sequence
  int sequence, state, batch, head, row_begin, length, first_col, num_chunks;
  bool is_valid, reverse;
  bool is_first, is_last;  // of its sequence, in the order of the sweep

  __device__ int chunk_at(int step) const { return reverse ? num_chunks - 1 - step : step; }
  __device__ int rows_of(int chunk) const { return min(length - chunk * kChunk, kChunk); }
  __device__ ptx::TmaBox box(int chunk) const { return {0, row_begin + chunk * kChunk, head, batch}; }
};

// Where the items of this block's job are, and in which order it takes them. What only every item asks for is computed
// anew each time: consumers have no registers to keep it. kAlone: a block has one item.
// kHasTable: units may come from a table; no gradient's do.
template <bool kAlone, bool kHasTable>
struct Schedule {
  const Division& by_slices;

  __device__ explicit Schedule(const TrilinearJob& job) : by_slices(job.by_slices) {}

  // Opaque: else what one pass computes of an item would be kept for the next.
  __device__ int first() const {
    const int block = static_cast<int>(blockIdx.x);
    return kAlone ? ptx::opaque(block) : block;
  }
  __device__ int after(int index, const TrilinearParams& params) const {
    return kAlone ? count(params) : index + static_cast<int>(gridDim.x);
  }
  // The launch has seen to it that this fits.
  __device__ int count(const TrilinearParams& params) const {
    return static_cast<int>(params.num_units) * static_cast<int>(params.sizes.heads) *
           static_cast<int>(by_slices.divisor);
  }
  __device__ int unit_and_head(int index) const { return by_slices.small_quotient(index); }

  // Of a table of units: the one that this block begins with.
  __device__ const UnitEntry& first_entry(const TrilinearParams& params) const {
    return params.units[params.by_heads.small_quotient(unit_and_head(first()))];
  }

  // Slices fastest, then heads, then units. Whole warps, every lane with the same index.
  __device__ Item item(const TrilinearParams& params, const TrilinearJob& job, int index, int slice_cols) const {
    const int heads = static_cast<int>(params.sizes.heads);
    const int both = unit_and_head(index), unit_idx = params.by_heads.small_quotient(both);
    const simt::Unit unit = simt::find_unit<true, kHasTable>(params, unit_idx);
    Item item;
    item.unit = static_cast<int>(unit.index);
    item.segment = static_cast<int>(unit.segment);
    item.num_segments = static_cast<int>(unit.num_segments);
    item.sequence = static_cast<int>(unit.sequence);
    item.state = static_cast<int>(unit.state);
    item.batch = static_cast<int>(unit.batch);
    item.head = both - unit_idx * heads;
    item.row_begin = static_cast<int>(unit.row_begin);
    item.length = static_cast<int>(unit.length);
    item.first_col = (index - both * static_cast<int>(by_slices.divisor)) * slice_cols;
    item.num_chunks = (item.length + kChunk - 1) / kChunk;
    item.is_valid = unit.valid;
    item.reverse = job.reverse;
    item.is_first = simt::ends_sweep(unit, !job.reverse);
    item.is_last = simt::ends_sweep(unit, job.reverse);
    return item;
  }
};

// A ring position: stage and the parity of its barriers.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One thread starts the copy of a [64, kCols] tile from column `first_col` on.
template <class Tile>
__device__ __forceinline__ void load_tile(uint32_t tile, const CUtensorMap* map, uint32_t barrier, ptx::TmaBox box,
                                          int first_col) {
  box.col = first_col;
#pragma unroll
  for (int block = 0; block < Tile::kBlocks; ++block, box.col += 64)
    ptx::tma_load(tile + block * Tile::kBlockBytes, map, barrier, box);
}

__device__ static const uint4 kZeros[kChunk * 128 / 16] = {};  // a block of 64 rows

// Zeros to rows [rows, 64) of a tile, by the copy engine: behind the end of a packed sequence stands the next one.
template <class Tile>
__device__ __forceinline__ void clear_rows(uint32_t tile, int rows, uint32_t barrier) {
#pragma unroll
  for (int block = 0; block < Tile::kBlocks; ++block)
    ptx::tma_load_bytes(tile + block * Tile::kBlockBytes + rows * 128, kZeros, (kChunk - rows) * 128, barrier);
}

// A chunk whose copy announced itself at `arrived` has no more than `rows` rows: the rest of what is summed over tokens
// is cleared, which arrives at `full`. One warp. A barrier `arrived` for each stage, whose parity is bit `stage` of
// `parities`.
template <class TileB, class TileC>
__device__ __forceinline__ void clear_tail(TileB& b, TileC& c, int rows, uint32_t arrived, uint32_t full, int stage,
                                           uint32_t& parities, int lane) {
  ptx::mbarrier_wait(arrived, parities >> stage & 1);
  parities ^= 1u << stage;
  if (lane != 0) return;
  ptx::mbarrier_arrive_expect(full, (TileB::kBlocks + TileC::kBlocks) * (kChunk - rows) * 128);
  clear_rows<TileC>(shared_address(&c), rows, full);
  clear_rows<TileB>(shared_address(&b), rows, full);
}

// Bytes of a row-strided matrix's 16 rows of this warp from their place in `tile`, rows < `rows` and columns < `cols`.
template <class Tile, class T>
__device__ __forceinline__ void store_rows_directly(T* to, int64_t stride, uint32_t tile, int first_row, int rows,
                                                    int cols, int lane) {
  constexpr int kUnits = Tile::kCols / 8;
  for (int i = lane; i < 16 * kUnits; i += 32) {
    const int row = first_row + i / kUnits, unit = i % kUnits;
    if (row >= rows || unit * 8 >= cols) continue;
    *reinterpret_cast<uint4*>(to + row * stride + unit * 8) =
        *static_cast<const uint4*>(__cvta_shared_to_generic(tile + Tile::offset(row, unit)));
  }
}

}  // namespace la2::sm90
