"""The small modules around the operator: grouped RMSNorm and the rotary embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GroupRMSNorm", "Lrpe", "Rotary"]


class GroupRMSNorm(nn.Module):
    """RMSNorm over each of ``groups`` equal parts of the last dimension; the mean is taken in float32."""

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-6, affine: bool = True, device=None, dtype=None):
        super().__init__()
        if groups < 1 or width % groups:
            raise ValueError(f"GroupRMSNorm: groups is {groups}, expected a divisor of the width, {width}")
        self.width, self.groups, self.eps = width, groups, eps
        if affine:
            self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x may be narrower than the weight, and the fused kernel wants one dtype.
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if self.groups == 1:
            return F.rms_norm(x, (self.width,), weight, self.eps)
        size = self.width // self.groups
        x = F.rms_norm(x.unflatten(-1, (self.groups, size)), (size,), None, self.eps).flatten(-2)
        return x if weight is None else x * weight

    def extra_repr(self) -> str:
        return f"{self.width}, groups={self.groups}, eps={self.eps}, affine={self.weight is not None}"


class Rotary(nn.Module):
    """Rotates pairs of the first ``dim`` elements of a head by position times a geometric sequence of angles.

    ``interleaved`` pairs elements 2i and 2i + 1 and spaces the exponents as torchscale's RetNet does (from 0 to 1,
    both included); otherwise i goes with i + dim/2 and the exponents are 2i/dim.
    """

    def __init__(self, dim: int, base: float, interleaved: bool):
        super().__init__()
        if dim % 2:
            raise ValueError(f"Rotary: dim is {dim}, expected an even number")
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """``[B, N]`` positions to ``[B, N, 1, dim / 2]`` angles."""
        half = self.dim // 2
        if self.interleaved:
            exponents = torch.linspace(0, 1, half, device=positions.device, dtype=dtype)
        else:
            exponents = torch.arange(half, device=positions.device, dtype=dtype) / half
        return positions[:, :, None, None].to(dtype) * self.base**-exponents

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """``[B, N, H, D]`` by positions ``[B, N]``; computed in float32 (float64 for such x), returned in x's dtype."""
        turned, kept = x.split([self.dim, x.shape[-1] - self.dim], -1)
        wide = turned.to(torch.promote_types(x.dtype, torch.float32))
        angles = self.angles(positions, wide.dtype)
        cos, sin = angles.cos(), angles.sin()
        if self.interleaved:
            a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = wide.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned.to(x.dtype), kept), -1)


class Lrpe(nn.Module):
    """TransNormerLLM's linearised relative position encoding: x to ``cat(x cos(theta n), x sin(theta n))``.

    theta is learned, ``[H, 1, D]`` as in the original's checkpoints. The head dim doubles.
    """

    def __init__(self, num_heads: int, head_dim: int, base: float = 10000.0, device=None, dtype=None):
        super().__init__()
        self.base = base
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        total = self.theta.numel()
        exponents = torch.arange(total, device=self.theta.device, dtype=torch.float32).view_as(self.theta)
        with torch.no_grad():
            self.theta.copy_(self.base ** (-2 / total * exponents))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """``[B, N, H, D]`` by positions ``[B, N]`` to ``[B, N, H, 2 D]``; in float32, returned in x's dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        theta = self.theta.squeeze(1).to(wide.dtype) * positions[:, :, None, None].to(wide.dtype)
        return torch.cat((wide * theta.cos(), wide * theta.sin()), -1).to(x.dtype)
