// Host entries of what la2::extend has around the trilinear kernels: who does what, requests of no more than one
// token, rows that are zero. On every family; like launch.h.
#pragma once

#include <cuda_runtime.h>

#include "../trilinear.h"

namespace la2::simt {

// A request as the kernels see it; slots are -1 where nothing is read or written.
constexpr int64_t kPadding = -2;  // read_slots of a request whose slots are both -1: its rows are zero

// Blocks of the main pass that walk the same units, one for each head and slice, are a lane. It walks one unit after
// the other, each costs it item_tokens besides.
constexpr int kMostLanes = 256;
struct Lanes {
  int count;            // 0: a block walks whatever comes next in the order of `units`
  int64_t item_tokens;  // at least 1
  UnitEntry* walks;     // [num_units, lanes]: the units dealt out, in each lane up to the first absent one
  // Where blocks of the main pass may begin beside those of the state pass, no combine pass being in between: of a
  // lane, of the state pass for each unit that is cut, multiprocessors. pass_blocks 0: they may not.
  int blocks, pass_blocks, num_sms;
};

// Which requests are cut into segments: the lengths are the device's alone. Those of more than segment_len tokens.
// if_it_gains: of more than a lane walks on average as well; and none if no request has more than that by pass_tokens,
// which is what the passes before the main one cost.
struct Cutting {
  int64_t segment_len;  // 0: nothing is cut
  bool if_it_gains;
  int64_t pass_tokens;
};

// Device memory, filled by launch_extend_plan. The rows of requests and snapshots are clamped to [0, tokens).
struct ExtendTables {
  int64_t* begins;       // [requests]
  int64_t* lengths;      // [requests]
  int64_t* read_slots;   // [requests]
  int64_t* write_slots;  // [requests]
  // [num_units], of requests with two tokens or more, which are no padding; states are requests. Those that are cut
  // come first, long_units at most, then others of more than long_len tokens.
  UnitEntry* units;
  int64_t num_units, long_units, long_len;
  Lanes lanes;
  Cutting cutting;
  UnitEntry* snapshot_units;      // [snapshots], states are snapshots
  int64_t* snapshot_read_slots;   // [snapshots]
  int64_t* snapshot_write_slots;  // [snapshots]
};

cudaError_t launch_extend_plan(const ExtendParams& params, const ExtendTables& tables, cudaStream_t stream);

// Requests of one token: output and state. Of no token: the state moves from slot to slot. Padding and the rows behind
// the last request: zero. overlaps: as of launch_combine.
cudaError_t launch_extend_rows(const ExtendParams& params, const ExtendTables& tables, bool overlaps,
                               cudaStream_t stream);

}  // namespace la2::simt
