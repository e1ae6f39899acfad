// What an instance of the trilinear kernel for Hopper is, and its shared memory. The notebook is ../DESIGN.md.
#pragma once

#include <type_traits>

#include "../../core/tile.h"
#include "steps.cuh"

namespace la2::sm90 {

// kTileA: Da rounded up, the missing columns read as zero. kSlice: the columns of Dc of a block.
// kSplit_: launch.h. dk and dv together split the masked scores as well.
// kBoth: a second job runs along, T(a', c, b) beside T(a, b, c), whose state is the transposed of the first one's: dv
// beside dk. One slice is all of Dc then.
// kSilu: operands that job.silu names go through SiLU first (out alone).
template <class T_, int kTileA_, int kSlice_, Split kSplit_, bool kBoth_ = false, bool kSilu_ = false>
struct Config {
  using T = T_;
  static constexpr int kTileA = kTileA_, kSlice = kSlice_;
  static constexpr bool kSplit = kSplit_ != Split::kNone, kSplitsValues = kSplit_ == Split::kStateAndValues;
  static constexpr bool kBoth = kBoth_, kSilu = kSilu_;
  static constexpr bool kAlone = false;                                // one item to a block (work.cuh)
  static constexpr bool kNeedsRange = std::is_same<T, __half>::value;  // 65504 ends it, and a state may not

  using TileA = tile::SwizzledTile<T, kChunk, kTileA>;
  using TileC = tile::SwizzledTile<T, kChunk, kSlice>;
  using TileZ = tile::SwizzledTile<T, kSlice, kTileA>;  // the state transposed

  static constexpr int kParts = kSplit ? 2 : 1;  // of the state: what 16 bits hold, and the rest

  // SiLU is computed by a warpgroup and by the warps that share the producer's.
  static constexpr int kActivatorGroups = kSilu ? 1 : 0, kActivators = kSilu ? 3 + 4 : 0;  // warps

  // Of out's narrow slices, whose blocks have many chunks to walk, the outputs are written by two warpgroups that take
  // the chunks in turns, and a chunk's update of the state is in flight while the state before it is handed over. Wider
  // ones and gradients have no registers for it, and with SiLU there are others at work.
  static constexpr int kOutputGroups = kSlice == 64 && kTileA <= 128 && !kSplit && !kBoth && !kSilu ? 2 : 1;
  static constexpr bool kTakesTurns = kOutputGroups == 2;
  static_assert(kTakesTurns == (sm90_sums_states({kTileA, kSlice, kChunk}, 1) && !kSplit && !kBoth && !kSilu));
  // In shared memory; where a chunk's update is in flight, in registers (HeldWeights).
  static constexpr bool kWeighsInPairs = kWeighsByPairs<T, kTileA, kSplit> && !kTakesTurns;
  static constexpr bool kHasTable = !kSplit;                            // Schedule (work.cuh)
  static constexpr int kGroups = 2 + kActivatorGroups + kOutputGroups;  // producer, .., output and state warpgroups
  static constexpr int kThreads = 128 * kGroups;
  // dk and dv leave shared memory by a warp each of the producer's warpgroup: for what one output warpgroup waits
  // there, the tensor core waits too.
  static constexpr int kStorers = kBoth ? 2 : 0;
  static constexpr int kProducerRegisters = kSilu ? 64 : 48;  // activators' too
  static constexpr int kOutputRegisters = kSilu ? 176 : kTakesTurns ? 128 : kBoth ? 232 : 224;
  static constexpr int kStateRegisters = kTakesTurns || kSilu ? 208 : 224;
  static constexpr int kLaunchRegisters = kGroups == 4 ? 128 : 168;  // what the hardware gives each of kThreads
  static_assert((1 + kActivatorGroups) * kProducerRegisters + kOutputGroups * kOutputRegisters + kStateRegisters <=
                kGroups * kLaunchRegisters);  // or the last one waits for ever

