"""The state-only pass and the sum of what arrives from other ranks.

`edge_state` is the one part of context parallelism that reads all tokens beside the operator itself: two of the
operator's four tensors. It is plain matrix products, in float32 (float64 for float64), over chunks. `torch.ops.la2`
has no state-only operator; `forward_with_state` would give the same state with a query of zeros, but it computes and
writes an output that nobody reads, and has no form that sweeps from the right, which the backward needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import _accumulation_dtype
from .chain import on

# Tokens in a chunk. CPU: what stays in a core's cache; on an AMD EPYC (one thread, H = 8, D = E = 64, N = 16384, no
# decay, float32) 12 ms with 2048 against 24 ms in one piece. A GPU wants few launches.
_CHUNK = {"cpu": 2048}
_CHUNK_ELSEWHERE = 16384


def _product(a: Tensor, weights: Tensor, b: Tensor, acc: torch.dtype) -> Tensor:
    """`[B, H, D, E]`: sum over tokens of weights `[b, H, N, 1]` times `a^T b`, summed in `acc`."""
    weighted = a.to(acc) * weights
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        # Tensor cores: operands are rounded as the kernels round theirs, sums are float32.
        rows = [torch.bmm(x.mT, y, out_dtype=acc) for x, y in zip(weighted.to(a.dtype), b, strict=True)]
        return torch.stack(rows)
    return weighted.mT @ b.to(acc)


@torch.library.custom_op("la2_distributed::edge_state", mutates_args=())
def edge_state(a: Tensor, b: Tensor, slope: Tensor | None, span: Tensor | None, leftward: bool) -> Tensor:
    """`sum over i in span of lambda^e a_i b_i^T`, `[B, H, D, E]`, e the steps from row i to an edge of the span.

    Not `leftward`: the state that leaves over the right edge, e = hi - 1 - i. `leftward`: the gradient that leaves over
    the left edge, e = i - lo + 1.

    Args:
        a: `[B, H, N, D]`; b: `[B, H, N, E]`; slope: `[H]`, `[B, H]` or None.
        span: int64 `[2]`, rows [lo, hi) that count; None is all of them.
    """
    acc = _accumulation_dtype(a)
    n = a.shape[2]
    lo, hi = 0, n
    if span is not None and span.device.type == "cpu":
        lo, hi = span.tolist()
        a, b, n, span = a[:, :, lo:hi], b[:, :, lo:hi], hi - lo, None
        lo, hi = 0, n
    elif span is not None:
        lo, hi = span[0], span[1]
    state = torch.zeros(a.shape[0], a.shape[1], a.shape[3], b.shape[3], dtype=acc, device=a.device)
    chunk = _CHUNK.get(a.device.type, _CHUNK_ELSEWHERE)
    on_host, heads = a.device.type == "cpu", slice(None)
    chunks = range(0, n, chunk)
    for begin in chunks if leftward else reversed(chunks):  # from the edge on, into the past or the future
        row = torch.arange(begin, min(begin + chunk, n), device=a.device)
        steps = row - lo + 1 if leftward else hi - 1 - row
        if slope is None:
            weights = torch.ones(1, 1, len(row), dtype=acc, device=a.device)
        else:
            rates = slope.double() if slope.dim() == 2 else slope.double()[None]
            weights = torch.exp(-rates[..., None] * steps.clamp(min=0)).to(acc)  # [b, H, rows]
        if span is not None:
            weights = torch.where((row >= lo) & (row < hi), weights, 0)
        if on_host and slope is not None:
            # Heads whose decay has underflowed to zero here are done; usual slopes leave a few long ones.
            alive = weights.amax((0, 2)).nonzero().flatten().tolist()
            if not alive:
                break
            heads = slice(alive[0], alive[-1] + 1)
            weights = weights[:, heads]
        rows = slice(begin, begin + chunk)
        state[:, heads] += _product(a[:, heads, rows], weights[..., None], b[:, heads, rows], acc)
    return state


@edge_state.register_fake
def _(a, b, slope, span, leftward):
    shape = (a.shape[0], a.shape[1], a.shape[3], b.shape[3])
    return torch.empty(shape, dtype=_accumulation_dtype(a), device=a.device)


def arriving(blocks: Tensor, weights: Tensor, connected: Tensor) -> Tensor:
    """`sum over c of weights[c] blocks[c]` where `connected`: blocks `[C, B, H, D, E]`, weights `[C, b, H]`.

    What is not connected does not count, whatever is in it: the NaN of a later token must not reach an earlier one.
    """
    keep = on(blocks, connected)[:, None, None, None, None]
    return torch.where(keep, weights[..., None, None] * blocks, 0).sum(0)
