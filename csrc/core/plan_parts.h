// What the planners of the kernel families share. Private to csrc/core.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "plan.h"

namespace la2 {

// LA2_PLAN, parsed. Empty and 0: free choice.
struct Forced {
  std::string family;
  int64_t slice = 0, segments = 0, segment_len = 0, blocks = 0, passes = 0, pieces = 0;
  bool is_for_sm90() const { return blocks != 0 || passes != 0 || pieces != 0; }
};

constexpr int64_t kSegmentStep = 64;  // every chunk size divides it; the shortest segment
constexpr int64_t kMaxSegments = 64;  // the combine pass walks them one by one
constexpr double kWorthwhile = 0.97;  // more segments only for a gain beyond the cost model's precision

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }  // of a >= 0: a + b may be too much

// The tile that every family has.
inline int tile_a_for(int64_t dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

// Segments to consider. The longest sequence possible: packed, all tokens may belong to one.
inline std::vector<int64_t> counts_of_segments(const Problem& p, const Forced& forced) {
  if (forced.segments > 0) return {forced.segments};
  std::vector<int64_t> counts;
  const int64_t most = std::min(kMaxSegments, std::max<int64_t>(1, p.length / kSegmentStep));
  for (int64_t n = 1; n <= most; n = n < 4 ? n + 1 : n + n / 4) counts.push_back(n);
  return counts;
}

// Of the longest possible sequence, in so many segments.
inline int64_t segment_len_of(const Problem& p, int64_t segments) {
  return ceil_div(ceil_div(std::max<int64_t>(p.length, 1), segments), kSegmentStep) * kSegmentStep;
}

// Segments of whole steps, units and the workspace for their states. Whether any sequence may be cut.
inline bool cut_into_segments(const Problem& p, int64_t segment_len, Plan* plan) {
  const int64_t tokens = std::max<int64_t>(p.length, 1);
  plan->segment_len = ceil_div(std::clamp<int64_t>(segment_len, 1, tokens), kSegmentStep) * kSegmentStep;
  plan->num_segments = ceil_div(tokens, plan->segment_len);
  plan->num_units = p.packed && p.num_seqs > 1
                        ? p.num_seqs + p.length / plan->segment_len
                        : p.num_seqs * std::max<int64_t>(1, ceil_div(p.length, plan->segment_len));
  const bool cut = plan->num_segments > 1;
  plan->local_states = cut ? plan->num_units * (p.backward ? 2 : 1) : 0;
  return cut;
}

// Each segment's state is gathered in so many pieces, or fewer: of whole chunks of kSegmentStep tokens.
inline void cut_into_pieces(int64_t wanted, Plan* plan) {
  const int64_t chunks = plan->segment_len / kSegmentStep;
  plan->piece_chunks = ceil_div(chunks, std::clamp<int64_t>(wanted, 1, std::min(chunks, kMaxSegments)));
  plan->num_pieces = static_cast<int>(ceil_div(chunks, plan->piece_chunks));
}

// Units with something to do: packed, as many as the tokens fill, evenly cut.
inline int64_t busy_units(const Problem& p, const Plan& plan) {
  return p.packed ? std::max<int64_t>(1, ceil_div(p.length, plan.segment_len)) : plan.num_units;
}

// Elements of the workspace: local states and dots.
inline int64_t workspace_floats(const Problem& p, const Plan& plan) {
  const int64_t state =
      plan.state_floats[0] != 0 ? std::max(plan.state_floats[0], plan.state_floats[1]) : p.dim_k * p.dim_v;
  const int64_t workspaces = plan.local_states / std::max<int64_t>(1, plan.num_units * plan.num_pieces);
  const int64_t spare = spare_states(p.packed, plan) * workspaces;
  return (plan.local_states + spare) * p.heads * state + plan.dot_floats;
}

// Tokens that the state pass of the 16-bit families gathers of a long segment at most, where all blocks walk at once:
// what a slope of 2^-8 leaves something of (simt/units.cuh, window_chunks). The host does not know the slopes.
constexpr int64_t kLongestWindow = 111 * 64;

// Local states read and written, at so many GB/s.
inline double combine_us(const Problem& p, const Plan& plan, double gbs) {
  const int64_t bytes = 8 * plan.local_states * p.heads * p.dim_k * p.dim_v;
  return static_cast<double>(bytes) / (gbs * 1e3);
}

// The Hopper family's plan; a sentence where it does not serve the problem or the device, or is not wanted.
Status plan_sm90(const Problem& problem, const DeviceProps& device, const Forced& forced, Plan* plan);

}  // namespace la2