  // a is read from shared memory once, and held in registers for its two products. Where only two stages of everything
  // would fit, it has two of its own, which are free again before the chunk is begun.
  static constexpr int kStagesOfA = kTileA == 256 && !kSplit ? 2 : 0;
  static constexpr bool kHoldsA = kStagesOfA > 0 || (kTileA == 128 && kSlice == 128 && !kSplit && !kBoth);

  // What fits into 227 KB: a second buffer of the state where there is one operand of each, then stages, at most 4.
  static constexpr int kStateBuffers = kSplit || kStagesOfA > 0 ? 1 : 2;
  static constexpr int kStageBytes = (kStagesOfA > 0 ? 1 : 2) * TileA::kBytes + (kBoth ? 2 : 1) * TileC::kBytes;
  static constexpr int kOutBytes = kOutputGroups * TileC::kBytes + (kBoth ? TileA::kBytes : 0);
  static constexpr int kFixedBytes = kStateBuffers * kParts * TileZ::kBytes + kOutBytes + kStagesOfA * TileA::kBytes;
  static constexpr int kStagesThatFit = (224 * 1024 - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 4 ? kStagesThatFit : 4;
  static_assert(kStages >= 2);
  static_assert(!kSilu || (!kSplit && !kBoth && kStagesOfA == 0));
  // A warpgroup that takes turns waits for every phase of its barriers, which those of the other's chunks are not.
  static_assert(kStages % kOutputGroups == 0 && kStateBuffers % kOutputGroups == 0);

  // racecheck does not follow a warp of which one lane arrives for all, and reports its reads of c against a tail that
  // is cleared later in the same stage: where that comes round soonest, all lanes of the state's warps arrive if
  // sequences are packed (../DESIGN.md).
  static constexpr bool kIsFollowed = kStages == 2 && !kBoth;
};

template <class Cfg>
struct Stage {
  static constexpr bool kHasA = Cfg::kStagesOfA == 0;
  typename Cfg::TileA b, a[kHasA];           // [C, Da]
  typename Cfg::TileC c;                     // [C, slice]
  typename Cfg::TileC second_a[Cfg::kBoth];  // [C, Dc]: a of the second job, whose b is c and whose c is b
};

// Arrivals: the copy engine's bytes and the producer (full, tail, full_a; with SiLU landed in place of full, where then
// every thread arrives that takes it); each warp of the state warpgroup and of the output warpgroup whose chunk it is
// (empty), of the latter (empty_a); every warp of the state warpgroup (state_full), of the chunk's output warpgroup
// (state_empty, staged); the warp that stores (stored).
template <class Cfg>
struct SharedStorage {
  Stage<Cfg> stages[Cfg::kStages];
  typename Cfg::TileA a[Cfg::kStagesOfA];
  typename Cfg::TileZ state[Cfg::kStateBuffers][Cfg::kParts];  // Z^T [slice, Da] as it enters a chunk
  typename Cfg::TileC out[Cfg::kOutputGroups][1];              // [C, slice] on its way to memory
  typename Cfg::TileA second_out[Cfg::kBoth];                  // [C, Da]
  Weights weights[Cfg::kOutputGroups];                         // of an output warpgroup
  Item item;                                                   // its own, where it has no registers to keep it
  tile::Decay<kChunk> powers;                                  // of the state warpgroup, which may be an item ahead
  PairWeights pair_weights[Cfg::kWeighsInPairs];               // the same
  float range_undo[Cfg::kStateBuffers];                        // fp16: the state's operand was divided by this
  alignas(16) float largest[4];                                // read as one vector
  uint64_t full[Cfg::kStages], empty[Cfg::kStages], tail[Cfg::kStages];
  uint64_t landed[Cfg::kStages * Cfg::kSilu];
  uint64_t full_a[Cfg::kStagesOfA], empty_a[Cfg::kStagesOfA];
  uint64_t state_full[Cfg::kStateBuffers], state_empty[Cfg::kStateBuffers];
  uint64_t staged[Cfg::kStorers], stored[Cfg::kStorers];
};

enum NamedBarrier { kOutputWarps = 1, kStateWarps = 2, kSecondOutputWarps = 3 };

}  // namespace la2::sm90
