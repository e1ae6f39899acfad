// Host entries of what la2::extend has around the trilinear kernels: who does what, requests of no more than one
// token, rows that are zero. On every family; like launch.h.
#pragma once

#include <cuda_runtime.h>

#include "../trilinear.h"

namespace la2::simt {

// A request as the kernels see it; slots are -1 where nothing is read or written.
constexpr int64_t kPadding = -2;  // read_slots of a request whose slots are both -1: its rows are zero

// Which requests are cut into segments: the lengths are the device's alone. Those of more than segment_len tokens, but
// where `lanes` sequences are walked side by side, only those that would be walked longer than a lane is busy on
// average; and none if no request is so by more than pass_tokens, which the passes before the main one cost. A request
// costs its lane item_tokens besides.
struct Cutting {
  int64_t segment_len;                    // 0: nothing is cut
  float lanes, item_tokens, pass_tokens;  // lanes == 0: all those
};

// Initial states of requests that are cut: the last segment may be done with a slot before the first one reads it. A
// copy has the pool's strides, so that kernels read either through offsets from one address.
struct Copies {
  void* data;
  int64_t count, stride_s;           // room; elements from one to the next
  int64_t pool_offset, copy_offset;  // from that address to the pool and to the copies, in elements
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
  Cutting cutting;
  Copies copies;
  int64_t* copy_slots;            // [requests]: which copy is made of the initial state; else -1
  int64_t* initial_offsets;       // [requests]: where it is read then, in elements; -1: nowhere. As of copies.count > 0
  UnitEntry* snapshot_units;      // [snapshots], states are snapshots
  int64_t* snapshot_read_slots;   // [snapshots]
  int64_t* snapshot_write_slots;  // [snapshots]
};

cudaError_t launch_extend_plan(const ExtendParams& params, const ExtendTables& tables, cudaStream_t stream);

// Requests of one token: output and state. Of no token: the state moves from slot to slot. Padding and the rows behind
// the last request: zero. The tables' copies are made. overlaps: as of launch_combine.
cudaError_t launch_extend_rows(const ExtendParams& params, const ExtendTables& tables, bool overlaps,
                               cudaStream_t stream);

}  // namespace la2::simt
