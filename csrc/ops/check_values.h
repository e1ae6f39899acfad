// Values that lie on the device: slots, boundaries, slopes, counts. An operator does not look at them on a GPU, since
// that would wait for it; out of range, they are padding or are clamped, and the result is silently not the one that
// was meant. With LA2_CHECK=1 in the environment every call copies them to the host and looks: a debug switch, read in
// every call, without which nothing here is done. While a CUDA graph is captured nothing can be read, and nothing is
// checked.
//
// Every function raises one sentence that names operator, argument, place, what stands there and what was expected.
#pragma once

#include "arguments.h"

namespace la2::ops {

// LA2_CHECK is set, and neither empty nor 0.
bool values_are_checked();

// Slots, or states of slots, that a call uses: int32 or int64 [rows], any strides. Each is less than `num_slots`;
// a negative one is padding. for_writing: no slot but padding occurs twice, since rows are written in no order.
void check_slots(const char* op, const char* name, const Tensor& slots, int64_t num_slots, bool for_writing);

// Boundaries of packed sequences, int32 or int64 [num_seqs + 1]: ascending from 0 on to at most `tokens`, which is
// `what`. covers_all: they begin at 0 and end at `tokens`, for an operator that leaves other rows of its result
// unwritten.
void check_seq_offsets(const char* op, const char* name, const Tensor& offsets, int64_t tokens, bool covers_all,
                       const char* what = "the number of tokens");

// Slopes, [heads] or [num_seqs, heads]: finite and not negative.
void check_slopes(const char* op, const Tensor& slope);

// Counts, int32 or int64 [rows], from 0 to `most`, which is `what` ("the number of draft tokens").
void check_counts(const char* op, const char* name, const Tensor& counts, int64_t most, const char* what);

// Requests against a pool (la2::extend), requests = cu_seqlens.size(0) - 1; arguments as in its schema. Boundaries;
// slots that are there; token counts of snapshots within their request and ascending; no slot written twice, as a write
// slot or for a snapshot, nor read by one request and written by another. Snapshots that no request has are not looked
// at.
struct Requests {
  const char* op;
  const Tensor& cu_seqlens;  // [requests + 1]
  int64_t tokens, num_slots;
  const OptTensor& read_slots;         // [requests]; absent: request i reads slot i
  const OptTensor& write_slots;        // [requests]; absent: as read_slots
  const OptTensor& has_initial_state;  // [requests] bool; absent: all have one
  const OptTensor& snapshot_offsets;   // [requests + 1]
  const OptTensor& snapshot_tokens;    // [snapshots]
  const OptTensor& snapshot_slots;     // [snapshots]
};
void check_requests(const Requests& args);

// All values of one call.
void check_values(const Attention& args);
void check_values(const Decode& args);

}  // namespace la2::ops
