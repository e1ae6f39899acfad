"""``demo --context-parallel``: every training window is split over the processes of a ``torchrun``."""

from __future__ import annotations

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import shard_lengths, split_sequence
from .model import HISTORY, LanguageModel


class Parallel:
    """The processes that train one model together, each on its tokens of every window."""

    def __init__(self, length: int):
        if not dist.is_initialized():
            dist.init_process_group()  # gloo for the CPU, NCCL for GPUs
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.lengths = shard_lengths(length, self.world)

    def cut(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """Of windows `[rows, HISTORY + length + 1]` the bytes that this rank reads, with those that its embedding looks
        back at, and the bytes that they are asked for."""
        begin = sum(self.lengths[: self.rank])
        end = begin + self.lengths[self.rank]
        labels = split_sequence(window[:, HISTORY + 1 :], 1, lengths=self.lengths)
        return window[:, begin : HISTORY + end], labels

    def split(self, model: LanguageModel) -> None:
        """From here on the model's forward is that of a rank's tokens."""
        for block in model.blocks:
            block.mixer.context_parallel = {"lengths": self.lengths}

    def whole(self, model: LanguageModel) -> None:
        for block in model.blocks:
            block.mixer.context_parallel = None

    def sum(self, *tensors: Tensor) -> None:
        for x in tensors:
            dist.all_reduce(x)

    def as_first(self, value: float) -> float:
        """Rank 0's value: what depends on a clock must not differ."""
        told = torch.tensor([value], dtype=torch.float64)
        told = told if "cpu" in dist.get_backend_config() else told.cuda()
        dist.broadcast(told, src=0)
        return told.item()


def from_environment(length: int) -> Parallel:
    if "RANK" not in os.environ:
        raise SystemExit(
            "demo: --context-parallel without processes to split over, expected\n"
            "  torchrun --nproc-per-node 2 -m lightning_attn2_ext demo --context-parallel"
        )
    return Parallel(length)


def device() -> torch.device:
    """One GPU a process where there are as many, else the CPU."""
    local, number = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and torch.cuda.device_count() >= number:
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device("cpu")


@contextlib.contextmanager
def only_first_speaks():
    """What other ranks than the first print is dropped."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        stderr, sys.stderr = sys.stderr, nothing  # the progress bar
        try:
            yield
        finally:
            sys.stderr = stderr
