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

// Boundaries of packed sequences, int32 or int64 [num_seqs + 1]: ascending from 0 to `tokens`.
void check_seq_offsets(const char* op, const char* name, const Tensor& offsets, int64_t tokens);

// Slopes, [heads] or [num_seqs, heads]: finite and not negative.
void check_slopes(const char* op, const Tensor& slope);

// Counts, int32 or int64 [rows], from 0 to `most`, which is `what` ("the number of draft tokens").
void check_counts(const char* op, const char* name, const Tensor& counts, int64_t most, const char* what);

// All values of one call.
void check_values(const Attention& args);
void check_values(const char* op, const Recurrent& args);

}  // namespace la2::ops
