// What the sm80 kernels are made of: the tile and the roles of an instance, its shared memory, a warp's registers.
#pragma once

#include <type_traits>

#include "../../core/tile.h"
#include "../tile/decay.cuh"
#include "../tile/shared_tile.cuh"

namespace la2::sm80 {

// kTileA: Da rounded up to a tile, the missing columns read as zero. kSlice: the columns of c and out of a block.
// kSplit: the two operands that are rounded from float32, the state and the weighted c, go in as a sum of two 16-bit
// numbers. The gradients need it for an error below that of their own rounding (../DESIGN.md); out does not.
// kStateOnly: only the state is gathered, from zero, into job.local, or a piece of it.
template <class T_, int kTileA_, int kSlice_, bool kSplit_, bool kSlopeGrad_, bool kStateOnly_>
struct Config {
  using T = T_;
  static constexpr int kTileA = kTileA_;
  static constexpr int kSlice = kSlice_;
  static constexpr bool kSplit = kSplit_;
  static constexpr bool kStateOnly = kStateOnly_;
  static constexpr bool kSlopeGrad = kSlopeGrad_;
  static_assert(!kStateOnly || !kSlopeGrad, "states have nothing of it");

  // 64 tokens; 32 where 256 columns would not leave two stages room in 99 KB of shared memory.
  static constexpr int kChunk = kTileA <= 128 ? 64 : 32;

  // Four more warps copy, and compute a chunk's scores while the others walk the chunk before.
  static constexpr bool kAhead = sm80_is_ahead({kTileA, kSlice, kChunk}, kSlopeGrad);
  static constexpr int kHelpers = kAhead ? 4 : 0;
  // Out instead has two roles of four warps (two_roles.cuh), of which these four more make the outputs.
  static constexpr bool kTwoRoles = kAhead && !kSplit && !kStateOnly;
  // Each of the others owns 16 columns of c and out; of two roles each warp 32.
  static constexpr int kBlockCols = kTwoRoles ? 2 : 1;  // in blocks of 16
  static constexpr int kWarpCols = 16 * kBlockCols;
  static constexpr int kWarps = kSlice / kWarpCols;
  static constexpr int kThreads = 32 * (kWarps + kHelpers);
  static constexpr int kCopyThreads = kAhead ? 32 * kHelpers : kThreads;
  // Gradients' main pass with helpers, which also store the results. The others do not wait for each other.
  static constexpr bool kGradientsAhead = kAhead && kSplit && !kStateOnly;

  // The scores [kChunk, kChunk] are shared out among the warps in bands of 16 rows, and columns within a band.
  static constexpr int kBands = kChunk / 16;
  static constexpr int kScoreWarps = kAhead ? kHelpers : kWarps;
  static constexpr int kBandCols = kChunk * kBands / kScoreWarps;
  static_assert(kBandCols % 16 == 0, "a warp computes whole 16x16 blocks of scores");

  using TileA = tile::SharedTile<T, kChunk, kTileA>;
  using TileC = tile::SharedTile<T, kChunk, kSlice>;
  using TileP = tile::SharedTile<T, kChunk, kChunk>;
  using TileOut = tile::SharedTile<T, kChunk, kWarpCols>;  // a warp's columns of out, of two roles

  static constexpr int kScoreTiles = kAhead ? 2 : 1;
  // The state pass has no a and no scores, and room for as many. With five, a helper was stuck issuing copies that
  // nobody waited for (../DESIGN.md).
  static constexpr int kStages = (kAhead && !kTwoRoles) || kStateOnly ? 3 : 2;
};

template <class Cfg>
struct SlopeGradStorage {
  typename Cfg::TileP scores;  // [C, C] masked, times the distance
  const typename Cfg::T* x;    // the operand that pairs with out, at this segment and slice
  float* chunk_dots;           // nullptr: not wanted of this job
  float dots[Cfg::kWarps][3];
};

enum class StorageOf { kOneRole, kStatePass, kTwoRoles };
template <class Cfg, StorageOf = Cfg::kStateOnly  ? StorageOf::kStatePass
                                 : Cfg::kTwoRoles ? StorageOf::kTwoRoles
                                                  : StorageOf::kOneRole>
struct SharedStorage {
  typename Cfg::TileA a[Cfg::kStages];           // [C, Da]
  typename Cfg::TileA b[Cfg::kStages];           // [C, Da]
  typename Cfg::TileC c[Cfg::kStages];           // [C, slice]
  typename Cfg::TileP scores[Cfg::kScoreTiles];  // [C, C] masked
  tile::Decay<Cfg::kChunk> decay;
  SlopeGradStorage<Cfg> slope_grad[Cfg::kSlopeGrad ? 1 : 0];
};
template <class Cfg>
struct SharedStorage<Cfg, StorageOf::kStatePass> {
  typename Cfg::TileA b[Cfg::kStages];
  typename Cfg::TileC c[Cfg::kStages];
  tile::Decay<Cfg::kChunk> decay;
};

// ---- registers of one warp

// The state, transposed: rows are 16 of this warp's columns of c, columns are Da. As accumulator of the update
// Z^T += c^T b it is laid out exactly as a . Z wants its B operand, so the state never passes through memory.
template <class Cfg>
using StateFragment = float[Cfg::kBlockCols][Cfg::kTileA / 8][4];
// 16 rows of out, 8 columns a piece; and all rows.
template <class Cfg>
using OutRows = float[2 * Cfg::kBlockCols][4];
template <class Cfg>
using OutFragment = OutRows<Cfg>[Cfg::kChunk / 16];

struct Lane {
  int warp, lane, group, pair;  // lane = 4 group + pair
  __device__ explicit Lane(unsigned thread = threadIdx.x)
      : warp(thread / 32), lane(thread % 32), group(lane / 4), pair(lane % 4) {}
};

// A segment of so few chunks is gathered whole: its window is not worth waiting for the slope, 0.7 us of 17 and more
// (estimated).
constexpr int kFewChunks = 16;

}  // namespace la2::sm80
