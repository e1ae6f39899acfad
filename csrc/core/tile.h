// The tile of one kernel launch, and what of its cost kernels and planner must agree on.
#pragma once

#include <stdint.h>

namespace la2 {

// csrc/kernels/trilinear.h: Da is the contracted dim, Dc the dim of c and out.
struct Tile {
  int tile_a = 0;  // Da rounded up: 64, 128 or 256, sm90 also 192
  int slice = 0;   // columns of Dc to a block
  int chunk = 0;   // tokens to a chunk
};

// Whether an sm80 block has four warps more than those that hold the state (sm80/trilinear.cuh, sm80/two_roles.cuh).
// Then blocks come unit by unit, a sequence's last segment at the end; else job by job.
constexpr bool sm80_is_ahead(const Tile& t, bool slope_grad) {
  return t.tile_a == 128 && t.slice == 128 && !slope_grad;
}

// Whether sm80 has a kernel of this tile that makes a forward's states and outputs in one pass.
constexpr bool sm80_has_one_pass(const Tile& t) { return sm80_is_ahead(t, false); }

// Bytes of shared memory of an sm80 block: two stages of a, b [chunk, tile_a] and c [chunk, slice], the scores
// [chunk, chunk], the powers of lambda; ahead, a third stage and a second tile of scores (out has two roles and needs
// less); for the slope gradient a second tile of scores and a few sums.
constexpr int64_t sm80_shared_bytes(const Tile& t, bool slope_grad) {
  const int64_t chunk = t.chunk, more = sm80_is_ahead(t, slope_grad) ? 1 : 0;
  const int64_t tiles = 2 * ((2 + more) * chunk * (2 * t.tile_a + t.slice) + (1 + more) * chunk * chunk);
  const int64_t decay = 2 * (2 * chunk + 1) * 4;
  const int64_t slope = slope_grad ? (2 * chunk * chunk + 16 + t.slice / 16 * 12 + 127) / 128 * 128 : 0;
  return (tiles + decay + 127) / 128 * 128 + slope;
}

// Whether sm90 has a kernel of this tile for dq alone, which rounds the weighted c (sm90/launch.h, Split). Gradients of
// the other tiles split it in any case.
constexpr bool sm90_has_dq(const Tile& t) { return t.slice == 128 || t.tile_a > 128; }

// Whether sm90 has kernels that take SiLU of their operands: not where a has stages of its own.
constexpr bool sm90_takes_silu(const Tile& t) { return t.tile_a < 256; }

// One pass, and extend (sm90): a block adds up itself what the segments before its own gathered where their states have
// so many rows of Da together at most; 16 segments of a tile of 128.
constexpr int kMostRowsAdded = 16 * 128;
// Whether the main pass's kernel of this tile can, of so many segments.
constexpr bool sm90_sums_states(const Tile& tile, int64_t segments) {
  return tile.slice == 64 && tile.tile_a <= 128 && segments * tile.tile_a <= kMostRowsAdded;
}

}  // namespace la2
