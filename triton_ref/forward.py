"""The chunked forward as one Triton kernel: Algorithm 1 of the paper with states, packed sequences and any length.

The same kernel computes dq, which is T(do, v, k) from the transposed state (14), and then also the sums a, a1 and
intra that the gradient of the slope needs (16). A program owns one sequence, one head and a slice of E, and carries
its slice of the state through all chunks.

Works compiled on a GPU and, with TRITON_INTERPRET=1 set before the first import of triton, interpreted on a CPU.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    q,  # [B, H, N, D]
    k,  # [B, H, N, D]
    v,  # [B, H, N, E]
    slope,  # [num_seqs, H]
    initial_state,  # [num_seqs, H, D, E]
    bounds,  # [num_seqs, 2] first row and row behind the last, counted over [B, N] as one axis
    out,  # [B, H, N, E]
    final_state,  # [num_seqs, H, D, E]
    weight,  # [B, H, N, E], q when this computes dq; read only with HAS_WEIGHT
    sums,  # [num_seqs, H, slices of E, NUM_CHUNKS, 3]: a, a1, intra of (16), zeroed by the caller
    scale,
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D rounded up to a power of two; the columns behind D are zero
    BLOCK_E: tl.constexpr,  # the slice of E
    NUM_CHUNKS: tl.constexpr,  # at least those of the longest sequence; a chunk without rows changes nothing
    HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.program_id(2)
    first = tl.load(bounds + 2 * seq)
    length = tl.load(bounds + 2 * seq + 1) - first
    # Row n of the [B, N] axis lies in batch row n // N; 64 bits, since B*H*N*D passes 2^31 in real models.
    base = (first // N * H + head) * N + first % N
    s = tl.load(slope + seq * H + head)

    d = tl.arange(0, BLOCK_D)
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)
    r = tl.arange(1, C + 1)
    state_at = (seq.to(tl.int64) * H + head) * D * E + d[:, None] * E + e[None, :]
    state_in = (d < D)[:, None] & (e < E)[None, :]
    state = tl.load(initial_state + state_at, mask=state_in, other=0.0)

    to_row = tl.exp(-s * r)[:, None]
    steps = r[:, None] - r[None, :]
    # The exponent is kept at or below zero above the diagonal too, so that nothing is inf before it is masked.
    decay = tl.where(steps >= 0, tl.exp(-s * tl.maximum(steps, 0)), 0.0)

    for chunk in range(NUM_CHUNKS):
        rows = chunk * C + r - 1
        c = tl.minimum(tl.maximum(length - chunk * C, 0), C)  # this chunk's own length
        here = rows < length
        key_at = (base + rows)[:, None] * D + d[None, :]
        key_in = here[:, None] & (d < D)[None, :]
        value_at = (base + rows)[:, None] * E + e[None, :]
        value_in = here[:, None] & (e < E)[None, :]
        rQ = tl.load(q + key_at, mask=key_in, other=0.0)
        rK = tl.load(k + key_at, mask=key_in, other=0.0)
        rV = tl.load(v + value_at, mask=value_in, other=0.0)

        inter = to_row * tl.dot(rQ, state.to(rQ.dtype), input_precision=PRECISION)
        scores = tl.dot(rQ, tl.trans(rK), input_precision=PRECISION) * decay
        intra = tl.dot(scores.to(rV.dtype), rV, input_precision=PRECISION)
        tl.store(out + value_at, (scale * (inter + intra)).to(out.dtype.element_ty), mask=value_in)  # (4)

        if HAS_WEIGHT:
            rW = tl.load(weight + value_at, mask=value_in, other=0.0).to(tl.float32)
            a_r = scale * tl.sum(rW * inter, axis=1)
            waited = tl.dot((scores * steps).to(rV.dtype), rV, input_precision=PRECISION)
            sums_at = sums + (((seq * H + head) * tl.num_programs(0) + part) * NUM_CHUNKS + chunk) * 3
            tl.store(sums_at, tl.sum(a_r, axis=0))
            tl.store(sums_at + 1, tl.sum(r * a_r, axis=0))
            tl.store(sums_at + 2, scale * tl.sum(tl.sum(rW * waited, axis=1), axis=0))

        # Rows behind the end hold zeros, but their exponent would be positive: clamp it.
        to_end = tl.exp(-s * tl.maximum(c - r, 0))[:, None]
        faded = (to_end * rK).to(rK.dtype)
        state = tl.exp(-s * c) * state + tl.dot(tl.trans(faded), rV, input_precision=PRECISION)  # (5)

    tl.store(final_state + state_at, state, mask=state_in)


def forward(q, k, v, slope=None, *, initial_state=None, cu_seqlens=None, scale=1.0, chunk=None):
    """Returns (out in v's dtype, final_state in float32). Arguments as in `naive`."""
    problem = Problem(q, v, slope, cu_seqlens, chunk)
    out, final_state, _ = sweep_right(problem, q, k, v, initial_state, scale)
    return out.to(v.dtype), final_state


class Problem:
    """What both sweeps share: where sequences lie, slopes, and how the work is cut."""

    def __init__(self, q, v, slope, cu_seqlens, chunk):
        self.B, self.H, self.N, self.D = q.shape
        self.E = v.shape[3]
        device = q.device
        if cu_seqlens is None:
            edges = torch.arange(self.B + 1, device=device) * self.N
        else:
            edges = cu_seqlens.to(device, torch.int64)
        self.bounds = torch.stack((edges[:-1], edges[1:]), 1).contiguous()
        self.num_seqs = len(self.bounds)
        if slope is None:
            slope = torch.zeros(self.H, device=device)
        self.slope = slope.float().expand(self.num_seqs, self.H).contiguous()
        wide = max(self.D, self.E) > 128
        self.chunk = chunk or (32 if wide or q.dtype == torch.float32 else 64)
        longest = int((edges[1:] - edges[:-1]).max()) if self.num_seqs else 0
        # A constexpr trip count, because old interpreters cannot loop over a computed one; rounded up to a power of
        # two, because every new value is a new compilation.
        self.num_chunks = triton.next_power_of_2(max(1, triton.cdiv(longest, self.chunk)))

    def states(self, given, *dims):
        shape = (self.num_seqs, self.H, *dims)
        if given is None:
            return torch.zeros(shape, device=self.bounds.device)
        return given.float().expand(shape).contiguous()


def sweep_right(problem, q, k, v, initial_state, scale, weight=None):
    """Launch the kernel. Returns out in the operands' dtype, final_state, sums (None without `weight`)."""
    p = problem
    D, E = q.shape[3], v.shape[3]
    q, k, v = (operand(x) for x in (q, k, v))
    state = p.states(initial_state, D, E)
    out, final_state = torch.empty_like(v), torch.empty_like(state)
    block_e = slice_of(E)
    parts = triton.cdiv(E, block_e)
    sums = q.new_zeros(p.num_seqs, p.H, parts, p.num_chunks, 3, dtype=torch.float32)
    if p.num_seqs * p.H:
        forward_kernel[(parts, p.H, p.num_seqs)](
            q,
            k,
            v,
            p.slope,
            state,
            p.bounds,
            out,
            final_state,
            v if weight is None else operand(weight),
            sums,
            float(scale),
            max(p.N, 1),
            H=p.H,
            D=D,
            E=E,
            C=p.chunk,
            BLOCK_D=padded(D),
            BLOCK_E=block_e,
            NUM_CHUNKS=p.num_chunks,
            HAS_WEIGHT=weight is not None,
            PRECISION="ieee",
            num_stages=1,
        )
    return out, final_state, None if weight is None else sums.double().sum(2)


def operand(x):
    """A contiguous operand. The interpreter computes bfloat16 wrongly without a word, so there it gets float32."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        x = x.float()
    return x.contiguous()


def padded(dim):
    return max(16, triton.next_power_of_2(dim))


def slice_of(dim):
    return min(padded(dim), 32)
