"""What the modules beside this one share: head dims that the operators do not take, and pools of states."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import slopes
from ..functional import lightning_attention_decode

_STEP, _LARGEST = 8, 256


def accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_head(function: str, name: str, values: Tensor, heads: int, like: Tensor) -> Tensor:
    """A tensor of one number a head, in whatever shape it came, as ``[H]`` in the accumulation dtype."""
    if values.numel() != heads:
        raise ValueError(f"{function}: {name} has shape {tuple(values.shape)}, expected one number for {heads} heads")
    return values.reshape(heads).to(like.device, accumulation(like))


_kept = functools.lru_cache(maxsize=256)(slopes.slopes)


def formula(kind: str, heads: int, layer_idx: int, num_layers: int, device: torch.device) -> Tensor:
    """Slopes on the device, kept there: a copy from the host in every call would break a CUDA graph."""
    compute = slopes.slopes if torch.compiler.is_compiling() else _kept
    return compute(kind, heads, layer_idx, num_layers, device=device)


def refuse(function: str, **given) -> None:
    """Raise for an argument that is given but not supported."""
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"{function}: {name} is given, expected None: it is not supported")


def _padded(x: Tensor) -> Tensor:
    missing = -x.shape[-1] % _STEP
    return F.pad(x, (0, missing)) if missing else x


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The operator for any D and E: zeros fill up to a multiple of 8, and wider ones are cut, which is exact: the
    output is a sum over key dimensions, and each value dimension stands alone. (Partial outputs are rounded before the
    sum.)"""
    options = {"cu_seqlens": cu_seqlens, "scale": scale}
    d, e = q.shape[-1], v.shape[-1]
    if initial_state is not None:
        initial_state = initial_state.to(accumulation(q))
    if d % _STEP == 0 and e % _STEP == 0 and max(d, e) <= _LARGEST:
        if not return_state:
            return torch.ops.la2.forward(q, k, v, slope, initial_state=initial_state, **options), None
        return torch.ops.la2.forward_with_state(q, k, v, slope, initial_state=initial_state, **options)
    q, k, v = _padded(q), _padded(k), _padded(v)
    if initial_state is not None:
        initial_state = F.pad(initial_state, (0, v.shape[-1] - e, 0, q.shape[-1] - d))
    outs, states = [], []
    for column in range(0, v.shape[-1], _LARGEST):
        values = slice(column, column + _LARGEST)
        total, parts = None, []
        for row in range(0, q.shape[-1], _LARGEST):
            keys = slice(row, row + _LARGEST)
            state = None if initial_state is None else initial_state[..., keys, values]
            out, final = torch.ops.la2.forward_with_state(
                q[..., keys], k[..., keys], v[..., values], slope, initial_state=state, **options
            )
            total = out if total is None else total + out
            parts.append(final)
        outs.append(total)
        states.append(torch.cat(parts, -2))
    return torch.cat(outs, -1)[..., :e], (torch.cat(states, -1)[..., :d, :e] if return_state else None)


# ---- pools of states: rows name their slot; a negative one is padding


def read_pool(pool: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """``pool[slots]`` as a tensor of its own; padding reads some slot."""
    return pool.index_select(0, slots.clamp(min=0)).to(dtype)


def write_pool(pool: Tensor, slots: Tensor, states: Tensor) -> None:
    """``pool[slots] = states`` but for padding, without reading slots on the host.

    Padding rows repeat what the first other row writes; where there is none, they write back what is there.
    """
    live = slots >= 0
    rows = torch.where(live, torch.arange(slots.shape[0], device=slots.device), live.to(torch.int32).argmax())
    target = slots.index_select(0, rows).clamp(min=0).long()
    values = torch.where(live.any(), states.index_select(0, rows).to(pool.dtype), pool.index_select(0, target))
    pool.index_copy_(0, target, values)


def decode_in_pool(
    q: Tensor, k: Tensor, v: Tensor, pool: Tensor, slope: Tensor | None, slots: Tensor, scale: float
) -> Tensor:
    """`la2::decode` against a pool of any floating dtype; the arithmetic is the operator's, in float32."""
    dtype = accumulation(q)
    if pool.dtype == dtype:
        return lightning_attention_decode(q, k, v, pool, slope, state_indices=slots, scale=scale)
    states = read_pool(pool, slots, dtype)
    rows = torch.where(slots >= 0, torch.arange(slots.shape[0], device=slots.device), -1)
    out = lightning_attention_decode(q, k, v, states, slope, state_indices=rows, scale=scale)
    write_pool(pool, slots, states)
    return out
