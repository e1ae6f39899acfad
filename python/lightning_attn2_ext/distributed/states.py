"""The state-only pass and the sum of what arrives from other ranks.

`edge_state` is the one part of context parallelism that reads all tokens beside the operator itself: two of the
operator's four tensors. On a GPU it is the operator's own state pass, over pieces of the sequence side by side; on the
CPU it is plain matrix products over chunks, in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _load  # noqa: F401 - defines la2::_states
from .._ops import _accumulation_dtype
from .chain import decay, on

# Tokens in a chunk, on the CPU: what stays in a core's cache; on an AMD EPYC (one thread, H = 8, D = E = 64, N = 16384,
# no decay, float32) 12 ms with 2048 against 24 ms in one piece.
_CHUNK = 2048
# Pieces on a GPU: so many states that its multiprocessors are busy (two for each of 132, not tuned), and of whole
# chunks of the kernels.
_STATES = 264
_KERNEL_CHUNK = 64


def _on_gpu(a: Tensor, b: Tensor, slope: Tensor | None, span: Tensor | None, leftward: bool) -> Tensor:
    """`edge_state` of one batch row: the state of each piece, and their sum as each has decayed at the edge."""
    n, heads = a.shape[2], a.shape[1]
    per_piece = -(-n // max(1, _STATES // max(heads, 1)))
    per_piece = -(-per_piece // _KERNEL_CHUNK) * _KERNEL_CHUNK
    pieces = -(-n // per_piece) if n else 1
    lo, hi = (0, n) if span is None else (span[0], span[1])
    starts = torch.arange(pieces + 1, device=a.device) * per_piece
    edges = torch.clamp(starts + lo, max=hi) if span is None else torch.minimum(starts + lo, hi)
    states = torch.ops.la2._states(a, b, slope, cu_seqlens=edges, reverse=leftward)
    steps = edges[:-1] - lo if leftward else hi - edges[1:]
    return (decay(slope, steps, states)[:, 0, :, None, None] * states).sum(0)


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
    if span is not None and span.device.type == "cpu":
        low, high = span.tolist()
        a, b, span = a[:, :, low:high], b[:, :, low:high], None
    if a.is_cuda:
        rows = range(a.shape[0])
        slopes = [slope[i] if slope is not None and slope.dim() == 2 else slope for i in rows]
        return torch.stack([_on_gpu(a[i : i + 1], b[i : i + 1], slopes[i], span, leftward) for i in rows])
    n = a.shape[2]
    state = torch.zeros(a.shape[0], a.shape[1], a.shape[3], b.shape[3], dtype=acc, device=a.device)
    heads = slice(None)
    chunks = range(0, n, _CHUNK)
    for begin in chunks if leftward else reversed(chunks):  # from the edge on, into the past or the future
        row = torch.arange(begin, min(begin + _CHUNK, n))
        steps = row + 1 if leftward else n - 1 - row
        weights = decay(slope, steps, state).movedim(0, -1)  # [b, H, rows]
        if slope is not None:
            # Heads whose decay has underflowed to zero here are done; usual slopes leave a few long ones.
            alive = weights.amax((0, 2)).nonzero().flatten().tolist()
            if not alive:
                break
            heads = slice(alive[0], alive[-1] + 1)
            weights = weights[:, heads]
        rows = slice(begin, begin + _CHUNK)
        weighted = a[:, heads, rows].to(acc) * weights[..., None]
        state[:, heads] += weighted.mT @ b[:, heads, rows].to(acc)
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
