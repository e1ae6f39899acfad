"""The backward pass: Algorithm 2 of the paper with states and the gradient of the slope.

dq is a sweep to the right with `forward.forward_kernel`. dk and dv are two sweeps to the left with the kernel
below, which computes T_rev(a, b, c) of (14): (9) with (a, b, c) = (k, q, do), and (10) with (v, do, q) and X
transposed. A program owns one sequence, one head and a slice of the columns of c.
"""

import torch
import triton
import triton.language as tl

from .forward import Problem, operand, padded, slice_of, sweep_right


@triton.jit
def reverse_kernel(
    a,  # [B, H, N, A]
    b,  # [B, H, N, A]
    c,  # [B, H, N, F]
    slope,  # [num_seqs, H]
    last_x,  # [num_seqs, H, A, F] X of the last chunk, the gradient of the final state
    bounds,  # [num_seqs, 2], as in the forward kernel
    out,  # [B, H, N, F]
    first_x,  # [num_seqs, H, A, F] X left of the first chunk, the gradient of the initial state
    weight,  # [B, H, N, F], k when this computes dk; read only with HAS_WEIGHT
    sums,  # [num_seqs, H, slices of F, NUM_CHUNKS, 2]: b, b1 of (16), zeroed by the caller
    scale,
    N,
    H: tl.constexpr,
    A: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_F: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.program_id(2)
    first = tl.load(bounds + 2 * seq)
    length = tl.load(bounds + 2 * seq + 1) - first
    base = (first // N * H + head) * N + first % N
    s = tl.load(slope + seq * H + head)

    ia = tl.arange(0, BLOCK_A)
    ic = part * BLOCK_F + tl.arange(0, BLOCK_F)
    r = tl.arange(1, C + 1)
    x_at = (seq.to(tl.int64) * H + head) * A * F + ia[:, None] * F + ic[None, :]
    x_in = (ia < A)[:, None] & (ic < F)[None, :]
    x = tl.load(last_x + x_at, mask=x_in, other=0.0)

    to_row = tl.exp(-s * r)[:, None]
    steps = r[None, :] - r[:, None]
    decay = tl.where(steps >= 0, tl.exp(-s * tl.maximum(steps, 0)), 0.0)  # M transposed

    for turn in range(NUM_CHUNKS):
        chunk = NUM_CHUNKS - 1 - turn
        rows = chunk * C + r - 1
        own = tl.minimum(tl.maximum(length - chunk * C, 0), C)
        here = rows < length
        a_at = (base + rows)[:, None] * A + ia[None, :]
        a_in = here[:, None] & (ia < A)[None, :]
        c_at = (base + rows)[:, None] * F + ic[None, :]
        c_in = here[:, None] & (ic < F)[None, :]
        rA = tl.load(a + a_at, mask=a_in, other=0.0)
        rB = tl.load(b + a_at, mask=a_in, other=0.0)
        rC = tl.load(c + c_at, mask=c_in, other=0.0)

        to_end = tl.exp(-s * tl.maximum(own - r, 0))[:, None]
        inter = to_end * tl.dot(rA, x.to(rA.dtype), input_precision=PRECISION)
        scores = scale * tl.dot(rA, tl.trans(rB), input_precision=PRECISION) * decay
        intra = tl.dot(scores.to(rC.dtype), rC, input_precision=PRECISION)
        tl.store(out + c_at, (inter + intra).to(out.dtype.element_ty), mask=c_in)  # (9), (10)

        if HAS_WEIGHT:
            rW = tl.load(weight + c_at, mask=c_in, other=0.0).to(tl.float32)
            b_r = tl.sum(rW * inter, axis=1)
            sums_at = sums + (((seq * H + head) * tl.num_programs(0) + part) * NUM_CHUNKS + chunk) * 2
            tl.store(sums_at, tl.sum(b_r, axis=0))
            tl.store(sums_at + 1, tl.sum((own - r) * b_r, axis=0))

        faded = (to_row * rB).to(rB.dtype)
        x = tl.exp(-s * own) * x + scale * tl.dot(tl.trans(faded), rC, input_precision=PRECISION)  # (11)

    tl.store(first_x + x_at, x, mask=x_in)


def backward(
    grad_out,
    grad_final_state,
    q,
    k,
    v,
    slope=None,
    *,
    initial_state=None,
    cu_seqlens=None,
    scale=1.0,
    chunk=None,
):
    """Returns (dq, dk, dv, dslope, dinitial_state), None for what was not given. Arguments as in `naive`."""
    p = Problem(q, v, slope, cu_seqlens, chunk)
    transposed = None if initial_state is None else initial_state.mT
    dq, _, took = sweep_right(p, grad_out, v, k, transposed, scale, weight=q)
    dv, dinitial_state, _ = sweep_left(p, k, q, grad_out, grad_final_state, scale)
    transposed = None if grad_final_state is None else grad_final_state.mT
    dk, _, gave = sweep_left(p, v, grad_out, q, transposed, scale, weight=k)

    dslope = None
    if slope is not None:
        flow = torch.zeros(p.num_seqs, p.H, dtype=torch.float64, device=q.device)
        if initial_state is not None:
            flow = (dinitial_state.double() * initial_state.double()).sum((-1, -2))  # Y_0 of (17)
        dslope = torch.zeros_like(flow)
        lengths = (p.bounds[:, 1] - p.bounds[:, 0])[:, None]
        for c in range(p.num_chunks):
            through = flow - took[:, :, c, 0]
            own = (lengths - c * p.chunk).clamp(0, p.chunk)
            dslope -= took[:, :, c, 2] + took[:, :, c, 1] + gave[:, :, c, 1] + own * through  # (18)
            flow = through + gave[:, :, c, 0]
        dslope = (dslope.sum(0) if slope.dim() == 1 else dslope).float()
    if initial_state is None:
        dinitial_state = None
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dslope, dinitial_state


def sweep_left(problem, a, b, c, last_x, scale, weight=None):
    """Launch the kernel. Returns out in the operands' dtype, first_x, sums (None without `weight`)."""
    p = problem
    A, F = a.shape[3], c.shape[3]
    a, b, c = (operand(x) for x in (a, b, c))
    x = p.states(last_x, A, F)
    out, first_x = torch.empty_like(c), torch.empty_like(x)
    block_f = slice_of(F)
    parts = triton.cdiv(F, block_f)
    sums = a.new_zeros(p.num_seqs, p.H, parts, p.num_chunks, 2, dtype=torch.float32)
    if p.num_seqs * p.H:
        reverse_kernel[(parts, p.H, p.num_seqs)](
            a,
            b,
            c,
            p.slope,
            x,
            p.bounds,
            out,
            first_x,
            c if weight is None else operand(weight),
            sums,
            float(scale),
            max(p.N, 1),
            H=p.H,
            A=A,
            F=F,
            C=p.chunk,
            BLOCK_A=padded(A),
            BLOCK_F=block_f,
            NUM_CHUNKS=p.num_chunks,
            HAS_WEIGHT=weight is not None,
            PRECISION="ieee",
            num_stages=1,
        )
    return out, first_x, None if weight is None else sums.double().sum(2)
