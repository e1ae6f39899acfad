// How the work of one call is cut for a GPU: a pure function from what is asked and what the device has to a plan
// that fits on one line. No tuning at run time; the constants of the cost model carry their measurement.
#pragma once

#include <cstdint>
#include <string>

#include "dtype.h"
#include "status.h"
#include "tile.h"

namespace la2 {

struct Problem {
  bool backward = false;
  DType dtype = DType::kBFloat16;
  int64_t batch = 1, heads = 1, length = 0;  // B, H, N
  int64_t dim_k = 0, dim_v = 0;              // D, E
  int64_t num_seqs = 1;                      // = batch when dense
  bool packed = false;                       // cu_seqlens given: the lengths are known to the device alone
  bool slope_grad = false;
  bool is_extend = false;  // states come from a pool, sequences from a table
  bool silu = false;       // forward: operands go through SiLU first
  bool mappable = true;  // the copy engine's tensor maps can describe the operands: no stride of 0, none of 2^40 bytes
};

struct DeviceProps {
  int compute_capability = 0;  // 80, 86, 89, 90, ...
  int num_sms = 0;
  int64_t shared_per_block = 0;  // bytes a block may ask for
  int64_t shared_per_sm = 0;
};

// simt: fp32 and fp64 without matrix units. sm80: bf16 and fp16 through mma.sync. sm90: the same through wgmma and the
// copy engine, on compute capability 9.0.
enum class Family { kSimt, kSm80, kSm90 };

constexpr int kMostLanes = 256;  // what simt/extend.h has room for

// forward: launch 0 computes out. backward: launch 0 computes dq and dk (Da = E, Dc = D) and, where the tiles
// agree, dv (Da = D, Dc = E); else launch 1 computes dv. sm90 backward: launch 0 computes dk and dv together, which
// share a state, and launch 1 dq, if is_fused; else as the others, dv always in launch 1, and launch 0 is two kernels,
// dq's and dk's; slices of 128 then are of the launches that have them.
struct Plan {
  Family family = Family::kSm80;
  int num_launches = 0;
  Tile tiles[2];
  bool is_fused = false;
  bool takes_silu = false;         // sm90 forward: the kernels do what Problem::silu asks for; else it is torch's
  bool in_one_pass = false;        // forward: state, combine and main pass are one kernel, all blocks resident
  int64_t max_blocks[2] = {0, 0};  // sm90: of a job; they take turns at the items. 0: a block for each item
  int64_t segment_len = 0;         // tokens, a multiple of every chunk; one segment: at least the longest sequence
  int64_t num_segments = 1;        // of the longest possible sequence
  int64_t num_units = 0;           // bound on segments over all sequences
  int64_t local_states = 0;        // of [H, D, E] in the workspace, with those of pieces (0: one segment)
  int64_t dot_floats = 0;          // slope gradient: elements of the workspace for dq's and dk's dots
  // The state pass before launch 0 (jobs dq and dk, whose states dv shares) and, sm90 without is_fused, before
  // launch 1. Forward: also of a state pass for snapshots,
  // whether sequences are cut or not.
  Tile state_tiles[2];
  int64_t state_floats[2] = {0, 0};  // of one head's state, in the family's own order (0: [D, E]): sm90, in_one_pass
  // sm80 and sm90: the state pass walks a segment in pieces of this many chunks of 64 tokens side by side, counted from
  // the end of the sweep, the last one what is left.
  int num_pieces = 1;
  int64_t piece_chunks = 0;
  // sm90, extend: what the device, which knows the lengths, needs to deal units out to blocks and to leave whole what
  // would not gain by a cut (simt/extend.h). Units that are walked side by side, up to kMostLanes (0: they are not
  // dealt out); what one costs besides its own tokens, and what the passes before the main one cost, in tokens; whether
  // a cut has to gain, which it need not where LA2_PLAN asks for segments.
  int lanes = 0;
  int64_t item_tokens = 1, pass_tokens = 0;
  bool cuts_if_it_gains = false;
  double predicted_us = 0;
};

// States behind those of the units in each workspace of states in the family's own order: of packed sequences one.
// There a unit starts from the state that its neighbour leaves, in a reverse sweep the one behind it; and offsets that
// descend, which nobody has checked, make more segments than there are units, so that the last unit has a neighbour
// too.
inline int64_t spare_states(bool packed, const Plan& plan) { return packed && plan.state_floats[0] != 0 ? 1 : 0; }

// Fails with a sentence where no kernel serves the problem. `forced` is the value of LA2_PLAN: a comma-separated list
// of key=value out of family=simt|sm80|sm90, slice=64|128, segments=N or segment_len=TOKENS, passes=1|3 where sequences
// are cut (1: in_one_pass; without a family sm90's), pieces=N (the same); sm90: blocks=N for each that is resident,
// which take turns; empty: free choice.
Status make_plan(const Problem& problem, const DeviceProps& device, const std::string& forced, Plan* plan);

// The same for callers that ask for the same again and again: each thread remembers the plans that it last made.
// make_plan takes 1 to 15 us of the host, this 0.1.
Status recall_plan(const Problem& problem, const DeviceProps& device, const std::string& forced, Plan* plan);

// One line for people: the problem, the device, the plan.
std::string describe(const Problem& problem, const DeviceProps& device, const Plan& plan);

// The inverse of what people type: "B,H,N,D,E,dtype[,backward][,silu][,packed=NUM_SEQS]" and "sm_90x132". Used by `info
// --plan`.
Status parse_problem(const std::string& text, Problem* problem);
Status parse_device(const std::string& text, DeviceProps* device);

}  // namespace la2
