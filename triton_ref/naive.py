"""The operator in plain PyTorch: three forms that must agree, the backward pass by hand, and one decode step.

Every function takes q, k [B, H, N, D] and v [B, H, N, E] of any dtype and computes in `dtype`, float64 unless told
otherwise; results are returned in `dtype`. slope is None (no decay), [H] or [num_seqs, H]; states are
[num_seqs, H, D, E], where num_seqs is B, or the number of packed sequences when `cu_seqlens` is given.

`operand_dtype` makes `chunked` and `backward_chunked` round whatever enters a matrix product to that dtype, with sums
kept in `dtype`: the arithmetic of a tensor core, and the yardstick for the error of a kernel that uses one.
"""

import torch


def recurrent(q, k, v, slope=None, *, initial_state=None, cu_seqlens=None, scale=1.0, dtype=torch.float64):
    """Token by token, equations (1) and (2). Returns (out, final_state)."""

    def one(q, k, v, s, state):
        lam = torch.exp(-s)[..., None, None]
        rows = []
        for t in range(q.shape[2]):
            state = lam * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            rows.append(scale * (q[:, :, t, :, None] * state).sum(-2))
        return (torch.stack(rows, 2) if rows else 0 * v), state

    return _each_sequence(one, q, k, v, slope, initial_state, cu_seqlens, dtype)


def quadratic(q, k, v, slope=None, *, initial_state=None, cu_seqlens=None, scale=1.0, dtype=torch.float64):
    """All pairs of tokens at once, equation (3). Returns (out, final_state)."""

    def one(q, k, v, s, state):
        n = q.shape[2]
        to_row, to_end, mask = _decays(s, n)
        out = scale * ((q @ k.mT * mask) @ v + to_row * (q @ state))
        return out, _power(s, n) * state + (to_end * k).mT @ v

    return _each_sequence(one, q, k, v, slope, initial_state, cu_seqlens, dtype)


def chunked(
    q,
    k,
    v,
    slope=None,
    *,
    initial_state=None,
    cu_seqlens=None,
    scale=1.0,
    chunk=64,
    dtype=torch.float64,
    operand_dtype=None,
):
    """Chunk by chunk, equations (4) and (5): Algorithm 1 of the paper. Returns (out, final_state)."""
    rnd = _rounding(dtype, operand_dtype)

    def one(q, k, v, s, state):
        outs = []
        for lo in range(0, q.shape[2], chunk):
            Q, K, V = (x[:, :, lo : lo + chunk] for x in (q, k, v))
            C = Q.shape[2]
            to_row, to_end, mask = _decays(s, C)
            inter = to_row * (Q @ rnd(state))
            intra = rnd(Q @ K.mT * mask) @ V
            outs.append(scale * (inter + intra))  # (4)
            state = _power(s, C) * state + rnd(to_end * K).mT @ V  # (5)
        return (torch.cat(outs, 2) if outs else 0 * v), state

    return _each_sequence(one, rnd(q), rnd(k), rnd(v), slope, initial_state, cu_seqlens, dtype)


def backward_chunked(
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
    chunk=64,
    dtype=torch.float64,
    operand_dtype=None,
):
    """Algorithm 2 of the paper with states: (dq, dk, dv, dslope, dinitial_state), None for what was not given."""
    rnd = _rounding(dtype, operand_dtype)

    def one(q, k, v, s, state, do, x):
        begins = range(0, q.shape[2], chunk)
        cut = [[t[:, :, lo : lo + chunk] for t in (q, k, v, do)] for lo in begins]
        initial = state
        dq, dk, dv, took, gave = [], [], [], [], []
        for Q, K, V, dO in cut:
            C = Q.shape[2]
            to_row, to_end, mask = _decays(s, C)
            pairs = scale * (dO @ V.mT) * mask
            inter = scale * to_row * (dO @ rnd(state).mT)
            dq.append(inter + rnd(pairs) @ K)  # (12)
            r, steps = _rows(Q, C)
            a = (Q * inter).sum(-1)
            intra = (steps * pairs * (Q @ K.mT)).sum((-1, -2))
            took.append((a.double().sum(-1), (r * a).double().sum(-1) + intra.double()))  # a, a1 + intra of (16)
            state = _power(s, C) * state + rnd(to_end * K).mT @ V  # (5)
        for Q, K, V, dO in reversed(cut):
            C = Q.shape[2]
            to_row, to_end, mask = _decays(s, C)
            inter = to_end * (V @ rnd(x).mT)
            dv.append(to_end * (K @ rnd(x)) + rnd(scale * (Q @ K.mT) * mask).mT @ dO)  # (9)
            dk.append(inter + rnd(scale * (dO @ V.mT) * mask).mT @ Q)  # (10)
            r, _ = _rows(Q, C)
            b = (K * inter).sum(-1)
            gave.append((b.double().sum(-1), ((C - r) * b).double().sum(-1)))  # b, b1 of (16)
            x = _power(s, C) * x + scale * rnd(to_row * Q).mT @ dO  # (11)
        flow = (x.double() * initial.double()).sum((-1, -2))  # Y_0 of (17)
        ds = torch.zeros_like(flow)
        for (Q, *_), (a, inside), (b, b1) in zip(cut, took, reversed(gave), strict=True):
            through = flow - a
            ds = ds - (inside + b1 + Q.shape[2] * through)  # (18)
            flow = through + b
        grads = [torch.cat(g, 2) if g else torch.zeros_like(t) for g, t in ((dq, q), (dk[::-1], k), (dv[::-1], v))]
        return (*grads, ds.to(dtype), x)

    heads, dims = q.shape[1], (q.shape[3], v.shape[3])
    num_seqs = _num_seqs(q, cu_seqlens)
    if grad_final_state is None:
        grad_final_state = torch.zeros(num_seqs, heads, *dims, dtype=dtype, device=q.device)
    if grad_out is None:
        grad_out = torch.zeros_like(v)
    dq, dk, dv, ds, dstate = _each_sequence(
        one, rnd(q), rnd(k), rnd(v), slope, initial_state, cu_seqlens, dtype, rnd(grad_out), grad_final_state
    )
    if slope is None:
        ds = None
    elif slope.dim() == 1:
        ds = ds.sum(0)
    return dq, dk, dv, ds, dstate if initial_state is not None else None


