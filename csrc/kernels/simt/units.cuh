// Which rows a unit stands for, and what of them its local state needs. Every kernel of the trilinear form, of any
// family, takes its work from here.
#pragma once

#include <stdint.h>

#include "../trilinear.h"

namespace la2::simt {

// One segment of one sequence, and the sequence around it.
struct Unit {
  int64_t index;                  // of its state in job.local
  int64_t sequence, state;        // which slope, which state
  int64_t segment, num_segments;  // of the sequence; its units are numbered unit_idx - segment + (0, 1, ...)
  int64_t batch;                  // batch row (packed: 0)
  int64_t row_begin, length;      // rows of this segment, counted within the batch row
  int64_t seq_start, seq_length;  // tokens of the sequence, all batch rows in one line (dense: starts at batch N)
  bool valid;                     // false: beyond the last unit, nothing to do
};

struct Span {
  int64_t begin, length;
};

// Rows of a packed sequence. Offsets nobody has checked are clamped to [0, N] and to their order, so that wrong
// ones give wrong results and never a wrong address.
__device__ inline Span sequence_rows(const SeqOffsets& offsets, int64_t sequence, int64_t total) {
  auto offset = [&](int64_t i) -> int64_t {
    const int64_t value =
        offsets.is_int64 ? static_cast<const int64_t*>(offsets.data)[i] : static_cast<const int32_t*>(offsets.data)[i];
    return value < 0 ? 0 : value > total ? total : value;
  };
  const int64_t begin = offset(sequence), end = offset(sequence + 1);
  return {begin, end > begin ? end - begin : 0};
}

__device__ inline int64_t segments_of(int64_t length, int64_t segment_len) {
  return length > segment_len ? (length + segment_len - 1) / segment_len : 1;
}

template <bool kIsShort = false>
__device__ inline int64_t segments_of(const TrilinearParams& params, int64_t length) {
  if (length <= params.segment_len) return 1;
  if constexpr (kIsShort) return 1 + params.by_segment_len.small_quotient(static_cast<int>(length - 1));
  return params.by_segment_len.quotient_up(length);
}

__device__ inline Unit unit_of(const TrilinearParams& params, int64_t sequence, int64_t batch, Span rows,
                               int64_t segment, int64_t num_segments) {
  const int64_t segment_len = params.segment_len;
  const int64_t before = segment * segment_len;
  const int64_t left = rows.length - before;
  return {0,
          sequence,
          sequence,
          segment,
          num_segments,
          batch,
          rows.begin + before,
          num_segments == 1 || left < segment_len ? left : segment_len,
          batch * params.sizes.length + rows.begin,
          rows.length,
          true};
}
template <bool kIsShort = false>
__device__ inline Unit unit_of(const TrilinearParams& params, int64_t sequence, int64_t batch, Span rows,
                               int64_t segment) {
  return unit_of(params, sequence, batch, rows, segment, segments_of<kIsShort>(params, rows.length));
}

__device__ inline Unit unit_of_entry(const TrilinearParams& params, const UnitEntry& entry) {
  if (entry.segment < 0) return {};
  Unit unit =
      unit_of(params, entry.sequence, 0, {entry.seq_begin, entry.seq_length}, entry.segment, entry.num_segments);
  unit.state = entry.state;
  unit.index = entry.index;
  return unit;
}

// Called by whole warps, every lane with the same unit_idx; every lane gets the same unit. Packed: each lane counts
// the segments of one of 32 sequences, a scan over the warp finds the sequence unit_idx falls into. kIsShort: without
// code for 2^31 units or tokens and more, which launches that say so refuse. kHasTable: params.units may be given.
template <bool kIsShort = false, bool kHasTable = true>
__device__ inline Unit find_unit(const TrilinearParams& params, int64_t unit_idx) {
  const Sizes& sizes = params.sizes;
  if constexpr (kHasTable)
    if (params.units != nullptr) return unit_of_entry(params, params.units[unit_idx]);
  if (params.cu_seqlens.data == nullptr) {
    const int64_t sequence = kIsShort ? params.by_segments.small_quotient(static_cast<int>(unit_idx))
                                      : params.by_segments.quotient(unit_idx);
    if (sequence >= sizes.num_seqs) return {};
    Unit unit = unit_of<kIsShort>(params, sequence, sequence, {0, sizes.length},
                                  unit_idx - sequence * params.by_segments.divisor);
    unit.index = unit_idx;
    return unit;
  }

  constexpr unsigned kAllLanes = 0xffffffffu;
  const int lane = threadIdx.x & 31;
  int64_t units_before = 0;  // of all sequences before first_seq
  for (int64_t first_seq = 0; first_seq < sizes.num_seqs; first_seq += 32) {
    const int64_t sequence = first_seq + lane;
    int64_t units = 0;
    if (sequence < sizes.num_seqs) {
      units = segments_of<kIsShort>(params, sequence_rows(params.cu_seqlens, sequence, sizes.length).length);
    }
    int64_t units_up_to = units;  // inclusive scan over the lanes
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t below = __shfl_up_sync(kAllLanes, units_up_to, distance);
      if (lane >= distance) units_up_to += below;
    }
    units_up_to += units_before;
    const unsigned found = __ballot_sync(kAllLanes, unit_idx < units_up_to);
    if (found != 0) {
      const int owner = __ffs(static_cast<int>(found)) - 1;
      const int64_t segment = unit_idx - __shfl_sync(kAllLanes, units_up_to - units, owner);
      const int64_t owned = first_seq + owner;
      const Span rows = sequence_rows(params.cu_seqlens, owned, sizes.length);
      Unit unit = unit_of<kIsShort>(params, owned, 0, rows, segment);
      unit.index = unit_idx;
      return unit;
    }
    units_before = __shfl_sync(kAllLanes, units_up_to, 31);
  }
  return {};
}

