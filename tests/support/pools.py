"""Pools of states, as a server keeps them."""

import torch


def pool_of(shape, layout, dtype, device, seed=7):
    """A random pool [slots, H, D, E]. padded: rows that no vector access fits."""
    slots, heads, dim_k, dim_v = shape
    generator = torch.Generator(device).manual_seed(seed)
    size = {"kv": (dim_k, dim_v), "vk": (dim_v, dim_k), "padded": (dim_k + 1, dim_v + 1)}[layout]
    stored = torch.randn(slots, heads, *size, generator=generator, device=device).to(dtype)
    if layout == "vk":
        return stored.transpose(2, 3)
    return stored[:, :, :dim_k, :dim_v] if layout == "padded" else stored


def bits(x):
    """For comparisons in which NaN equals itself."""
    return x.contiguous().view(torch.uint8)
