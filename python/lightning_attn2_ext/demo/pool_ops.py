"""``la2::extend``, ``la2::verify`` and ``la2::commit`` where this build has them; else the same by operators it has."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compat._common import accumulation, read_pool, write_pool

_la2 = torch.ops.la2


def _extend(q, k, v, state, cu_seqlens, slope=None, *, read_slots, write_slots, scale=1.0) -> Tensor:
    """Tokens ``[tokens, H, D]`` of requests one behind the other; copies states out of the pool and back."""
    rows = (t.transpose(0, 1)[None] for t in (q, k, v))
    initial = read_pool(state, read_slots, accumulation(q))
    out, final = _la2.forward_with_state(*rows, slope, initial_state=initial, cu_seqlens=cu_seqlens, scale=scale)
    write_pool(state, write_slots, final)
    return out[0].transpose(0, 1)


def _own_rows(slots: Tensor) -> Tensor:
    """Each row's own index, or -1 for padding."""
    return torch.where(slots >= 0, torch.arange(slots.shape[0], device=slots.device), -1)


def _verify(q, k, v, state, slope=None, *, state_indices, scale=1.0) -> Tensor:
    """Draft tokens ``[rows, T, H, D]``, decoded one after the other from a copy of their states."""
    states, rows = read_pool(state, state_indices, accumulation(q)), _own_rows(state_indices)
    steps = [
        _la2.decode(q[:, t], k[:, t], v[:, t], states, slope, state_indices=rows, scale=scale)
        for t in range(q.shape[1])
    ]
    return torch.stack(steps, 1)


def _commit(k, v, state, num_accepted, slope=None, *, state_indices) -> None:
    """The same with the states themselves, as far as tokens were accepted."""
    states, rows = read_pool(state, state_indices, accumulation(k)), _own_rows(state_indices)
    for t in range(k.shape[1]):
        _la2.decode(k[:, t], k[:, t], v[:, t], states, slope, state_indices=torch.where(num_accepted > t, rows, -1))
    write_pool(state, torch.where(num_accepted > 0, state_indices, -1), states)


extend = getattr(_la2, "extend", _extend)
verify = getattr(_la2, "verify", _verify)
commit = getattr(_la2, "commit", _commit)
