"""What the experiments need of the machine that they run on."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ... import testing
from ...nn import LightningAttention
from ...nn.attention import activate
from .. import entries, gate, machine, peers
from .store import Store

#: The race of experiment (a), where each can run.
OPERATORS = (peers.Ours, peers.LightningAttn, peers.Fla, peers.CudnnSoftmax, peers.FlashSoftmax, entries.Sdpa)


@dataclasses.dataclass
class Run:
    device: torch.device
    dtype: torch.dtype
    quick: bool
    facts: dict
    store: Store

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def small(self) -> bool:
        """Whether only small models and lengths are feasible."""
        return self.quick or not self.gpu

    @functools.cached_property
    def clock(self):
        return machine.clock_for(self.device)

    @functools.cached_property
    def bytes_per_s(self) -> float:
        return machine.copy_bandwidth(self.clock)

    @functools.cached_property
    def peers(self) -> list[peers.Peer]:
        """The operators of `OPERATORS` that can run here; SDPA as torch picks it only where none of its own can."""
        found, self.facts["peers"] = entries.choose(self.device, self.dtype, None, OPERATORS)
        named = [p for p in found if not isinstance(p, entries.Sdpa)]
        return named if any(p.softmax for p in named) else found

    def median(self, call: Callable[[], object]) -> float:
        """Milliseconds of a call that has run before: as many repeats as 0.15 s have room for, at least 3."""
        first = self.seconds(call) * 1e3
        repeats = 1 if self.quick else max(3, min(10, int(150 / max(first, 1e-3))))
        return self.clock.median(call, repeats, warmup=0)

    def seconds(self, call: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        result = call()
        self.wait()
        taken = time.perf_counter() - start
        del result
        return taken

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def free_memory(self) -> None:
        if self.gpu:
            torch.cuda.empty_cache()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


Operator = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, scale: float) -> Tensor:
    return torch.ops.la2.forward(q, k, v, slope, scale=scale)


def plain(chunk: int) -> Operator:
    """The same in plain PyTorch, by chunks."""
    return lambda q, k, v, slope, scale: testing.chunked(q, k, v, slope, scale=scale, chunk=chunk)[0]


def softmax(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Layer(LightningAttention):
    """A published token mixer whose operator can be exchanged; stateless."""

    operator: Operator = staticmethod(ours)

    def _attend(self, q, k, v, silu, mask, cu_seqlens, state) -> Tensor:
        q, k, v = activate(q, k, v, silu)
        return self.operator(q, k, v, self.slope.to(testing.accumulation_dtype(q.dtype)), self.scale)


def sampled(x: Tensor) -> Tensor:
    """The first and the last batch row, the steepest and the flattest head: what the truth is computed for."""
    rows, heads = (sorted({0, n - 1}) for n in x.shape[:2])
    return x[rows][:, heads]


def judge(peer: peers.Peer, results: dict[str, Tensor], inputs: list[Tensor], slope: Tensor) -> gate.Verdict:
    """The verdict of gate.py on sampled batch rows and heads of the whole length."""
    q, k, v, grad_out = map(sampled, inputs)
    results = {name: sampled(x) for name, x in results.items()}
    if peer.softmax:
        return gate.check_softmax(results["out"], q, k, v)
    margin = testing.MARGIN if isinstance(peer, peers.Ours) else gate.PEER_MARGIN
    return gate.check(results, q, k, v, slope[sorted({0, len(slope) - 1})], grad_out, margin)
