"""The operators that ``bench ops`` compares, each in the layout and with the decay convention that is its own.

A peer is asked for a head-major or token-major tensor as it wants it and gets its inputs made in that layout, so that
nobody is charged for a transposition. All of them compute ``scale = 1`` and the decay ``exp(-s)`` per token, except
softmax attention, which is another operator and is there for scale.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import testing


class Peer:
    """One way to compute the operator. ``token_major``: its tensors lie as [B, N, H, D] rather than [B, H, N, D]."""

    name = ""
    module: str | None = None  # what has to be importable
    distribution: str | None = None
    token_major = False
    softmax = False
    has_packed = False

    def missing(self) -> str | None:
        """Why this peer cannot run here, or None."""
        if self.module is None:
            return None
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a package that is broken for this torch is as absent as one that is not there
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.distribution) if self.distribution else None
        except importlib.metadata.PackageNotFoundError:
            return None

    def lay_out(self, x: Tensor) -> Tensor:
        """``[B, H, N, D]`` to the tensor that this peer takes, dense in its own layout."""
        return x.transpose(1, 2).contiguous() if self.token_major else x.contiguous()

    def head_major(self, x: Tensor) -> Tensor:
        """A result of this peer as ``[B, H, N, D]`` (a view)."""
        return x.transpose(1, 2) if self.token_major else x

    def prepare(self, slope: Tensor) -> None:
        """Takes the slopes ``[H]``, s >= 0, and keeps them in this peer's convention."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def backward(self, out: Tensor, leaves: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
        """The gradients alone; the graph stays."""
        return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Forward over packed sequences with their final states ``[num_seqs, H, D, E]``."""
        raise NotImplementedError


class Ours(Peer):
    name = "la2 BHND"

    def prepare(self, slope):
        self.slope = slope

    def forward(self, q, k, v):
        return torch.ops.la2.forward(q, k, v, self.slope)

    has_packed = True

    def packed(self, q, k, v, cu_seqlens):
        return torch.ops.la2.forward_with_state(q, k, v, self.slope, cu_seqlens=cu_seqlens)


class OursTokenMajor(Ours):
    """The same operator on [B, N, H, D] storage: it takes the transposed views as they are."""

    name = "la2 BNHD"
    token_major = True

    def forward(self, q, k, v):
        return super().forward(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def packed(self, q, k, v, cu_seqlens):
        out, state = super().packed(*(x.transpose(1, 2) for x in (q, k, v)), cu_seqlens)
        return out.transpose(1, 2), state


class OursPortable(Ours):
    """The kernels for every GPU from sm_80, on a GPU that has others."""

    name = "la2 sm80 BHND"

    def missing(self):
        is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
        return None if is_hopper else "these are the only kernels for this GPU, and have their rows above"

    @staticmethod
    def _forced():
        return testing.forced_plan(",".join(filter(None, ["family=sm80", os.environ.get("LA2_PLAN")])))

    def forward(self, q, k, v):
        with self._forced():
            return super().forward(q, k, v)

    def backward(self, out, leaves, grad_out):
        with self._forced():
            return super().backward(out, leaves, grad_out)

    def packed(self, q, k, v, cu_seqlens):
        with self._forced():
            return super().packed(q, k, v, cu_seqlens)


class OursPortableTokenMajor(OursPortable, OursTokenMajor):
    name = "la2 sm80 BNHD"


class LightningAttn(Peer):
    """The paper's own Triton kernels. Slopes: s, shape [H, 1, 1]."""

    name = "lightning_attn"
    module = "lightning_attn.ops"
    distribution = "lightning_attn"

    def prepare(self, slope):
        self.function = importlib.import_module(self.module).lightning_attn_func
        self.slope = slope[:, None, None].contiguous()

    def forward(self, q, k, v):
        return self.function(q, k, v, self.slope)


class Fla(Peer):
    """flash-linear-attention's simple GLA with a fixed decay a head. Slopes: g_gamma = -s."""

    name = "fla simple_gla"
    module = "fla.ops.simple_gla"
    distribution = "flash-linear-attention"
    token_major = True
    has_packed = True

    def prepare(self, slope):
        self.function = importlib.import_module(self.module).chunk_simple_gla
        self.gamma = -slope

    def forward(self, q, k, v):
        return self.function(q, k, v, g_gamma=self.gamma, scale=1.0)[0]

    def packed(self, q, k, v, cu_seqlens):
        return self.function(
            q, k, v, g_gamma=self.gamma, scale=1.0, cu_seqlens=cu_seqlens.long(), output_final_state=True
        )


class CudnnSoftmax(Peer):
    """Causal softmax attention by cuDNN: not this operator, but what a model would use instead."""

    name = "softmax (cuDNN)"
    softmax = True
    backend_name = "CUDNN_ATTENTION"

    def missing(self):
        if not torch.backends.cuda.cudnn_sdp_enabled() or not torch.backends.cudnn.is_available():
            return "torch has no cuDNN attention here"
        return None

    def prepare(self, slope):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        self.backend = lambda: sdpa_kernel(getattr(SDPBackend, self.backend_name))

    def forward(self, q, k, v):
        with self.backend():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class FlashSoftmax(CudnnSoftmax):
    """The same by the FlashAttention-2 that torch carries."""

    name = "softmax (flash)"
    backend_name = "FLASH_ATTENTION"

    def missing(self):
        return None if torch.backends.cuda.flash_sdp_enabled() else "torch has no flash attention here"


PEERS: tuple[type[Peer], ...] = (
    Ours,
    OursTokenMajor,
    OursPortable,
    OursPortableTokenMajor,
    LightningAttn,
    Fla,
    CudnnSoftmax,
)
