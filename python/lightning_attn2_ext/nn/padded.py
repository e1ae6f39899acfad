"""Rows of unlike lengths with states of their own, as one packed call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["forward_padded"]


def forward_padded(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, state: Tensor | None, slope: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Output and final states of rows of unlike lengths: padding on either side neither enters nor ages a row's state.

    One behind the other they are padding, row 0, padding, row 1, ..., padding: sequences of one packed call, those of
    padding with states of their own. No size depends on the mask, so nothing is read back from the device. Zeros of the
    mask between ones, which are no padding, add nothing to the state but age it.

    Args:
        q, k: ``[B, H, N, D]``; v: ``[B, H, N, E]``; best with ``[B, N, H, ...]`` storage, which is not copied.
        mask: bool ``[B, N]``, true for tokens.
        state: ``[B, H, D, E]``, the initial states, or None for zeros.
        slope, scale: as for `lightning_attention`.

    Returns:
        out ``[B, H, N, E]``, where rows of padding are meaningless, and the final states ``[B, H, D, E]``.
    """
    b, n = mask.shape
    ones = mask.to(torch.int32)
    start = ones.argmax(1)  # of the first largest: the first token
    stop = torch.where(mask.any(1), n - ones.flip(1).argmax(1), 0)
    edges = torch.stack((start, stop), 1) + (torch.arange(b, device=mask.device) * n)[:, None]
    last = edges.new_full((1,), b * n)
    cu_seqlens = torch.cat((edges.new_zeros(1), edges.flatten(), last))
    initial = None
    if state is not None:
        initial = state.new_zeros(b, 2, *state.shape[1:])
        initial[:, 1] = state
        initial = F.pad(initial.flatten(0, 1), (0, 0) * (state.dim() - 1) + (0, 1))
    k, v = (torch.where(mask[:, None, :, None], t, 0) for t in (k, v))
    packed = (t.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for t in (q, k, v))
    out, final = torch.ops.la2.forward_with_state(
        *packed, slope, initial_state=initial, cu_seqlens=cu_seqlens, scale=scale
    )
    return out.transpose(1, 2).unflatten(1, (b, n)).squeeze(0).transpose(1, 2), final[1::2]
