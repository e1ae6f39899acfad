"""What one layer remembers of the tokens it has read."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LayerState"]


class LayerState:
    """The cache of one :class:`LightningAttention`: a state of fixed size and the tokens read, for each sequence.

    Without gradients the layer updates both in place, so their addresses stay (CUDA graphs, compiled decode). With
    gradients it puts new tensors there, and the loss reaches back through them until :meth:`detach_`.

    Attributes:
        state: ``[B, H, D, E]`` float32 (float64 for a float64 layer): S after the last token, not decayed further.
        length: ``[B]`` int64, tokens read, which is the position of the next one.
    """

    def __init__(self, state: Tensor, length: Tensor):
        self.state = state
        self.length = length

    @classmethod
    def zeros(cls, batch: int, heads: int, key_dim: int, value_dim: int, *, device=None, dtype=torch.float32):
        state = torch.zeros(batch, heads, key_dim, value_dim, device=device, dtype=dtype)
        return cls(state, torch.zeros(batch, dtype=torch.int64, device=device))

    def store(self, state: Tensor, length: Tensor) -> None:
        """Keep ``state`` and ``length``: in place, except where a gradient flows through them."""
        if state.requires_grad or self.state.requires_grad:
            self.state, self.length = state, length
        else:
            self.state.copy_(state)
            self.length.copy_(length)

    def select(self, indices: Tensor) -> LayerState:
        """The sequences ``indices`` (int64 ``[B']``), with repetitions: beam search, or a batch that shrinks."""
        return LayerState(self.state.index_select(0, indices), self.length.index_select(0, indices))

    def reorder_(self, indices: Tensor) -> LayerState:
        """As :meth:`select` with as many sequences as before, in place."""
        self.state.copy_(self.state.index_select(0, indices))
        self.length.copy_(self.length.index_select(0, indices))
        return self

    def reset_(self) -> LayerState:
        """Forget everything, in place."""
        self.state.zero_()
        self.length.zero_()
        return self

    def detach_(self) -> LayerState:
        """Cut the graph: truncated backpropagation through time."""
        self.state = self.state.detach()
        return self

    def clone(self) -> LayerState:
        return LayerState(self.state.clone(), self.length.clone())

    def __repr__(self) -> str:
        return f"LayerState(state={tuple(self.state.shape)} {self.state.dtype}, device={self.state.device})"
