"""Counts what a rank sends."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_QUIET = {"wait_tensor", "_wrap_tensor_autograd", "recv_", "barrier", "monitored_barrier_"}


class Wire(TorchDispatchMode):
    """Bytes that this rank sends in collectives and messages while the mode is on: ``sent[name]``.

    A gather is counted as the ring that it is: every rank passes W - 1 blocks on.
    """

    def __init__(self):
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name not in _QUIET:
            tensors = [args[0]] if isinstance(args[0], torch.Tensor) else list(args[0])
            copies = dist.get_world_size() - 1 if "gather" in name else 1
            here = copies * sum(x.numel() * x.element_size() for x in tensors)
            self.sent[name] = self.sent.get(name, 0) + here
        return func(*args, **(kwargs or {}))
