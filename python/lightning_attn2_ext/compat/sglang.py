"""sglang's segmented linear attention (``seg_la``, 0.5.23): ``seg_la_fwd`` and its ``SegLaMeta``.

Differences: rows of padding (slot < 0) are zero (there uninitialised); a state is tracked at any token count (there at
multiples of 32 and at the end); slopes may be steep (there ``exp(31 s)`` overflows float32 above 2.8); the arithmetic
is float32 without TF32 unless torch's settings allow it, and the output is rounded once (there each quarter of the key
dimension is); ``meta.q_lengths`` is not read, the lengths are those of ``meta.q_offsets``. A tree mask is refused.

Tracking costs a second pass over the tracked tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..functional import lightning_attention_decode
from ._common import accumulation, decode_in_pool, per_head, read_pool, refuse, write_pool

__all__ = ["SegLaMeta", "seg_la_fwd"]


@dataclasses.dataclass
class SegLaMeta:
    """What describes the requests of a call.

    Attributes:
        batch_size: requests, bs.
        max_q_length: not read.
        q_offsets: ``[bs + 1]``, where each request's tokens start.
        s_offsets: ``[bs]``, each request's slot in the pool; negative: padding.
        q_lengths: ``[bs]``, not read.
        s_scales: ``[bs]``, whether a request goes on from its state (> 0) or starts from zero.
        mask: must be None.
    """

    batch_size: int
    max_q_length: int | None
    q_offsets: Tensor
    s_offsets: Tensor
    q_lengths: Tensor | None
    s_scales: Tensor
    s_offsets_stride: int = 0
    q_offsets_stride: int = 0
    s_scales_stride: int = 0
    decay_scales_stride: int = 0
    mask: Tensor | None = None


def seg_la_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    decay_scales: Tensor,
    meta: SegLaMeta,
    caches: Tensor | None = None,
    cache_indices: Tensor | None = None,
    track_lens: Tensor | None = None,
    track_state_indices: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Prefill, decode or verification of the tokens of several requests against a pool of states.

    With ``caches`` it is a verification: every request has ``L / bs`` draft tokens, goes on from its state, which
    stays, and the state behind each token goes into ``caches``. Else, with as many tokens as requests, it is a decode:
    every request goes on from its state. Else a prefill, which heeds ``meta.s_scales``.

    Args:
        q, k, v: ``[L, H, D]``, the tokens of all requests one behind the other.
        s: the pool, ``[slots, H, D, D]``, float32 best; updated in place, except in a verification.
        decay_scales: one number a head, >= 0: the decay is exp(-decay_scales) a token.
        meta: anything with the attributes of `SegLaMeta`.
        caches: ``[entries, steps, H, D, D]``, steps at least ``L / bs``.
        cache_indices: ``[bs]``, each request's entry in caches.
        track_lens: ``[bs]``, tokens of this call (up to the request's length) behind which to keep the state; 0: none.
        track_state_indices: ``[bs]``, the slot of s to keep it in; negative: none.
        softmax_scale: on the scores; None: ``D ** -0.5``.

    Returns:
        ``[L, H, D]``, of q's dtype.

    Raises:
        NotImplementedError: where meta.mask is given. ValueError: where shapes contradict each other.
        RuntimeError: from the operator.
    """
    refuse("seg_la_fwd", **{"meta.mask": meta.mask})
    length, heads, dim = q.shape
    batch = meta.batch_size
    if k.shape != q.shape:
        raise ValueError(f"seg_la_fwd: k has shape {tuple(k.shape)}, expected that of q, {tuple(q.shape)}")
    if (track_lens is None) != (track_state_indices is None):
        raise ValueError("seg_la_fwd: one of track_lens and track_state_indices is given, expected both or none")
    slope = per_head("seg_la_fwd", "decay_scales", decay_scales, heads, q)
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if length <= batch:
        return decode_in_pool(q, k, v, s, slope, meta.s_offsets, scale)
    if caches is not None:
        if length % batch:
            raise ValueError(f"seg_la_fwd: q.shape[0] is {length}, expected a multiple of the batch size, {batch}")
        if cache_indices is None:
            raise ValueError("seg_la_fwd: cache_indices is None, expected one entry a request with caches")
        return _verify(q, k, v, s, slope, scale, meta, caches, cache_indices)
    return _prefill(q, k, v, s, slope, scale, meta, track_lens, track_state_indices)


def _prefill(q, k, v, s, slope, scale, meta, track_lens, track_state_indices) -> Tensor:
    length, dtype, slots = q.shape[0], accumulation(q), meta.s_offsets
    live = slots >= 0
    states = read_pool(s, slots, dtype)
    states = torch.where(((meta.s_scales > 0) & live)[:, None, None, None], states, 0)
    # Tokens behind the last request, if any, are a sequence of their own: the operator wants all of them covered.
    offsets = torch.cat((meta.q_offsets, meta.q_offsets.new_full((1,), length)))
    rows = [t.transpose(0, 1)[None] for t in (q, k, v)]  # [1, H, L, D], views
    nothing = states.new_zeros(1, *states.shape[1:])
    out, final = torch.ops.la2.forward_with_state(
        *rows, slope, initial_state=torch.cat((states, nothing)), cu_seqlens=offsets, scale=scale
    )
    if track_lens is not None:
        wanted = live & (track_lens > 0) & (track_state_indices >= 0)
        cut = offsets[:-2] + torch.where(wanted, track_lens, 0).to(offsets.dtype)
        pieces = torch.cat((torch.stack((offsets[:-2], cut), 1).flatten(), offsets[-1:]))
        initial = torch.stack((states, torch.zeros_like(states)), 1).flatten(0, 1)
        _, tracked = torch.ops.la2.forward_with_state(
            *rows, slope, initial_state=initial, cu_seqlens=pieces, scale=scale
        )
        write_pool(s, torch.where(wanted, track_state_indices, -1), tracked[::2])
    write_pool(s, slots, final[:-1])
    # Which request a token belongs to; those behind the last one are padding as well.
    request = torch.searchsorted(offsets[1:], torch.arange(length, device=q.device), right=True)
    keep = torch.cat((live, live.new_zeros(1)))[request]
    return torch.where(keep[:, None, None], out[0].transpose(0, 1), 0)


def _verify(q, k, v, s, slope, scale, meta, caches, cache_indices) -> Tensor:
    batch, slots = meta.batch_size, meta.s_offsets
    live = slots >= 0
    states = read_pool(s, slots, accumulation(q))
    rows = torch.where(live, torch.arange(batch, device=q.device), -1)
    entries = torch.where(live, cache_indices, -1)
    q, k, v = (t.unflatten(0, (batch, -1)) for t in (q, k, v))
    outs = []
    for step in range(q.shape[1]):
        token = (t[:, step] for t in (q, k, v))
        outs.append(lightning_attention_decode(*token, states, slope, state_indices=rows, scale=scale))
        write_pool(caches[:, step], entries, states)
    return torch.stack(outs, 1).flatten(0, 1)
