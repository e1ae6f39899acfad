// The one kernel of this project and how its work is cut.
//
//   T(a, b, c)_i = sum over j <= i (reverse: j >= i) of lambda^|i-j| (a_i . b_j) c_j
//
//   out = T(q, k, v)    dq = T(dout, v, k)    dk = T_rev(v, dout, q)    dv = T_rev(k, q, dout)
//
// so forward is one job and backward three jobs of the same kernel, in one launch where their tiles agree.
// A job walks a segment of a sequence chunk by chunk with its state in registers. With C the rows in the
// chunk (the last chunk of a sequence may have fewer; then C is its own length), i, j = 0..C-1, and the state
// Z [Da, Dc] carried from chunk to chunk:
//
//   forward:  out_i = inter lambda^(i+1)   a_i Z + intra sum_{j<=i} lambda^(i-j) (a_i . b_j) c_j
//             Z     = lambda^C Z + update sum_j lambda^(C-1-j) b_j c_j^T
//   reverse:  out_i = inter lambda^(C-1-i) a_i Z + intra sum_{j>=i} lambda^(j-i) (a_i . b_j) c_j
//             Z     = lambda^C Z + update sum_j lambda^(j+1)   b_j c_j^T
//
// In the reverse sweep Z is the gradient of the state times lambda, so that it enters the last chunk as
// grad_final_state itself, undecayed, and leaves the first one as grad_initial_state (triton_ref/README.md).
#pragma once

#include "../core/division.h"
#include "../core/host_device.h"
#include "params.h"

namespace la2 {

constexpr int kMaxJobs = 3;

struct TrilinearJob {
  Rows a, b;        // [B, H, N, Da]
  Rows c;           // [B, H, N, Dc]
  MutableRows out;  // [B, H, N, Dc]
  int32_t dim_a, dim_c;
  bool reverse;
  int32_t silu;                 // of operands that go through SiLU first, bits of Silu: a, b, c as q, k, v. sm90's out
  double inter, intra, update;  // factors of the equations above: forward (scale, scale, 1), reverse (1, scale, scale)
  State initial;                // Z entering the sequence [num_seqs, H, Da, Dc]; absent: zero
  MutableState final;           // Z leaving the sequence; absent: not wanted. An empty sequence copies `initial`.
  // A state per unit, [num_units, H, Da, Dc] (stride_s steps units), where sequences are cut: the state pass leaves
  // in it what each segment gathers alone, from zero; the combine pass (sums_states: none) turns that into Z as it
  // enters the segment (`initial` included), which is what the main pass starts from. Jobs that sweep alike over the
  // same b and c may share one, transposed.
  MutableState local;

  // Slope gradient (nullptr: not wanted). out_inter is the part of out through Z. With x the row operand that
  // pairs with out (q for dq, k for dk), for every chunk, head and slice of Dc, in the accumulation dtype:
  //   dots[0] = sum_i x_i . out_inter_i
  //   dots[1] = sum_i n_i x_i . out_inter_i                    n_i = i + 1 forward, C-1-i reverse
  //   dots[2] = sum_{j<i} (i-j) lambda^(i-j) intra (a_i . b_j)(c_j . x_i)       of use from a forward job alone
  Rows x;      // [B, H, N, Dc]
  void* dots;  // [num_chunk_slots, H, num_slices, 3]

  Division by_slices;  // of the grid: the launch's
};

// A unit that is told, not counted (TrilinearParams::units): a segment of the rows [seq_begin, seq_begin + seq_length)
// of batch row 0.
struct UnitEntry {
  int64_t seq_begin, seq_length;
  int32_t sequence, state;  // whose slope; which state (or entry of State::slots)
  int32_t segment;          // -1: no unit, and none behind it that this block would walk
  int32_t num_segments;     // 1: all rows, however many segments of segment_len they would be
  int32_t index;            // among the units whose states between segments lie side by side (job.local)
  int32_t lane;             // of the table's own
};

struct TrilinearParams {
  TrilinearJob jobs[kMaxJobs];
  int32_t num_jobs;
  Sizes sizes;
  Slopes slope;
  SeqOffsets cu_seqlens;
  // Every sequence is cut into segments of segment_len tokens (a multiple of the chunk; the last may be
  // shorter; an empty sequence has one, empty). A unit is one segment of one sequence, numbered sequence by
  // sequence. num_units bounds their number: num_seqs * segments when dense; num_seqs + N / segment_len when
  // packed, where blocks beyond the last unit have nothing to do.
  int64_t segment_len;
  Division by_segment_len, by_segments, by_heads;  // by_segments: of a dense sequence (set_segment_len)
  int64_t num_units;
  bool is_cut;  // some sequence may have more than one segment: the passes before the main one were run
  // job.local is in the family's own order: `local_floats` of a unit and head, one behind the other (0: [Da, Dc]), and
  // the first segment's state has the initial one in it, so that the combine pass need not know it. That pass leaves at
  // a unit the state that leaves it (and enters the next one).
  int64_t local_floats;
  // A segment's state may come in pieces, so that long walks are shared out: what piece 0, its last piece_chunks chunks
  // of 64 in the order of the sweep, adds to the state that leaves the segment; piece 1, those before; and so on, the
  // last one all that is left. Piece p is num_units p states further on. Sums replace piece 0.
  int32_t num_pieces, piece_chunks;
  const UnitEntry* units;  // [num_units], packed sequences: this table says what is where, not cu_seqlens
  // The state pass walks whole sequences (one segment each) from job.initial to job.final, and makes no outputs.
  bool states_alone;
  // No combine pass comes: states of local_floats stay what each segment gathered, and a block of the main pass adds up
  // those before its own.
  bool sums_states;
};

inline void set_segment_len(TrilinearParams& params, int64_t segment_len) {
  const Sizes& s = params.sizes;
  params.segment_len = segment_len;
  params.by_segment_len = Division::by(segment_len);
  params.by_segments = Division::by(s.length > segment_len ? params.by_segment_len.quotient_up(s.length) : 1);
  params.by_heads = Division::by(s.heads > 0 ? s.heads : 1);
}

// Chunk slots of the slope gradient's dots: the chunks of a sequence that starts at token `start` are
// first_chunk_slot(...) + 0, 1, ... Slots of different sequences never meet.
// Dense: start = batch row * N. There are B N / chunk + num_seqs slots.
LA2_HOST_DEVICE inline int64_t first_chunk_slot(int64_t start, int64_t sequence, int64_t chunk) {
  return start / chunk + sequence;
}

}  // namespace la2