// The first unit of a sequence (dense: of a batch row); unit_idx: its number. Called by whole warps.
__device__ inline Unit first_unit_of(const TrilinearParams& params, int64_t sequence, int64_t* unit_idx) {
  const Sizes& sizes = params.sizes;
  if (params.cu_seqlens.data == nullptr) {
    *unit_idx = sequence * params.by_segments.divisor;
    return unit_of(params, sequence, sequence, {0, sizes.length}, 0);
  }
  int64_t before = 0;
  for (int64_t other = threadIdx.x & 31; other < sequence; other += 32)
    before += segments_of(params, sequence_rows(params.cu_seqlens, other, sizes.length).length);
  for (int distance = 16; distance > 0; distance /= 2) before += __shfl_xor_sync(0xffffffffu, before, distance);
  *unit_idx = before;
  return unit_of(params, sequence, 0, sequence_rows(params.cu_seqlens, sequence, sizes.length), 0);
}

// Where a unit's rows of a head begin, from column `first_col` on.
template <class T, class AnyRows>
__device__ __forceinline__ T* first_row(const AnyRows& rows, const Unit& unit, int64_t head, int first_col = 0) {
  return static_cast<T*>(rows.data) + unit.batch * rows.stride_b + head * rows.stride_h +
         unit.row_begin * rows.stride_n + first_col;
}

// T: the accumulation dtype.
template <class T>
__device__ inline T slope_of(const TrilinearParams& params, int64_t sequence, int64_t head) {
  const Slopes& slope = params.slope;
  if (slope.data == nullptr) return T(0);
  return static_cast<const T*>(slope.data)[sequence * slope.stride_s + head * slope.stride_h];
}

constexpr int kWindowChunk = 64;  // pieces are made of; every family's chunk divides it

// Chunks back from a segment's end (in the order of the sweep) that its local state needs: what is further back has
// decayed under 2^-40, which no result of 16 bits can show unless inputs differ by more than 2^30 in magnitude. All of
// them where nothing decays (-0 is a slope as well), and where a slope is none.
template <int kChunk = kWindowChunk>
__device__ inline int window_chunks(float slope, int num_chunks) {
  constexpr float kNatsOfWindow = 40 * 0.6931472f;
  if (!(slope > 0)) return num_chunks;
  const float chunks = kNatsOfWindow / (slope * kChunk) + 1;
  return chunks < static_cast<float>(num_chunks) ? static_cast<int>(chunks) + 1 : num_chunks;
}

// The pieces that a segment of `length` tokens comes in (TrilinearParams::num_pieces).
__device__ inline int pieces_of(const TrilinearParams& params, float slope, int64_t length) {
  if (params.num_pieces == 1) return 1;
  const int window = window_chunks(slope, static_cast<int>((length + kWindowChunk - 1) / kWindowChunk));
  return min((window + params.piece_chunks - 1) / params.piece_chunks, params.num_pieces);
}

// Which of the states in memory that is; negative: none.
template <class AnyState>
__device__ inline int64_t slot_of(const AnyState& s, int64_t state) {
  return s.slots != nullptr ? s.slots[state] : state;
}

// The chunk slot (trilinear.h) of the unit's first chunk, for the slope gradient's dots.
__device__ inline int64_t first_slot_of_unit(const Unit& unit, int64_t segment_len, int64_t chunk) {
  return first_chunk_slot(unit.seq_start, unit.sequence, chunk) + unit.segment * segment_len / chunk;
}

// Whether this segment is the last of its sequence in the order of the sweep (then it writes `final`).
__device__ inline bool ends_sweep(const Unit& unit, bool reverse) {
  return reverse ? unit.segment == 0 : unit.segment + 1 == unit.num_segments;
}

}  // namespace la2::simt
