"""OpenNLPLab's ``lightning_attn.ops`` (lightning_attn 0.0.5): ``lightning_attn_func``.

Differences: any length and head dim, CPU tensors too, strided tensors without a copy; float32 inputs in float32 (there
in TF32, unless ``torch.set_float32_matmul_precision`` allows it here); a gradient for s where it asks for one (there
None); nothing is compiled at the first call of a shape; works under ``torch.compile``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import slopes
from ._common import attend, per_head

__all__ = ["lightning_attn_func"]


def lightning_attn_func(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
    """Causal linear attention with the decay exp(-s) a token, no scale.

    Args:
        q, k: ``[B, H, N, D]``; v: ``[B, H, N, E]``; bfloat16, float16, float32 (float64 on the CPU).
        s: one number a head, >= 0, in any shape (there ``[H, 1, 1]``) and dtype; None: no decay.

    Returns:
        ``[B, H, N, E]``, of v's dtype.

    Raises:
        ValueError: if s is not one number a head; RuntimeError: from the operator, on tensors that do not fit.
    """
    slope = None if s is None else per_head("lightning_attn_func", "s", s, q.shape[1], q)
    return attend(q, k, v, slope)[0]


def _build_slope_tensor(n_attention_heads: int) -> Tensor:
    """``[H, 1, 1]`` float32: the ALiBi slopes, as ``lightning_attn.utils._build_slope_tensor``."""
    return slopes.sala(n_attention_heads).to(torch.float32)[:, None, None]
