"""vLLM's ``vllm.model_executor.layers.lightning_attn`` (0.33): ``lightning_attention``,
``linear_decode_forward_triton``.

Differences: rows behind the first block of 256 and rows that continue from ``kv_history`` are right. vLLM 0.33 adds
what comes through the state multiplied by ``exp(ed)``, one decay step too few; its state and its decode are right, so
prefill and decode disagree there and agree here. Further: any head dim; padding rows of decode are zero (there
uninitialised) and any negative slot is padding (there -1); the pool is updated in float32 arithmetic whatever its
dtype; block_size counts (there it is 256 whatever is said); there is a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import attend, decode_in_pool, per_head

__all__ = ["lightning_attention", "linear_decode_forward_triton"]


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ed: Tensor,
    block_size: int = 256,
    kv_history: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prefill with the decay exp(-ed) a token, no scale.

    Args:
        q, k: ``[B, H, N, D]``; v: ``[B, H, N, E]``.
        ed: one number a head, >= 0, in any shape.
        block_size: tokens between two of the states that are returned.
        kv_history: ``[B, H, D, E]``, the state before the first token; not changed. None: zero.

    Returns:
        ``(output [B, H, N, E], kv [B, H, blocks + 1, D, E])``: ``kv[:, :, i]`` is the state before block i and
        ``kv[:, :, -1]`` the one behind the last token, in float32.

    Raises:
        ValueError: if ed is not one number a head. RuntimeError: from the operator.
    """
    batch, heads, length, dim = q.shape
    slope = per_head("lightning_attention", "ed", ed, heads, q)
    output, final = attend(q, k, v, slope, initial_state=kv_history, return_state=True)
    state = final.new_zeros(batch, heads, dim, v.shape[-1]) if kv_history is None else kv_history.to(final.dtype)
    states, full = [state] if length else [], max(length - 1, 0) // block_size
    if full:
        # Of each full block but the last, what it adds to the state, all at once; then one step of the recurrence a
        # block.
        steps = torch.arange(block_size - 1, -1, -1, device=q.device, dtype=final.dtype)
        to_edge = torch.exp(-slope[:, None] * steps)[:, None, :, None]
        over_block = torch.exp(-slope * block_size)[:, None, None]
        keys, values = (t[:, :, : full * block_size].unflatten(2, (full, block_size)).to(final.dtype) for t in (k, v))
        for added in ((to_edge * keys).mT @ values).unbind(2):
            states.append(over_block * states[-1] + added)
    return output, torch.stack((*states, final), 2)


def linear_decode_forward_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_caches: Tensor,
    slope_rate: Tensor,
    slot_idx: Tensor,
    BLOCK_SIZE: int = 32,
) -> Tensor:
    """One token a row against a pool of states, which is updated in place.

    Args:
        q, k: ``[B, H, 1, D]``; v: ``[B, H, 1, E]``.
        kv_caches: ``[slots, H, D, E]``, float32 best; another dtype costs a copy of the rows' states to and fro.
        slope_rate: one number a head, >= 0, in any shape.
        slot_idx: integers ``[B]``, no two alike but for negative ones, which are padding.
        BLOCK_SIZE: without effect.

    Returns:
        ``[B, H * E]``; padding rows are zero.

    Raises:
        ValueError: where q is no single token or slope_rate not one number a head. RuntimeError: from the operator.
    """
    if q.dim() != 4 or q.shape[2] != 1:
        raise ValueError(f"linear_decode_forward_triton: q has shape {tuple(q.shape)}, expected [B, H, 1, D]")
    slope = per_head("linear_decode_forward_triton", "slope_rate", slope_rate, q.shape[1], q)
    rows = (t.squeeze(2) for t in (q, k, v))
    return decode_in_pool(*rows, kv_caches, slope, slot_idx, 1.0).flatten(1)
