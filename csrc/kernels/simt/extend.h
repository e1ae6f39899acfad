// Host entries of what la2::extend has around the trilinear kernels: who does what, requests of no more than one
// token, rows that are zero. On every family; like launch.h.
#pragma once

#include <cuda_runtime.h>

#include "../trilinear.h"

namespace la2::simt {

// A request as the kernels see it; slots are -1 where nothing is read or written.
constexpr int64_t kPadding = -2;  // read_slots of a request whose slots are both -1: its rows are zero

// Device memory, filled by launch_extend_plan. The rows of requests and snapshots are clamped to [0, tokens).
struct ExtendTables {
  int64_t* begins;       // [requests]
  int64_t* lengths;      // [requests]
  int64_t* read_slots;   // [requests]
  int64_t* write_slots;  // [requests]
  // [requests]: where the initial state of a request with two tokens or more is copied to if is_cut, in order; else -1.
  int64_t* dense_slots;
  // [num_units], of requests with two tokens or more, which are no padding; states are requests. Those of more than
  // long_len tokens come first.
  UnitEntry* units;
  int64_t num_units, segment_len, long_len;
  int64_t long_units;             // at most, of those
  int64_t dense_count;            // states that there is room for
  UnitEntry* snapshot_units;      // [snapshots], states are snapshots
  int64_t* snapshot_read_slots;   // [snapshots]
  int64_t* snapshot_write_slots;  // [snapshots]
};

cudaError_t launch_extend_plan(const ExtendParams& params, const ExtendTables& tables, cudaStream_t stream);

// Requests of one token: output and state. Of no token: the state moves from slot to slot. Padding and the rows behind
// the last request: zero. `dense`: the initial states of all others, [.., H, D, E] in the accumulation dtype
// (data == nullptr: not wanted). overlaps: as of launch_combine.
cudaError_t launch_extend_rows(const ExtendParams& params, const ExtendTables& tables, const MutableState& dense,
                               bool overlaps, cudaStream_t stream);

}  // namespace la2::simt
