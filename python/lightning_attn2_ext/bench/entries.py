"""Everything that ``bench compare`` and its kin set beside the operator: the peers of peers.py and some more."""

from __future__ import annotations

import importlib

import torch
from torch.nn import functional as F

from .. import testing
from . import peers


class Sdpa(peers.Peer):
    """Causal softmax attention as torch picks it: not this operator, but what a model would use instead."""

    name = "softmax (SDPA)"
    softmax = True

    def prepare(self, slope):
        pass

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class PlainChunks(peers.Peer):
    """The chunked form in plain PyTorch: what one writes without a kernel."""

    name = "plain PyTorch"

    def prepare(self, slope):
        self.slope = slope

    def forward(self, q, k, v):
        return testing.chunked(q, k, v, self.slope)[0]


class Vllm(peers.Peer):
    """vLLM's Triton prefill. Slopes: ed, shape [H]. It has no backward."""

    name = "vLLM"
    module = "vllm.model_executor.layers.lightning_attn"
    distribution = "vllm"
    has_backward = False

    def prepare(self, slope):
        self.function = importlib.import_module(self.module).lightning_attention
        self.slope = slope

    def forward(self, q, k, v):
        return self.function(q, k, v, self.slope)[0]


class Sglang(peers.Peer):
    """sglang's seg_la prefill of one request a batch row. It has no backward."""

    name = "sglang seg_la"
    module = "sglang.kernels.ops.attention.linear.seg_la"
    distribution = "sglang"
    token_major = True
    has_backward = False

    def prepare(self, slope):
        self.module_ = importlib.import_module(self.module)
        self.slope = slope

    def forward(self, q, k, v):
        batch, length, heads, dim = q.shape
        index = {"device": q.device, "dtype": torch.int32}
        offsets = torch.arange(0, (batch + 1) * length, length, **index)
        meta = self.module_.SegLaMeta(
            batch_size=batch,
            max_q_length=length,
            q_offsets=offsets,
            s_offsets=torch.arange(batch, **index),
            q_lengths=offsets.diff(),
            s_scales=torch.zeros(batch, **index),
        )
        pool = torch.zeros(batch, heads, dim, dim, device=q.device, dtype=torch.float32)
        rows = (x.flatten(0, 1) for x in (q, k, v))
        out = self.module_.seg_la_fwd(*rows, pool, self.slope, meta, softmax_scale=1.0)
        return out.unflatten(0, (batch, length))


ENTRIES: tuple[type[peers.Peer], ...] = (*peers.PEERS, Sdpa, PlainChunks, Vllm, Sglang)


def has_backward(peer: peers.Peer) -> bool:
    return getattr(peer, "has_backward", True)


def choose(
    device: torch.device, dtype: torch.dtype, only: list[str] | None, entries=None
) -> tuple[list[peers.Peer], dict[str, str]]:
    """The entries that can run here, and of all of them their version or why they were skipped; prints the latter."""
    found, said = [], {}
    for cls in ENTRIES if entries is None else entries:
        peer = cls()
        if only and not any(part in peer.name for part in only):
            continue
        if device.type == "cpu" and (peer.module is not None or isinstance(peer, peers.CudnnSoftmax)):
            reason = peer.missing() if peer.module is not None else None
            reason = reason or "runs on a CUDA device only"
        else:
            reason = peer.missing()
        if reason is None and isinstance(peer, peers.CudnnSoftmax) and dtype == torch.float32:
            reason = "takes bf16 and fp16 only"
        said[peer.name] = f"skipped: {reason}" if reason else peer.version() or "present"
        if reason:
            print(f"skipped: {peer.name}: {reason}")
        else:
            found.append(peer)
    return found, said


def failure(peer: peers.Peer, error: Exception, device: torch.device) -> dict:
    """What stands in the place of figures where a call raised; says so. Only ours makes the run a failed one."""
    torch.cuda.synchronize(device)
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    print(f"failed: {peer.name}: {message}")
    return {"op": peer.name, "skipped": "failed", "error": message, "passed": not isinstance(peer, peers.Ours)}