def decode(q, k, v, state, slope=None, *, state_indices=None, scale=1.0, dtype=torch.float64):
    """One token a row, q, k [B, H, D], v [B, H, E], on a pool state [slots, H, D, E]. Returns (out, new pool).

    A negative index marks a padding row: it gives zeros and touches no state. The pool passed in is not changed.
    """
    index = torch.arange(q.shape[0], device=q.device) if state_indices is None else state_indices.long()
    pool = state.to(dtype).clone()
    out = torch.zeros(v.shape, dtype=dtype, device=v.device)
    live = index >= 0
    if slope is not None and slope.dim() == 2:
        slope = slope[live]
    step = [x[live][:, :, None] for x in (q, k, v)]
    rows, new = recurrent(*step, slope, initial_state=pool[index[live]], scale=scale, dtype=dtype)
    out[live] = rows[:, :, 0]
    pool[index[live]] = new
    return out, pool


def _each_sequence(one, q, k, v, slope, state, cu_seqlens, dtype, grad_out=None, grad_state=None):
    """Run `one(q, k, v, s, state[, grad_out, grad_state])` on the dense batch, or on each packed sequence in turn.

    Results that have tokens come first and are joined along N, the others along num_seqs.
    """
    q, k, v = (x.to(dtype) for x in (q, k, v))
    num_seqs, heads = _num_seqs(q, cu_seqlens), q.shape[1]
    s = torch.zeros(heads, dtype=dtype, device=q.device) if slope is None else slope.to(dtype)
    s = s.expand(num_seqs, heads)
    if state is None:
        state = torch.zeros(num_seqs, heads, q.shape[3], v.shape[3], dtype=dtype, device=q.device)
    per_token = [q, k, v] if grad_out is None else [q, k, v, grad_out.to(dtype)]
    per_seq = [s, state.to(dtype)] if grad_state is None else [s, state.to(dtype), grad_state.to(dtype)]

    def call(tokens, seqs):
        return one(*tokens[:3], *seqs[:2], *tokens[3:], *seqs[2:])

    if cu_seqlens is None:
        return call(per_token, per_seq)
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences need a batch of 1, got {q.shape[0]}")
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != q.shape[2] or any(lo > hi for lo, hi in zip(ends, ends[1:])):
        raise ValueError(f"cu_seqlens must rise from 0 to N = {q.shape[2]}, got {ends}")
    spans = list(zip(ends, ends[1:]))
    if not spans:  # one empty sequence gives every result its type; its rows are cut off below
        spans = [(0, 0)]
        per_seq = [torch.cat((x, x.new_zeros(1, *x.shape[1:]))) for x in per_seq]
    parts = [
        call([x[:, :, lo:hi] for x in per_token], [x[i : i + 1] for x in per_seq]) for i, (lo, hi) in enumerate(spans)
    ]
    num_token_results = 1 if grad_out is None else 3
    return tuple(
        torch.cat(column, 2) if i < num_token_results else torch.cat(column, 0)[:num_seqs]
        for i, column in enumerate(zip(*parts))
    )


def _num_seqs(q, cu_seqlens):
    return q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _decays(s, length):
    """Lambda and Phi as columns [.., length, 1] and M [.., length, length]. Exponents are never positive."""
    r = torch.arange(1, length + 1, dtype=s.dtype, device=s.device)
    s = s[..., None, None]
    steps = (r[:, None] - r).clamp(min=0)
    mask = torch.exp(-s * steps) * (r[:, None] >= r)
    return torch.exp(-s * r[:, None]), torch.exp(-s * (length - r[:, None])), mask


def _power(s, length):
    return torch.exp(-s * length)[..., None, None]


def _rows(x, length):
    """Row numbers 1..length, and the steps i-j (negative above the diagonal, where M is zero)."""
    r = torch.arange(1, length + 1, dtype=x.dtype, device=x.device)
    return r, r[:, None] - r


def _rounding(dtype, operand_dtype):
    if operand_dtype is None:
        return lambda x: x
    return lambda x: x.to(operand_dtype).to(dtype)
