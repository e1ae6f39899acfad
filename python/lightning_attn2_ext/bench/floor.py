"""The least that an operator can take: the bytes that must move, at the speed at which this device copies memory."""

from __future__ import annotations

import torch

from .timing import CudaClock

COPY_BYTES = 2 << 30


def copy_bandwidth(clock: CudaClock) -> float:
    """Bytes per second, read plus written, of a device-to-device copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device=clock.device).zero_()
    target = torch.empty_like(source)
    milliseconds = clock.median(lambda: target.copy_(source), repeats=10)
    return 2 * COPY_BYTES / (milliseconds * 1e-3)


def forward_bytes(q: torch.Tensor, v: torch.Tensor) -> int:
    """q and k and v read once, the output written once."""
    return q.element_size() * 2 * (q.numel() + v.numel())


def backward_bytes(q: torch.Tensor, v: torch.Tensor) -> int:
    """q, k, v and grad_out read once, dq, dk and dv written once."""
    return q.element_size() * (4 * q.numel() + 3 * v.numel())
